# SPDX-License-Identifier: Apache-2.0
"""Gradients for the Fisher: per sample from one backward pass, or of the batch mean.

Per sample: y = x W^T gives G_i = sum_t dy_it x_it^T, so activations and output gradients of one ordinary backward pass
hold the gradient of every sample's own loss. Output gradients are asked of autograd directly, which skips all weight
gradients. A batch is added only after all of it was found finite.
"""

from __future__ import annotations

import math
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
MAX_SKIPPED = 100
"""Non-finite batches in a row after which even on_nonfinite="skip_batch" raises."""
SELF_CHECK_TOLERANCE = 0.05
"""Share by which the summed per-sample gradients may miss autograd's own; half precision needs most of it."""


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
    received = skipped = 0
    with (
        _eval_mode(model),
        _weights_require_grad(layers),
        torch.random.fork_rng([device] if device.type == "cuda" else []),
        tqdm(
            total=num_grads, desc="gradients", unit="grad", leave=False, disable=None if progress else True, delay=2
        ) as bar,
    ):
        batches = enumerate(loader)
        while received < num_grads and (item := next(batches, None)) is not None:
            index, batch = item
            try:
                count = step(model, layers, move(batch, device), loss_fn, num_grads - received, index)
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
            "loader gave no gradient; it must yield at least one batch with a finite loss (an iterator can be "
            "used only "
            "once)"
        )
    return received


def move(batch: Any, device: torch.device) -> Any:
    """``batch`` with all its tensors on ``device``; dicts, lists and tuples are walked."""
    if isinstance(batch, Tensor):
        return batch.to(device, non_blocking=True)
    to = getattr(batch, "to", None)
    if isinstance(batch, Mapping) and callable(to):
        return to(device)  # transformers' BatchEncoding keeps its attributes so
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
    found = [g for g in grads if g is not None]
    _require_finite_gradients(layers, found, batch)
    _add_batch_gradients(layers, found)


def _batch_step(
    model: nn.Module, layers: Sequence[PrunedLayer], batch: Any, loss_fn: LossFn, _: int, index: int
) -> int:
    loss = _check_loss(loss_fn(model, batch)).float().mean()
    found = torch.autograd.grad(loss, [layer.weight for layer in layers], allow_unused=True)
    _require_any(found)
    grads = [torch.zeros_like(layer.weight) if g is None else g for layer, g in zip(layers, found, strict=True)]
    _require_finite_gradients(layers, grads, index)
    _require_finite_loss(loss, index)
    _add_batch_gradients(layers, grads)
    return 1


def _require_finite_gradients(layers: Sequence[PrunedLayer], grads: Sequence[Tensor], batch: int) -> None:
    for layer, grad in zip(layers, grads, strict=True):
        _require_finite(layer, grad.float().square(), batch)  # squared: what the Fisher will hold


def _add_batch_gradients(layers: Sequence[PrunedLayer], grads: Sequence[Tensor]) -> None:
    for layer, grad in zip(layers, grads, strict=True):
        layer.add_gradients(grad.detach()[None])


def _sample_step(
    model: nn.Module, layers: Sequence[PrunedLayer], batch: Any, loss_fn: LossFn, room: int, index: int
) -> int:
    with _capture(layers) as captured:
        loss = _check_loss(loss_fn(model, batch))
    uses = [use for layer in layers for use in captured[layer]]
    # autograd's own weight gradients of the first batch, to compare with: a weight may be used where no hook sees it
    checked = [layer.weight for layer in layers] if layers[0].num_grads == 0 else []
    asked: list[Any] = [*(edge for _, edge in uses), *checked]
    grads = torch.autograd.grad(loss.float().sum(), asked, allow_unused=True)
    dys, weight_grads = grads[: len(uses)], grads[len(uses) :]
    _require_any(dys)
    samples = loss.shape[0] if loss.dim() else _batch_size(batch, uses[0][0].shape[0])
    scale = 1.0 if loss.dim() else float(samples)  # a mean loss: each sample's own gradient is B times its share
    padding = _attention_mask(batch)

    pieces: dict[PrunedLayer, list[tuple[Tensor, Tensor]]] = {layer: [] for layer in layers}
    owners = [layer for layer in layers for _ in captured[layer]]
    for layer, (x, _), dy in zip(owners, uses, dys, strict=True):
        if dy is not None:
            pieces[layer].append((x, dy))
    for layer, grad in zip(layers, weight_grads, strict=bool(checked)):
        _compare_with_autograd(layer, pieces[layer], grad)
    for layer in layers:
        pieces[layer] = [_tokens(layer, x, dy, scale, samples, padding) for x, dy in pieces[layer]]
    for layer in layers:
        _require_finite_products(layer, pieces[layer], index)
    _require_finite_loss(loss, index)
    count = min(samples, room)
    for layer in layers:
        _add_samples(layer, pieces[layer], count)
    return count


