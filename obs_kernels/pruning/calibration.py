# SPDX-License-Identifier: Apache-2.0
"""Gradients for the Fisher: per sample from one backward pass, or of the batch mean.

Of a batch the device does forward, backward for the output gradients, and one number a tensor that bounds the products
(``finite``). The host reads these numbers in one wait; then every layer's product goes into the rows of the gradient
buffer, and only when all are there do they count. So a batch is added whole or not at all.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from obs_kernels.errors import ConfigError, NonFiniteGradientError
from obs_kernels.ops.dispatch import no_autocast
from obs_kernels.pruning.capture import capture
from obs_kernels.pruning.config import OBSConfig
from obs_kernels.pruning.finite import require_finite_gradients
from obs_kernels.pruning.gradient_buffer import GradientBuffer, row_dtype
from obs_kernels.pruning.layer import PrunedLayer
from obs_kernels.pruning.modes import eval_mode, require_grad
from obs_kernels.pruning.phase_times import PhaseTimes, phase
from obs_kernels.pruning.row_clusters import RowSignatures
from obs_kernels.pruning.row_layer import RowLayer, RowSums, require_row_layers
from obs_kernels.pruning.samples import Samples, batch_size, check_samples, host_padding, padding_of
from obs_kernels.pruning.token_weights import TokenWeights

LossFn = Callable[[nn.Module, Any], Tensor]
T = TypeVar("T")
MAX_SKIPPED = 100
"""Non-finite batches in a row after which even on_nonfinite="skip_batch" raises."""


def collect_gradients(
    model: nn.Module,
    layers: Sequence[PrunedLayer],
    loader: Iterable[Any],
    loss_fn: LossFn,
    *,
    num_grads: int,
    gradients: str,
    on_nonfinite: str,
    seed: int = 0,
    sink: TokenWeights | RowSignatures | None = None,
    sized_for: Sequence[PrunedLayer] | None = None,
    timings: PhaseTimes | None = None,
    progress: bool = True,
) -> int:
    """Add up to ``num_grads`` gradients to the Fisher sums of ``layers``; returns how many came.

    The model runs in eval mode (no dropout) and comes back as it was, ``.grad`` and ``requires_grad`` included. Batches
    are moved to the model's device. A batch that runs out of memory is done again after the buffer gave its memory
    back.

    Args:
        loss_fn: ``loss_fn(model, batch)``, the mean loss over the samples, or per-sample losses [B].
        gradients: "sample" or "batch".
        on_nonfinite: "raise" or "skip_batch".
        seed: of torch's global generator while this runs; a ``loss_fn`` may draw from it. It comes back as it was.
        sink: where samples go instead of the sums of ``layers``.
        sized_for: see ``GradientBuffer``.
        timings: seconds of each phase are added to it.

    Raises:
        NonFiniteGradientError: names layer and batch; the Fisher sums hold the batches before it and nothing of this
        one. ConfigError: the loader gave no gradient at all, or the loss does not depend on the layers.
    """
    from tqdm import tqdm

    device = layers[0].weight.device
    add: Callable[..., int] = _add_samples if gradients == "sample" else _add_batch_gradient
    received = skipped = 0
    with ExitStack() as stack:
        stack.enter_context(eval_mode(model))
        stack.enter_context(require_grad([layer.weight for layer in layers]))
        stack.enter_context(seeded(device, seed))
        bar = stack.enter_context(
            tqdm(
                total=num_grads, desc="gradients", unit="grad", leave=False, disable=None if progress else True, delay=2
            )
        )
        buffer: GradientBuffer | RowSums | TokenWeights | RowSignatures
        if sink is not None:
            buffer = sink
        elif isinstance(layers[0], RowLayer):
            buffer = RowSums(require_row_layers(layers), timings)
        else:
            buffer = GradientBuffer(layers, limit=num_grads, sized_for=sized_for, timings=timings)
        stack.callback(buffer.close)
        batches = device_batches(loader, device, timings)
        while received < num_grads and (item := next(batches, None)) is not None:
            index, batch, padding = item
            try:
                count = add(model, buffer, batch, padding, loss_fn, num_grads - received, index, timings)
            except NonFiniteGradientError:
                skipped += 1
                if on_nonfinite == "raise" or skipped >= MAX_SKIPPED:
                    raise
                continue
            skipped = 0
            received += count
            bar.update(count)
    if received == 0:
        raise ConfigError(
            "loader gave no gradient; it must yield at least one batch with a finite loss (an iterator can be used "
            "only once)"
        )
    return received


def find_row_clusters(
    model: nn.Module,
    layers: Sequence[PrunedLayer],
    loader: Iterable[Any],
    loss_fn: LossFn,
    cfg: OBSConfig,
    timings: PhaseTimes | None = None,
) -> None:
    """Which rows of each of ``layers`` share a Hessian, by a pass with gradients.

    Nothing where all rows share one, or a layer has sums already: more tokens go to the same clusters.

    Raises:
        ConfigError: ``loader`` can be used only once. What ``collect_gradients`` does.
    """
    rows = [layer for layer in layers if isinstance(layer, RowLayer)]
    several = [layer for layer in rows if layer.num_clusters > 1 and not layer.has_fisher]
    if not several:
        return
    if isinstance(loader, Iterator):
        raise ConfigError(
            "loader is an iterator, which can be used only once, and row_clusters takes one more pass; pass a list, a "
            "DataLoader or another re-iterable"
        )
    signatures = RowSignatures(several, cfg.seed, timings)
    collect_gradients(
        model,
        several,
        loader,
        loss_fn,
        num_grads=cfg.num_grads,
        gradients=cfg.gradients,
        on_nonfinite=cfg.on_nonfinite,
        seed=cfg.seed,
        sink=signatures,
        timings=timings,
    )
    signatures.assign(cfg.parsed_pattern.multiples()[0])


@contextmanager
def seeded(device: torch.device, seed: int) -> Iterator[None]:
    """Torch's global generators, that of ``device`` included, at ``seed``; afterwards as they were."""
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.default_generator.manual_seed(seed)
        if device.type == "cuda":
            with torch.cuda.device(device):
                torch.cuda.manual_seed(seed)
        yield


