# SPDX-License-Identifier: Apache-2.0
"""Every op in plain torch.

The oracle of every test and the path on a CPU. Names and parameters equal those of the kernels.
"""

from obs_kernels.reference.fisher import accumulate_fisher_, invert_spd
from obs_kernels.reference.hessian import accumulate_hessian_
from obs_kernels.reference.hessian import accumulate_inputs_ as accumulate_inputs_  # a step, no op: not in __all__
from obs_kernels.reference.hessian import weigh_tokens_ as weigh_tokens_
from obs_kernels.reference.matmul import feature_major, sparse_linear
from obs_kernels.reference.packing import pack, unpack
from obs_kernels.reference.prune import prune_nm, prune_vnm
from obs_kernels.reference.resolve import conjugate_gradients as conjugate_gradients  # a step, as sweep_groups
from obs_kernels.reference.search import search_nm, search_vnm
from obs_kernels.reference.sweep import sweep_groups as sweep_groups  # a step, no op: not in __all__
from obs_kernels.reference.sweep import sweep_rows
from obs_kernels.reference.sweep import sweep_rows_by as sweep_rows_by
from obs_kernels.reference.update import block_saliency, loss_increase, obs_update

__all__ = [
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
