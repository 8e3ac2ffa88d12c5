"""Measured sensitivity: what each single decision costs in quality, and the policy that believes it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from policy.space import SearchSpace
from quant.convert import in_float, set_formats
from quant.formats import FLOAT
from quant.quant_module import QuantModule

Table = NDArray[np.float64]
"""(decisions, choices)"""

PRIOR_ENTROPY = 0.2
"""entropy of the starting policy as a share of a uniform one: it mostly follows the measurement, and still explores"""


@dataclass(frozen=True)
class Sensitivity:
    """Loss with one decision quantized and all others in float, less the float model's loss, on the same batches."""

    effect: Table
    """mean over the batches, in the loss's unit"""
    error: Table
    """its standard error"""


@torch.no_grad()
def measure_sensitivity(
    model: nn.Module,
    modules: Mapping[str, QuantModule],
    space: SearchSpace,
    batches: Sequence[Mapping[str, Any]],
    loss: Any,
) -> Sensitivity:
    """Decisions x choices forward passes a batch. The model runs in eval mode; its mode and formats come back.

    Args:
        loss: (model, batch) -> scalar tensor, the mean loss of the batch.
    """
    training = model.training
    model.eval()
    losses = np.zeros((len(batches), len(space.decisions), space.num_choices))
    try:
        with in_float(modules):
            for index, batch in enumerate(batches):
                reference = float(loss(model, batch))
                for d, decision in enumerate(space.decisions):
                    for c, formats in enumerate(decision.choices):
                        set_formats(modules, dict.fromkeys(decision.layers, formats))
                        losses[index, d, c] = float(loss(model, batch)) - reference
                    set_formats(modules, dict.fromkeys(decision.layers, (FLOAT, FLOAT)))
    finally:
        model.train(training)
    error = losses.std(axis=0, ddof=1) / np.sqrt(len(batches)) if len(batches) > 1 else np.zeros_like(losses[0])
    return Sensitivity(losses.mean(axis=0), error)


def believing_prior(effect: Table, costs: Table, target: float) -> tuple[Tensor, Tensor]:
    """Policy logits that follow measured effects at an expected cost of `target`.

    The logits are -effect / temperature - pressure x cost. The temperature gives the policy `PRIOR_ENTROPY` of a
    uniform one's entropy: a decision whose formats differ clearly starts decided, one whose formats hardly differ
    starts open. Returns the logits and the part of them that is cost pressure, each float64 (decisions, choices).
    """
    spread = float(np.median(effect.max(axis=1) - effect.min(axis=1))) or 1.0
    wanted = PRIOR_ENTROPY * np.log(effect.shape[1]) * len(effect)
    coldest, hottest = spread * 1e-4, spread * 1e4
    for _ in range(60):  # entropy grows with the temperature
        temperature = np.sqrt(coldest * hottest)
        logits, pressure = _at_cost(-effect / temperature, costs, target)
        if _entropy(logits) < wanted:
            coldest = temperature
        else:
            hottest = temperature
    return torch.from_numpy(logits), torch.from_numpy(-pressure)


def _at_cost(logits: Table, costs: Table, target: float) -> tuple[Table, Table]:
    """logits less the multiple of the costs that brings the expected cost down to the target; and that multiple."""
    unit = costs / costs.sum(axis=0).max()
    low, high = 0.0, 1e6
    for _ in range(100):
        middle = (low + high) / 2
        if (_softmax(logits - middle * unit) * costs).sum() > target:
            low = middle
        else:
            high = middle
    return logits - high * unit, high * unit


def _softmax(logits: Table) -> Table:
    weights = np.exp(logits - logits.max(axis=1, keepdims=True))
    return weights / weights.sum(axis=1, keepdims=True)


def _entropy(logits: Table) -> float:
    p = _softmax(logits)
    return float(-(p * np.log(np.maximum(p, 1e-300))).sum())
