# SPDX-License-Identifier: Apache-2.0
"""Gradients for the Fisher: per sample from one backward pass, or of the batch mean.

Per sample: y = x W^T gives G_i = sum_t dy_it x_it^T, so activations and output gradients of one ordinary backward pass
hold the gradient of every sample's own loss. Output gradients are asked of autograd directly, which skips all weight
gradients. A batch is added only after all of it was found finite.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge

from obs_kernels.errors import ConfigError, NonFiniteGradientError, ShapeNotSupportedError
from obs_kernels.pruning.layer import PrunedLayer

LossFn = Callable[[nn.Module, Any], Tensor]
GRAD_BYTES = 256 << 20
"""Per-sample gradients of one layer that are held at a time."""


def collect_gradients(
    model: nn.Module,
    layers: Sequence[PrunedLayer],
    loader: Iterable[Any],
    loss_fn: LossFn,
    *,
    num_grads: int,
    gradients: str,
    on_nonfinite: str,
    progress: bool = True,
) -> int:
    """Add up to ``num_grads`` gradients to the Fisher sums of ``layers``; returns how many came.

    The model runs in eval mode (no dropout) and comes back as it was, ``.grad`` and ``requires_grad`` included. Batches
    are moved to the model's device.

    Args:
        loss_fn: ``loss_fn(model, batch)``, the mean loss over the samples, or per-sample losses [B].
        gradients: "sample" or "batch".
        on_nonfinite: "raise" or "skip_batch".

    Raises:
        NonFiniteGradientError: names layer and batch; the Fisher sums hold the batches before it and nothing of this
        one. ConfigError: the loader gave no gradient at all, or the loss does not depend on the layers.
    """
    from tqdm import tqdm

    device = layers[0].weight.device
    step = _sample_step if gradients == "sample" else _batch_step
    received = 0
    with (
        _eval_mode(model),
        _weights_require_grad(layers),
        tqdm(
            total=num_grads, desc="gradients", unit="grad", leave=False, disable=None if progress else True, delay=2
        ) as bar,
    ):
        for index, batch in enumerate(loader):
            if received >= num_grads:
                break
            try:
                count = step(model, layers, move(batch, device), loss_fn, num_grads - received, index)
            except NonFiniteGradientError:
                if on_nonfinite == "raise":
                    raise
                continue
            received += count
            bar.update(count)
    if received == 0:
        raise ConfigError(
            "loader gave no gradient; it must yield at least one batch with a finite loss (an iterator can be "
            "used only once)"
        )
    return received


def move(batch: Any, device: torch.device) -> Any:
    """``batch`` with all its tensors on ``device``; dicts, lists and tuples are walked."""
    if isinstance(batch, Tensor):
        return batch.to(device, non_blocking=True)
    if isinstance(batch, Mapping):
        return {k: move(v, device) for k, v in batch.items()}
    if isinstance(batch, tuple) and hasattr(batch, "_fields"):
        return type(batch)(*(move(v, device) for v in batch))
    return type(batch)(move(v, device) for v in batch) if isinstance(batch, (list, tuple)) else batch


def add_parameter_gradients(layers: Sequence[PrunedLayer], batch: int) -> None:
    """Add ``.grad`` of every layer as one gradient; nothing is added unless all are there and finite."""
    grads = [layer.weight.grad for layer in layers]
    for layer, grad in zip(layers, grads, strict=True):
        if grad is None:
            raise ConfigError(
                f"{layer.parameter_name}.grad is None; call accumulate() after loss.backward() and before zero_grad()"
            )
    _add_batch_gradients(layers, [g for g in grads if g is not None], batch)


def _batch_step(
    model: nn.Module, layers: Sequence[PrunedLayer], batch: Any, loss_fn: LossFn, _: int, index: int
) -> int:
    loss = _check_loss(loss_fn(model, batch)).float().mean()
    grads = torch.autograd.grad(loss, [layer.weight for layer in layers], allow_unused=True)
    _add_batch_gradients(
        layers,
        [torch.zeros_like(layer.weight) if g is None else g for layer, g in zip(layers, grads, strict=True)],
        index,
    )
    return 1


def _add_batch_gradients(layers: Sequence[PrunedLayer], grads: Sequence[Tensor], batch: int) -> None:
    for layer, grad in zip(layers, grads, strict=True):
        _require_finite(layer, grad.float().square(), batch)  # squared: what the Fisher will hold
    for layer, grad in zip(layers, grads, strict=True):
        layer.add_gradients(grad.detach()[None])


def _sample_step(
    model: nn.Module, layers: Sequence[PrunedLayer], batch: Any, loss_fn: LossFn, room: int, index: int
) -> int:
    with _capture(layers) as captured:
        loss = _check_loss(loss_fn(model, batch))
    uses = [use for layer in layers for use in captured[layer]]
    if not uses:
        raise ConfigError("no selected layer took part in the forward pass with gradients; check targets and loss_fn")
    edges = [edge for _, edge in uses]
    dys = torch.autograd.grad(loss.float().sum(), edges, allow_unused=True)
    samples = loss.shape[0] if loss.dim() else uses[0][0].shape[0]
    scale = 1.0 if loss.dim() else float(samples)  # a mean loss: each sample's own gradient is B times its share
    padding = _attention_mask(batch)

    pieces: dict[PrunedLayer, list[tuple[Tensor, Tensor]]] = {layer: [] for layer in layers}
    owners = [layer for layer in layers for _ in captured[layer]]
    for layer, (x, _), dy in zip(owners, uses, dys, strict=True):
        if dy is not None:
            pieces[layer].append(_tokens(layer, x, dy if scale == 1.0 else dy.float() * scale, samples, padding))
    for layer in layers:
        _require_finite_products(layer, pieces[layer], index)
    count = min(samples, room)
    for layer in layers:
        _add_samples(layer, pieces[layer], count)
    return count


def _add_samples(layer: PrunedLayer, pieces: Sequence[tuple[Tensor, Tensor]], count: int) -> None:
    rows, cols = layer.mask.shape
    step = max(1, GRAD_BYTES // (4 * rows * cols))
    for start in range(0, count, step):
        part = slice(start, min(start + step, count))
        if pieces:
            layer.add_gradients(_sample_gradients(pieces, part))
        else:  # the loss does not reach this layer: a true zero gradient
            layer.allocate()
            layer.num_grads += part.stop - part.start


def _sample_gradients(pieces: Sequence[tuple[Tensor, Tensor]], part: slice) -> Tensor:
    """[S, R, C] f32: sum over uses and tokens of dy x^T."""
    total = None
    for x, dy in pieces:
        grad = torch.bmm(dy[part].float().mT, x[part].float())
        total = grad if total is None else total.add_(grad)
    assert total is not None
    return total


def _tokens(layer: PrunedLayer, x: Tensor, dy: Tensor, samples: int, padding: Tensor | None) -> tuple[Tensor, Tensor]:
    """x [B, T, C] and dy [B, T, R] of one use, tokens outside the attention mask zeroed."""
    if x.shape[0] != samples:
        raise ShapeNotSupportedError(
            f"{layer.name}: input has {x.shape[0]} rows for {samples} samples; per-sample gradients need the "
            f"batch in the first "
            f"dimension. Fix: gradients='batch', or ignore this layer"
        )
    if padding is not None and x.dim() == 3 and padding.shape == x.shape[:2]:
        dy = dy * padding[..., None].to(dy.dtype)
    return x.reshape(samples, -1, x.shape[-1]), dy.reshape(samples, -1, dy.shape[-1])


def _attention_mask(batch: Any) -> Tensor | None:
    mask = batch.get("attention_mask") if isinstance(batch, Mapping) else None
    return (mask != 0) if isinstance(mask, Tensor) and mask.dim() == 2 else None


def _require_finite_products(layer: PrunedLayer, pieces: Sequence[tuple[Tensor, Tensor]], batch: int) -> None:
    """Finite x and dy with room to spare need no product; only near overflow are the gradients themselves looked at."""
    bound = torch.zeros((), dtype=torch.float64, device=layer.weight.device)
    for x, dy in pieces:
        if x.numel() and dy.numel():
            bound += x.abs().amax().double() * dy.abs().amax().double() * x.shape[1]
    if float(bound) < 1e16:  # false for NaN too; its square, summed over samples, stays below the f32 maximum
        return
    for x, dy in pieces:
        _require_finite(layer, x, batch)
        _require_finite(layer, dy, batch)
    for start in range(pieces[0][0].shape[0]):
        _require_finite(layer, _sample_gradients(pieces, slice(start, start + 1)).square(), batch)


def _require_finite(layer: PrunedLayer, values: Tensor, batch: int) -> None:
    finite = torch.isfinite(values)
    if not bool(finite.all()):
        raise NonFiniteGradientError(
            f"{layer.name}: {int((~finite).sum())} NaN or Inf in the gradients of batch {batch}; the Fisher is "
            f"as it was before this "
            f"batch. Fix: clean the data, lower the loss scale, or on_nonfinite='skip_batch'"
        )


def _check_loss(loss: Tensor) -> Tensor:
    if not isinstance(loss, Tensor) or loss.dim() > 1 or (loss.dim() == 1 and not loss.numel()):
        came = list(loss.shape) if isinstance(loss, Tensor) else type(loss).__name__
        raise ConfigError(f"loss_fn must return the mean loss (a scalar tensor) or one loss a sample [B], got {came}")
    if not loss.requires_grad:
        raise ConfigError("loss_fn returned a loss without gradient; do not detach it and do not run it under no_grad")
    return loss


@contextmanager
def _capture(layers: Sequence[PrunedLayer]) -> Iterator[dict[PrunedLayer, list[tuple[Tensor, GradientEdge]]]]:
    """Keep (input, gradient edge of the output) of every use of the layers; hooks go also after exceptions."""
    captured: dict[PrunedLayer, list[tuple[Tensor, GradientEdge]]] = {layer: [] for layer in layers}
    handles = []

    def hook_of(layer: PrunedLayer) -> Callable[[nn.Module, tuple[Any, ...], Tensor], Tensor | None]:
        def hook(_: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor | None:
            if not output.requires_grad:
                return None
            # The edge, not the tensor: a later in-place activation must not change what it stands for. A linear of a
            # 3-D input returns a view, and in-place changes of a view bypass its edge, hence the copy.
            output = output.clone()
            captured[layer].append((args[0].detach(), get_gradient_edge(output)))
            return output

        return hook

    try:
        for layer in layers:
            handles.append(layer.module.register_forward_hook(hook_of(layer)))
        yield captured
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def _eval_mode(model: nn.Module) -> Iterator[None]:
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


@contextmanager
def _weights_require_grad(layers: Sequence[PrunedLayer]) -> Iterator[None]:
    flags = [(layer.weight, layer.weight.requires_grad) for layer in layers]
    for weight, _ in flags:
        weight.requires_grad_(True)
    try:
        with torch.enable_grad():
            yield
    finally:
        for weight, flag in flags:
            weight.requires_grad_(flag)
