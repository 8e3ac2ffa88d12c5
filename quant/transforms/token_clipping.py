"""Token-Wise Clipping (Outlier Suppression, arXiv 2209.13325): one clipping ratio for all layers, then learned scales.

The coarse stage chooses the ratio for which quantized activations change the model's output least. The fine stage
minimizes the same loss: each tensor keeps the clipping only if that lowers the loss, then the scales are trained. The
decision per tensor is not part of the paper. Often only a few tensors need the ratio (such as GELU outputs), and the
others lose far more by it than training with a learning rate of 1e-5 can recover.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from quant.convert import in_float, observe_inputs, run_model, set_formats
from quant.errors import UserError
from quant.formats import FLOAT, Format
from quant.module_utils import evaluating
from quant.quant_module import QuantModule
from quant.quantizers.observers import token_observer
from quant.quantizers.quantizer import Quantizer

SPANS = {4: 0.9, 6: 0.3, 8: 0.1}
"""Bits of the activations -> how far below 1 the ratio is searched; interpolated between."""
LARGEST_STEP = 0.01
LEARNING_RATE = 1e-5
EPOCHS = 3


@dataclass(frozen=True)
class _OutputLoss:
    """The change of the model's output by activations in one format, as a function of their clipping."""

    model: nn.Module
    batches: Sequence[Any]
    targets: Sequence[Tensor]
    """Output of the float model on each batch, (n,)."""
    format: Format

    def __call__(self) -> float:
        return output_loss(self.model, self.batches, self.targets)

    def clip(self, quantizers: Sequence[Quantizer], ratio: float) -> None:
        for quantizer in quantizers:
            quantizer.token_quantiles[self.format.name] = ratio
            quantizer.set_ranges(token_observer(ratio), self.format)

    def minimize(
        self, quantizers: Sequence[Quantizer], ratios: Sequence[float], known: Mapping[float, float] | None = None
    ) -> tuple[float, float]:
        """Clip at the ratio with the least loss, the first one on ties.

        Args:
            quantizers: Those that clip.
            ratios: Ratios to try.
            known: Further ratios, whose losses are known.

        Returns:
            (ratio, loss).
        """
        losses = dict(known or {})
        for ratio in ratios:
            self.clip(quantizers, ratio)
            losses[ratio] = self()
        best = min(losses, key=lambda ratio: losses[ratio])
        self.clip(quantizers, best)
        return best, losses[best]


def clip_tokens(
    model: nn.Module, modules: Mapping[str, QuantModule], batches: Sequence[Any], format: Format, fine: bool = False
) -> float:
    """Set activation ranges by Token-Wise Clipping (arXiv 2209.13325).

    Layers whose observer is 'avg_prune_minmax' take part. Weights and all other activations run in float meanwhile;
    formats and modes are restored.

    Args:
        model: The quantized model.
        modules: Its quantized layers, by name.
        batches: Calibration data; they are run once to observe, and once for each ratio.
        format: Format of the activations.
        fine: For learned scales: also decide for each tensor alone whether to clip it, then train the scales (and
            learned offsets). The loss never increases.

    Returns:
        The clipping ratio, at most 1.
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
            loss = _OutputLoss(model, batches, [outputs(model, batch) for batch in batches], format)
            observe_inputs(model, modules, batches)
            set_formats(taking_part, dict.fromkeys(taking_part, (FLOAT, format)))
            ratio = _coarse(loss, quantizers)
            if fine:
                _fine(loss, quantizers, ratio)
    finally:
        for module in modules.values():
            for quantizer in module.activation_quantizers:
                quantizer.forget()
    return ratio


def ratios(bits: float, tokens: int) -> list[float]:
    """Return the ratios to try, in descending order from 1.

    Args:
        bits: Bits of the activations.
        tokens: Tokens in a batch; more tokens mean smaller steps.
    """
    span = float(np.interp(bits, list(SPANS), list(SPANS.values())))
    step = min(LARGEST_STEP, LARGEST_STEP * 128 * 32 / tokens)
    return [round(1 - step * i, 12) for i in range(math.floor(span / step + 1e-6) + 1)]


def _coarse(loss: _OutputLoss, quantizers: Sequence[Quantizer]) -> float:
    seen = [quantizer.observation for quantizer in quantizers if quantizer.observation is not None]
    if not seen:
        return 1.0
    tokens = max(len(batch.low) for observation in seen for batch in observation)
    return loss.minimize(quantizers, ratios(loss.format.bits, tokens))[0]


def _fine(loss: _OutputLoss, quantizers: Sequence[Quantizer], ratio: float) -> None:
    """Remove the clipping where that lowers the loss, then train scales and offsets."""
    name = loss.format.name
    params = [quantizer.grids[name] for quantizer in quantizers if name in quantizer.grids]
    learned = [parameter for one in params for parameter in one.parameters()]
    if not learned:
        return
    if ratio < 1:
        least = loss()
        for quantizer in quantizers:
            if quantizer.observation is not None:
                _, least = loss.minimize([quantizer], [1.0], {ratio: least})
    _train(loss, learned)


def _train(loss: _OutputLoss, learned: Sequence[nn.Parameter]) -> None:
    """Adam with a cosine schedule from LEARNING_RATE to 0; the parameters of the best epoch are kept."""
    model = loss.model
    wanted = {parameter: parameter.requires_grad for parameter in model.parameters()}
    best, least = [p.detach().clone() for p in learned], loss()
    optimizer = torch.optim.Adam(learned, lr=LEARNING_RATE)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, EPOCHS * len(loss.batches))
    model.requires_grad_(False)
    try:
        for parameter in learned:
            parameter.requires_grad_(True)
        for _ in range(EPOCHS):
            for batch, target in zip(loss.batches, loss.targets, strict=True):
                optimizer.zero_grad()
                with torch.enable_grad():
                    (model_output(model, batch) - target).square().sum().backward()
                optimizer.step()
                schedule.step()
            if (now := loss()) < least:
                best, least = [p.detach().clone() for p in learned], now
    finally:
        with torch.no_grad():
            for parameter, value in zip(learned, best, strict=True):
                parameter.copy_(value)
        for parameter, before in wanted.items():
            parameter.requires_grad_(before)
            parameter.grad = None


@torch.no_grad()
def output_loss(model: nn.Module, batches: Sequence[Any], targets: Sequence[Tensor]) -> float:
    """Return the sum of squared differences between the model's outputs and the targets.

    Args:
        model: The model.
        batches: Its inputs.
        targets: Float (n,) for each batch, as `model_output` returns it.
    """
    pairs = zip(batches, targets, strict=True)
    return sum(float((model_output(model, batch) - target).double().square().sum()) for batch, target in pairs)


@torch.no_grad()
def outputs(model: nn.Module, batch: Any) -> Tensor:
    """Return `model_output` without gradients, float (n,)."""
    return model_output(model, batch)


def model_output(model: nn.Module, batch: Any) -> Tensor:
    """Return the model's output as one vector.

    Args:
        model: The model.
        batch: Its input.

    Returns:
        Float (n,): all logits, flattened; if the output has none, everything but the loss.

    Raises:
        UserError: If the output holds no floating-point tensor.
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
