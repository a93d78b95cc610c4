# SPDX-License-Identifier: Apache-2.0
"""Gradual pruning in a plain PyTorch loop: a small classifier to 2:8 while it trains, in a few seconds on a CPU.

python examples/plain_loop.py
"""

import torch
import torch.nn.functional as F
from torch import nn

from obs_kernels import OBSConfig, OBSPruner, compress_
from obs_kernels.pruning import PruningSchedule
from obs_kernels.training import GradualPruning

EPOCHS = 6


def make_data(batches: int, seed: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Points in 32 dimensions, and on which side of some planes they lie."""
    planes = torch.randn(32, 8, generator=torch.Generator().manual_seed(0))
    draw = torch.Generator().manual_seed(seed)
    inputs = [torch.randn(64, 32, generator=draw) for _ in range(batches)]
    return [(x, (x @ planes).argmax(1)) for x in inputs]


def losses(model: nn.Module, batch: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    """[B]: the loss of each sample."""
    return F.cross_entropy(model(batch[0]), batch[1], reduction="none")


def accuracy(model: nn.Module, data: list[tuple[torch.Tensor, torch.Tensor]]) -> float:
    """Percent of samples that are told right."""
    return 100 * float(torch.stack([(model(x).argmax(1) == y).float().mean() for x, y in data]).mean())


def main() -> None:
    """Train, prune meanwhile, pack."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 128), nn.GELU(), nn.Linear(128, 128), nn.GELU(), nn.Linear(128, 8))
    train, test = make_data(40, seed=1), make_data(10, seed=2)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)

    # the ten lines: what to prune, when, and two calls around each optimizer step
    pruner = OBSPruner(model, OBSConfig(pattern="2:8", num_grads=256, ignore=("4",)))
    schedule = PruningSchedule(start_epoch=2, end_epoch=3.5, update_frequency=0.5, shape="structure_decay")
    gradual = GradualPruning(pruner, schedule, train[:4], losses, steps_per_epoch=len(train))
    for step in range(EPOCHS * len(train)):
        gradual.before_step(step, optimizer)
        losses(model, train[step % len(train)]).mean().backward()
        optimizer.step()
        gradual.after_step(optimizer)
        optimizer.zero_grad()
    report = gradual.finish()

    print(f"sparsity {report.sparsity:.2f} in stages {', '.join(report.stages)}, {pruner.verify()} violations")
    print(f"accuracy {accuracy(model, test):.1f} %; packed: {', '.join(compress_(model))}")


if __name__ == "__main__":
    main()
