# SPDX-License-Identifier: Apache-2.0
"""From a dense model to a pruned one: calibration, choice, update, masks."""

from obs_kernels.pruning.config import OBSConfig
from obs_kernels.pruning.gradual import gradual_step
from obs_kernels.pruning.output_probe import output_probe
from obs_kernels.pruning.plan import PruningPlan
from obs_kernels.pruning.pruner import OBSPruner
from obs_kernels.pruning.report import LayerReport, PruningReport
from obs_kernels.pruning.schedule import PruningSchedule, ScheduledPruning
from obs_kernels.pruning.sparsify import sparsify_

__all__ = [
    "LayerReport",
    "OBSConfig",
    "OBSPruner",
    "PruningPlan",
    "PruningReport",
    "PruningSchedule",
    "ScheduledPruning",
    "gradual_step",
    "output_probe",
    "sparsify_",
]
