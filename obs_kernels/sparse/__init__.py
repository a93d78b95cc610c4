# SPDX-License-Identifier: Apache-2.0
"""Packed weights in modules and on disk."""

from obs_kernels.ops import SparseWeight
from obs_kernels.sparse.checkpoint import load, save_pretrained
from obs_kernels.sparse.compress import CompressionReport, compress_, decompress_, detect_pattern
from obs_kernels.sparse.hub import register
from obs_kernels.sparse.linear import SparseLinear

register()

__all__ = [
    "CompressionReport",
    "SparseLinear",
    "SparseWeight",
    "compress_",
    "decompress_",
    "detect_pattern",
    "load",
    "save_pretrained",
]
