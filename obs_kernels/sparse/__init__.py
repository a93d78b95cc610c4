# SPDX-License-Identifier: Apache-2.0
"""Packed weights in modules and on disk."""

from obs_kernels.ops import SparseWeight
from obs_kernels.sparse.checkpoint import load, save_pretrained
from obs_kernels.sparse.linear import SparseLinear, compress_, decompress_, detect_pattern

__all__ = ["SparseLinear", "SparseWeight", "compress_", "decompress_", "detect_pattern", "load", "save_pretrained"]
