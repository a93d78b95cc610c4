# SPDX-License-Identifier: Apache-2.0
"""Public ops.

Docstring, checks, dispatch and ``torch.library`` registration, so that ``torch.compile(fullgraph=True)`` works.
"""

from obs_kernels.ops.fisher import accumulate_fisher_, invert_spd
from obs_kernels.ops.hessian import accumulate_hessian_
from obs_kernels.ops.layout import feature_major
from obs_kernels.ops.matmul import sparse_linear
from obs_kernels.ops.packing import pack, unpack
from obs_kernels.ops.prune import Pruned, prune_nm, prune_vnm
from obs_kernels.ops.search import Selection, search_nm, search_vnm
from obs_kernels.ops.sparse_weight import SparseWeight
from obs_kernels.ops.sweep import sweep_rows
from obs_kernels.ops.update import block_saliency, loss_increase, obs_update

__all__ = [
    "Pruned",
    "Selection",
    "SparseWeight",
    "accumulate_fisher_",
    "accumulate_hessian_",
    "block_saliency",
    "feature_major",
    "invert_spd",
    "loss_increase",
    "obs_update",
    "pack",
    "prune_nm",
    "prune_vnm",
    "search_nm",
    "search_vnm",
    "sparse_linear",
    "sweep_rows",
    "unpack",
]
