# SPDX-License-Identifier: Apache-2.0
"""Structured sparsity of transformers by second-order pruning."""

from obs_kernels import ops
from obs_kernels.patterns import parse_pattern

__version__ = "0.1.0"
