# SPDX-License-Identifier: Apache-2.0
"""Gradual pruning under Accelerate, with accumulated gradients and a checkpoint: a few seconds on a CPU.

    python examples/accelerate_loop.py, or on several GPUs: accelerate launch examples/accelerate_loop.py

In several processes the curvature is shared: each takes its part of the calibration batches, which are the same in all.
"""

import tempfile
from pathlib import Path

import torch
from accelerate import Accelerator
from plain_loop import accuracy, losses, make_data
from torch import nn

from obs_kernels import OBSConfig, OBSPruner
from obs_kernels.pruning import PruningSchedule
from obs_kernels.pruning.state_files import read_state, write_state
from obs_kernels.training import GradualPruning

EPOCHS, ACCUMULATED = 6, 2


def main() -> None:
    """Train, prune meanwhile, save and go on."""
    accelerator = Accelerator(gradient_accumulation_steps=ACCUMULATED)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 128), nn.GELU(), nn.Linear(128, 128), nn.GELU(), nn.Linear(128, 8))
    data, calibration = make_data(40, seed=1 + accelerator.process_index), make_data(4, seed=9)
    model, optimizer = accelerator.prepare(model, torch.optim.AdamW(model.parameters(), lr=3e-3))
    steps_per_epoch = len(data) // ACCUMULATED

    # the ten lines: the pruner takes the unwrapped model, and a step is one of the optimizer, not of a batch
    pruner = OBSPruner(accelerator.unwrap_model(model), OBSConfig(pattern="2:8", num_grads=256, ignore=("4",)))
    schedule = PruningSchedule(start_epoch=2, end_epoch=3.5, update_frequency=0.5, shape="structure_decay")
    gradual = GradualPruning(pruner, schedule, calibration, losses, steps_per_epoch=steps_per_epoch)
    step = 0
    for number in range(EPOCHS * len(data)):
        with accelerator.accumulate(model):
            gradual.before_step(step, optimizer)
            x, y = (part.to(accelerator.device) for part in data[number % len(data)])
            accelerator.backward(losses(model, (x, y)).mean())
            optimizer.step()
            gradual.after_step(optimizer)
            optimizer.zero_grad()
        step += accelerator.sync_gradients

    with tempfile.TemporaryDirectory() as folder:  # masks and position, as safetensors and JSON
        if accelerator.is_main_process:
            accelerator.save_model(model, folder)
            write_state(Path(folder), gradual.state_dict())
            gradual.load_state_dict(read_state(folder))
    report = gradual.finish()
    accelerator.print(f"sparsity {report.sparsity:.2f} after {step} steps, {pruner.verify()} violations")
    test = [(x.to(accelerator.device), y.to(accelerator.device)) for x, y in make_data(10, seed=2)]
    accelerator.print(f"accuracy {accuracy(model, test):.1f} %")


if __name__ == "__main__":
    main()
