# SPDX-License-Identifier: Apache-2.0
"""Every error that the package raises on purpose.

One base class, and each error is also the builtin that a caller would catch. A message names the argument, what
was wanted, what came, and one fix.
"""

from __future__ import annotations

import torch


class ObsKernelsError(Exception):
    """Base of every error raised by this package."""


class ConfigError(ObsKernelsError, ValueError):
    """A bad configuration value, an unknown key or name, or targets that match nothing."""


class ShapeNotSupportedError(ObsKernelsError, ValueError):
    """A tensor whose shape does not fit the op or the pattern."""


class SparsityPatternError(ObsKernelsError, ValueError):
    """A mask or weight that breaks the sparsity pattern it claims."""


class CheckpointFormatError(ObsKernelsError, ValueError):
    """A checkpoint that is damaged, incomplete or of another format."""


class DataFormatError(ObsKernelsError, ValueError):
    """A data set file that is missing, truncated or not in the expected format."""


class DTypeNotSupportedError(ObsKernelsError, TypeError):
    """A dtype outside the list of the op."""


class DeviceMismatchError(ObsKernelsError, RuntimeError):
    """Tensors that must share a device and do not."""


class UnsupportedGPUError(ObsKernelsError, RuntimeError):
    """A GPU that a forced backend cannot run on."""


class ResumeMismatchError(ObsKernelsError, RuntimeError):
    """A work folder that was made by another configuration."""


class WorkFolderLockedError(ObsKernelsError, RuntimeError):
    """A work folder that another process is using."""


class MemoryBudgetError(ObsKernelsError, RuntimeError):
    """Work that does not fit the memory budget; the message has the numbers."""


class BackendUnavailableError(ObsKernelsError, ImportError):
    """A backend asked for by name that cannot run here; the message keeps the reason."""


class MissingDependencyError(ObsKernelsError, ImportError):
    """An optional library that the call needs and that is not installed."""


class NonFiniteError(ObsKernelsError, FloatingPointError):
    """NaN or Inf in a weight, a Fisher block or another argument."""


class NonFiniteGradientError(NonFiniteError):
    """NaN or Inf in a calibration batch; names layer and batch, and the Fisher is as it was before."""


class SingularBlockError(ObsKernelsError, torch.linalg.LinAlgError):
    """A matrix block that is not positive definite at the allowed damping."""