def move(batch: Any, device: torch.device) -> Any:
    """``batch`` with all its tensors on ``device``; dicts, lists and tuples are walked."""
    if isinstance(batch, Tensor):
        return batch.to(device, non_blocking=True)
    to = getattr(batch, "to", None)
    if isinstance(batch, Mapping) and callable(to):  # transformers' BatchEncoding keeps its attributes so
        try:
            return to(device, non_blocking=True)
        except TypeError:
            return to(device)
    if isinstance(batch, Mapping):
        return {k: move(v, device) for k, v in batch.items()}
    if isinstance(batch, tuple) and hasattr(batch, "_fields"):
        return type(batch)(*(move(v, device) for v in batch))
    return type(batch)(move(v, device) for v in batch) if isinstance(batch, (list, tuple)) else batch


def add_parameter_gradients(buffer: GradientBuffer, batch: int) -> None:
    """Add ``.grad`` of every layer as one gradient; nothing is added unless all are there and finite."""
    found = []
    for layer in buffer.layers:
        grad = layer.weight.grad
        if grad is None:
            raise ConfigError(
                f"{layer.parameter_name}.grad is None; call accumulate() after loss.backward() and before zero_grad()"
            )
        found.append(layer.as_matrix(grad.detach()))
    with no_autocast():
        require_finite_gradients(buffer.layers, found, batch)
    _push_gradients(buffer, found)


def device_batches(
    loader: Iterable[Any], device: torch.device, timings: PhaseTimes | None
) -> Iterator[tuple[int, Any, Tensor | None]]:
    """Number, batch on ``device``, and its padding [N, T] bool where there may be any."""
    found = iter(loader)
    index = 0
    while True:
        with phase(timings, "data"):
            try:
                batch = next(found)
            except StopIteration:
                return
            padded = host_padding(batch)  # before it is moved: no wait for the device
            batch = move(batch, device)
            padding = None if padded is False else padding_of(batch)
        yield index, batch, padding
        del batch, padding
        index += 1


