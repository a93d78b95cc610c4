# SPDX-License-Identifier: Apache-2.0
"""Structured sparsity of transformers by second-order (OBS) pruning.

Data flows one way: calibration batches -> curvature (block Fisher or row Hessian) -> choice and update -> packing ->
sparse product.
Importing the package needs neither a GPU nor compiled code, and never initialises CUDA.
"""

from obs_kernels import errors, ops
from obs_kernels.patterns import parse_pattern
from obs_kernels.pruning import (
    OBSConfig,
    OBSPruner,
    PruningPlan,
    PruningReport,
    PruningSchedule,
    gradual_step,
    output_probe,
    sparsify_,
)
from obs_kernels.sparse import SparseLinear, SparseWeight, compress_, decompress_, load, save_pretrained

__version__ = "0.1.0"

__all__ = [
    "OBSConfig",
    "OBSPruner",
    "PruningPlan",
    "PruningReport",
    "PruningSchedule",
    "SparseLinear",
    "SparseWeight",
    "compress_",
    "decompress_",
    "errors",
    "gradual_step",
    "load",
    "ops",
    "output_probe",
    "parse_pattern",
    "save_pretrained",
    "sparsify_",
]
