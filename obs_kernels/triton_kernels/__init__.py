# SPDX-License-Identifier: Apache-2.0
"""Triton kernels, with the names and parameters of ``obs_kernels.reference``.

Imported inside functions only: it needs triton. Under ``TRITON_INTERPRET=1`` the same kernels run on CPU tensors.
"""

from obs_kernels.triton_kernels.fisher import accumulate_fisher_
from obs_kernels.triton_kernels.resolve import conjugate_gradients as conjugate_gradients  # a step, not in __all__

__all__ = ["accumulate_fisher_"]
