# SPDX-License-Identifier: Apache-2.0
"""Ops of the compiled module, with the names and parameters of ``obs_kernels.reference``; a file a topic.

The only folder that takes ``data_ptr()``: whatever reaches an address here has been checked for device, dtype, shape
and contiguity. Outputs are allocated through torch and work is queued on torch's current stream without waiting, so
that side streams and CUDA graphs behave as they do for torch's own ops.
"""

from obs_kernels.cuda_calls.device import runs_on
from obs_kernels.cuda_calls.fisher import accumulate_fisher_, launch_accumulate_fisher
from obs_kernels.cuda_calls.group_launches import launch_groups
from obs_kernels.cuda_calls.inverse import invert_spd, invert_spd_into, launch_invert_spd
from obs_kernels.cuda_calls.layout import feature_major
from obs_kernels.cuda_calls.matmul import launch_gather_linear, launch_sparse_linear, sparse_linear
from obs_kernels.cuda_calls.packing import launch_pack, pack
from obs_kernels.cuda_calls.prepacked import prepack
from obs_kernels.cuda_calls.search import prune_nm, prune_vnm, search_nm, search_vnm
from obs_kernels.cuda_calls.sweep import launch_sweep_columns, sweep_groups
from obs_kernels.cuda_calls.update import block_saliency, loss_increase, obs_update
from obs_kernels.cuda_calls.update_launches import launch_loss_increase, launch_update_joint, launch_update_single

__all__ = [
    "accumulate_fisher_",
    "block_saliency",
    "feature_major",
    "invert_spd",
    "invert_spd_into",
    "launch_accumulate_fisher",
    "launch_invert_spd",
    "launch_loss_increase",
    "launch_pack",
    "launch_gather_linear",
    "launch_groups",
    "launch_sparse_linear",
    "launch_sweep_columns",
    "launch_update_joint",
    "launch_update_single",
    "loss_increase",
    "obs_update",
    "pack",
    "prepack",
    "prune_nm",
    "prune_vnm",
    "runs_on",
    "search_nm",
    "search_vnm",
    "sparse_linear",
    "sweep_groups",
]