def _add_batch_gradient(
    model: nn.Module,
    buffer: GradientBuffer,
    batch: Any,
    padding: Tensor | None,
    loss_fn: LossFn,
    room: int,
    index: int,
    timings: PhaseTimes | None,
) -> int:
    def work() -> tuple[Tensor, list[Tensor]]:
        with phase(timings, "forward"):
            loss = _check_loss(loss_fn(model, batch)).float().mean()
        with phase(timings, "backward"):
            found = torch.autograd.grad(loss, [layer.weight for layer in buffer.layers], allow_unused=True)
        if all(grad is None for grad in found):
            raise ConfigError("the loss reaches no selected layer; check targets, ignore and loss_fn")
        grads = [
            torch.zeros_like(layer.matrix) if grad is None else layer.as_matrix(grad.detach())
            for layer, grad in zip(buffer.layers, found, strict=True)
        ]
        return loss.detach(), grads

    loss, grads = _with_memory(buffer, work)
    with phase(timings, "check"), no_autocast():
        require_finite_gradients(buffer.layers, grads, index, loss)
    _push_gradients(buffer, grads)
    return 1


def _push_gradients(buffer: GradientBuffer, grads: Sequence[Tensor]) -> None:
    """One gradient [R, C] of each layer."""
    by_layer = dict(zip(buffer.layers, grads, strict=True))

    def write(layer: PrunedLayer, out: Tensor, _: slice) -> None:
        out[0].copy_(by_layer[layer])

    buffer.push(1, {layer: row_dtype(grad.dtype, grad.device) for layer, grad in by_layer.items()}, write)


def _add_samples(
    model: nn.Module,
    buffer: GradientBuffer | RowSums | TokenWeights | RowSignatures,
    batch: Any,
    padding: Tensor | None,
    loss_fn: LossFn,
    room: int,
    index: int,
    timings: PhaseTimes | None,
) -> int:
    layers = buffer.layers
    # autograd's own weight gradients of the first batch, to compare with: a weight may be used where no hook sees it
    first = len(buffer) == 0 if isinstance(buffer, (TokenWeights, RowSignatures)) else layers[0].num_grads == 0
    compared = [layer.weight for layer in layers] if first else []

    def work() -> tuple[int, Samples]:
        with phase(timings, "forward"), capture(layers) as captured:
            loss = _check_loss(loss_fn(model, batch))
        uses = captured.uses
        if not uses:
            raise ConfigError("the loss reaches no selected layer; check targets, ignore and loss_fn")
        with phase(timings, "backward"):
            asked: list[Any] = [*(use.edge for use in uses), *compared]
            # the sum, also of a mean: half precision has no room for the factor, which the product takes instead
            grads = torch.autograd.grad(loss.float().sum(), asked, allow_unused=True)
        dys: list[Tensor | None] = list(grads[: len(uses)])
        weight_grads = grads[len(uses) :]
        del grads
        samples = loss.shape[0] if loss.dim() else batch_size(batch)
        if samples is None:
            samples = captured.inputs[uses[0].input].shape[0]
        with phase(timings, "check"), no_autocast():
            return samples, check_samples(
                layers,
                captured,
                dys,
                weight_grads,
                loss,
                samples=samples,
                # of a mean loss each sample's own gradient is N times its share
                scale=1.0 if loss.dim() else float(samples),
                padding=padding,
                batch=index,
            )

    samples, found = _with_memory(buffer, work)
    count = min(samples, room)
    buffer.push_samples(count, found, index)
    return count


def _with_memory(buffer: GradientBuffer | RowSums | TokenWeights | RowSignatures, work: Callable[[], T]) -> T:
    """``work()``, which adds nothing anywhere; done again with a smaller buffer while memory runs out."""
    while True:
        try:
            return work()
        except torch.OutOfMemoryError as error:
            failure = error.with_traceback(None)  # its frames hold the tensors that are in the way
        if not buffer.shrink():
            raise failure


def _check_loss(loss: Tensor) -> Tensor:
    if not isinstance(loss, Tensor) or loss.dim() > 1 or (loss.dim() == 1 and not loss.numel()):
        came = list(loss.shape) if isinstance(loss, Tensor) else type(loss).__name__
        raise ConfigError(f"loss_fn must return the mean loss (a scalar tensor) or one loss a sample [B], got {came}")
    if not loss.requires_grad:
        raise ConfigError("loss_fn returned a loss without gradient; do not detach it and do not run it under no_grad")
    return loss