def _compare_with_autograd(layer: PrunedLayer, pieces: Sequence[tuple[Tensor, Tensor]], grad: Tensor | None) -> None:
    """Refuse a layer whose activations and output gradients do not make up its weight gradient."""
    wanted = torch.zeros_like(layer.weight, dtype=torch.float32) if grad is None else grad.float()
    total = torch.zeros_like(wanted)
    for x, dy in pieces:
        if x.shape[-1] == wanted.shape[1] and dy.shape[-1] == wanted.shape[0]:
            total += dy.reshape(-1, dy.shape[-1]).float().mT @ x.reshape(-1, x.shape[-1]).float()
    miss, size = float((total - wanted).norm()), float(wanted.norm())
    if miss > SELF_CHECK_TOLERANCE * size and math.isfinite(miss) and math.isfinite(size):
        raise ConfigError(
            f"{layer.name}: per-sample gradients do not add up to its gradient (relative difference "
            f"{miss / max(size, 1e-30):.2g}); "
            f"the weight is used outside of its module, or the module is no linear map. Fix: gradients='batch', "
            f"or ignore it"
        )


def _require_any(grads: Sequence[Tensor | None]) -> None:
    if all(grad is None for grad in grads):
        raise ConfigError("the loss reaches no selected layer; check targets, ignore and loss_fn")


def _batch_size(batch: Any, default: int) -> int:
    """Samples of a batch: the first dimension of its first tensor."""
    if isinstance(batch, Tensor):
        return batch.shape[0] if batch.dim() else default
    values = batch.values() if isinstance(batch, Mapping) else batch if isinstance(batch, (list, tuple)) else ()
    for value in values:
        if isinstance(value, Tensor) and value.dim():
            return value.shape[0]
    return default


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


def _tokens(
    layer: PrunedLayer, x: Tensor, dy: Tensor, scale: float, samples: int, padding: Tensor | None
) -> tuple[Tensor, Tensor]:
    """x [B, T, C] and dy [B, T, R] of one use, tokens outside the attention mask zeroed (whatever they hold)."""
    if x.shape[0] != samples:
        raise ShapeNotSupportedError(
            f"{layer.name}: input has {x.shape[0]} rows for {samples} samples; per-sample gradients need the "
            f"batch in the "
            f"first dimension. Fix: gradients='batch', or ignore this layer"
        )
    if scale != 1.0:
        dy = dy.float() * scale
    if padding is not None and x.dim() == 3 and padding.shape == x.shape[:2]:
        x, dy = x.masked_fill(~padding[..., None], 0.0), dy.masked_fill(~padding[..., None], 0.0)
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


def _require_finite_loss(loss: Tensor, batch: int) -> None:
    """After the layers, so that the first of them that is not finite gets named."""
    if not bool(torch.isfinite(loss).all()):
        raise NonFiniteGradientError(
            f"loss_fn gave NaN or Inf for batch {batch} while all gradients are finite; the Fisher is as it was "
            f"before this "
            f"batch. Fix: clean the data, or on_nonfinite='skip_batch'"
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

    def hook_of(layer: PrunedLayer) -> Callable[..., Tensor | None]:
        def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> Tensor | None:
            if not output.requires_grad:
                return None
            # The edge, not the tensor: a later in-place activation must not change what it stands for. A linear of a
            # 3-D input returns a view, and in-place changes of a view bypass its edge, hence the copy.
            output = output.clone()
            x = args[0] if args else kwargs["input"]
            captured[layer].append((x.detach(), get_gradient_edge(output)))
            return output

        return hook

    try:
        for layer in layers:
            handles.append(layer.module.register_forward_hook(hook_of(layer), with_kwargs=True))
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
