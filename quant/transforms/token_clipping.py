"""Token-Wise Clipping (Outlier Suppression, arXiv 2209.13325): one clipping ratio for all layers, then learned scales.

Coarse: of the ratios r, the one under which quantized activations change the model's output least. Fine: on the same
loss, each tensor keeps the clipping only if that pays, and the scales found are trained. The first of the two is ours:
often a few tensors need the ratio (GELU outputs, say) and the others suffer from it, by far more than steps of 1e-5
can mend.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from quant.convert import in_float, observe_inputs, run_model, set_formats
from quant.errors import UserError
from quant.formats import FLOAT, Format
from quant.modes import evaluating
from quant.quant_module import QuantModule
from quant.quantizers.observers import token_observer
from quant.quantizers.quant_params import Grid
from quant.quantizers.quantizer import Quantizer

SPANS = {4: 0.9, 6: 0.3, 8: 0.1}
"""bits of the activations -> how far below 1 the ratio is searched"""
LARGEST_STEP = 0.01
LEARNING_RATE = 1e-5
EPOCHS = 3


def clip_tokens(
    model: nn.Module, modules: Mapping[str, QuantModule], batches: Sequence[Any], format: Format, fine: bool = False
) -> float:
    """Set the activation ranges of `format` by Token-Wise Clipping; returns the ratio chosen, at most 1.

    Layers whose observer is 'avg_prune_minmax' take part. Weights and all other activations are in float meanwhile;
    formats and modes come back after.

    Args:
        batches: calibration data; they are run once to observe, and once for each ratio.
        fine: where scales are learned, also ask of each tensor alone whether to clip it, then train the scales (and
            learned offsets); the loss is never worse than before.
    """
    taking_part = {n: m for n, m in modules.items() if m.input_quantizer.config.observer == "avg_prune_minmax"}
    quantizers = [
        quantizer
        for module in taking_part.values()
        for quantizer in module.activation_quantizers
        if quantizer.config.observer == "avg_prune_minmax"
    ]
    try:
        with evaluating(model), in_float(modules):
            for quantizer in quantizers:
                quantizer.prepare(format)
            targets = [outputs(model, batch) for batch in batches]
            observe_inputs(model, modules, batches)
            ratio = _coarse(model, taking_part, quantizers, batches, targets, format)
            if fine:
                set_formats(taking_part, dict.fromkeys(taking_part, (FLOAT, format)))
                _fine(model, quantizers, batches, targets, format, ratio)
    finally:
        for module in modules.values():
            for quantizer in module.activation_quantizers:
                quantizer.forget()
    return ratio


def ratios(bits: float, tokens: int) -> list[float]:
    """The ratios to try for activations of `bits` bits and batches of `tokens` tokens, from 1 down."""
    span = float(np.interp(bits, list(SPANS), list(SPANS.values())))
    step = min(LARGEST_STEP, LARGEST_STEP * 128 * 32 / tokens)
    return [round(1 - step * i, 12) for i in range(math.floor(span / step + 1e-6) + 1)]


def _coarse(
    model: nn.Module,
    modules: Mapping[str, QuantModule],
    quantizers: Sequence[Quantizer],
    batches: Sequence[Any],
    targets: Sequence[Tensor],
    format: Format,
) -> float:
    seen = [quantizer.observation for quantizer in quantizers if quantizer.observation is not None]
    if not seen:
        return 1.0
    tokens = max(len(batch.low) for observation in seen for batch in observation)
    set_formats(modules, dict.fromkeys(modules, (FLOAT, format)))
    losses = {}
    for ratio in ratios(format.bits, tokens):
        _clip(quantizers, ratio, format)
        losses[ratio] = output_loss(model, batches, targets)
    best = min(losses, key=lambda ratio: losses[ratio])
    _clip(quantizers, best, format)
    return best


def _clip(quantizers: Sequence[Quantizer], ratio: float, format: Format) -> None:
    for quantizer in quantizers:
        quantizer.token_quantiles[format.name] = ratio
        quantizer.set_ranges(token_observer(ratio), format)


def _unclip(
    model: nn.Module,
    quantizers: Sequence[Quantizer],
    batches: Sequence[Any],
    targets: Sequence[Tensor],
    format: Format,
    ratio: float,
) -> None:
    """Take the clipping back, tensor by tensor in the order of the layers, wherever the loss falls by that."""
    least = output_loss(model, batches, targets)
    for quantizer in quantizers:
        if quantizer.observation is None:
            continue
        _clip([quantizer], 1.0, format)
        loss = output_loss(model, batches, targets)
        if loss < least:
            least = loss
        else:
            _clip([quantizer], ratio, format)


def _fine(
    model: nn.Module,
    quantizers: Sequence[Quantizer],
    batches: Sequence[Any],
    targets: Sequence[Tensor],
    format: Format,
    ratio: float,
) -> None:
    """Each tensor's own clipping; then Adam on scales and offsets, the learning rate falling to 0 along a cosine.

    The best epoch's values stay.
    """
    grids = [cast(Grid, quantizer.grids[format.name]) for quantizer in quantizers if format.name in quantizer.grids]
    learned = [parameter for grid in grids for parameter in grid.parameters()]
    if not learned:
        return
    if ratio < 1:
        _unclip(model, quantizers, batches, targets, format, ratio)
    wanted = {parameter: parameter.requires_grad for parameter in model.parameters()}
    best, least = [p.detach().clone() for p in learned], output_loss(model, batches, targets)
    optimizer = torch.optim.Adam(learned, lr=LEARNING_RATE)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, EPOCHS * len(batches))
    model.requires_grad_(False)
    try:
        for parameter in learned:
            parameter.requires_grad_(True)
        for _ in range(EPOCHS):
            for batch, target in zip(batches, targets, strict=True):
                optimizer.zero_grad()
                with torch.enable_grad():
                    (model_output(model, batch) - target).square().sum().backward()
                optimizer.step()
                schedule.step()
            if (loss := output_loss(model, batches, targets)) < least:
                best, least = [p.detach().clone() for p in learned], loss
    finally:
        with torch.no_grad():
            for parameter, value in zip(learned, best, strict=True):
                parameter.copy_(value)
        for parameter, before in wanted.items():
            parameter.requires_grad_(before)
            parameter.grad = None


@torch.no_grad()
def output_loss(model: nn.Module, batches: Sequence[Any], targets: Sequence[Tensor]) -> float:
    """Sum of the squared differences between the model's outputs and the targets."""
    pairs = zip(batches, targets, strict=True)
    return sum(float((model_output(model, batch) - target).double().square().sum()) for batch, target in pairs)


@torch.no_grad()
def outputs(model: nn.Module, batch: Any) -> Tensor:
    """`model_output` without a graph."""
    return model_output(model, batch)


def model_output(model: nn.Module, batch: Any) -> Tensor:
    """What the model says about a batch, as float (n,): all its logits; without any, all it returns but the loss.

    Raises UserError where that holds no floating-point tensor.
    """
    output = run_model(model, batch)
    if isinstance(output, Mapping):
        logits = {key: value for key, value in output.items() if "logits" in key}
        output = logits or {key: value for key, value in output.items() if "loss" not in key}
    parts = [part for part in tree_leaves(output) if _is_float(part)]
    if not parts:
        raise UserError(f"{type(model).__name__} returns no floating-point tensor that its quantization could change")
    return torch.cat([part.float().flatten() for part in parts])


def _is_float(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()
