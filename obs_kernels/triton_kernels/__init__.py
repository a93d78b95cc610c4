# SPDX-License-Identifier: Apache-2.0
"""Triton kernels, with the names and parameters of ``obs_kernels.reference``.

Imported inside functions only: it needs triton. Under ``TRITON_INTERPRET=1`` the same kernels run on CPU tensors.
"""

from obs_kernels.triton_kernels.fisher import accumulate_fisher_
from obs_kernels.triton_kernels.hessian import accumulate_hessian_
from obs_kernels.triton_kernels.hessian import accumulate_inputs_ as accumulate_inputs_  # a step, no op: not in __all__
from obs_kernels.triton_kernels.hessian import weigh_tokens_ as weigh_tokens_
from obs_kernels.triton_kernels.resolve import conjugate_gradients as conjugate_gradients

__all__ = ["accumulate_fisher_", "accumulate_hessian_"]
