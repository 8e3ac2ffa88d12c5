"""Measured sensitivity: what each single decision costs in quality, and the policy that believes it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from policy.budget import Budget
from policy.hessian import hessian_traces, top_eigenvalues
from policy.space import SearchSpace
from quant.convert import in_float, set_formats
from quant.formats import FLOAT
from quant.module_utils import evaluating, examples_of
from quant.quant_module import QuantModule
from quant.quantizers.prefix_cache import prefix_cached
from trainer.training.batch_norm import statistics_of_batch
from trainer.training.progress import Listener, unheard

Table = NDArray[np.float64]
"""(decisions, choices)"""

PRIOR_ENTROPY = 0.2
"""entropy of the starting policy as a share of a uniform one: it mostly follows the measurement, and still explores"""

MEASURING = "measuring"
"""what listeners hear of the measurements here"""

EIGEN_STEPS = 20
"""power iterations a layer: they rank layers, and a tenth of an eigenvalue changes no rank that matters"""


@dataclass(frozen=True)
class Sensitivity:
    """What one decision does to the outputs while all others are in float, on the same batches."""

    effect: Table
    """mean over what was compared, in its unit"""
    error: Table
    """its standard error"""


@torch.no_grad()
def measure_sensitivity(
    model: nn.Module,
    modules: Mapping[str, QuantModule],
    space: SearchSpace,
    batches: Sequence[Mapping[str, Any]],
    look: Callable[[nn.Module, Any], Any],
    compare: Callable[[Any, Any], Tensor],
    tell: Listener = unheard,
) -> Sensitivity:
    """Decisions x choices forward passes a batch. The model runs in eval mode, batch norms on the batch's
    statistics; its mode and formats come back.

    Args:
        look: (model, batch) -> what is seen of the model, such as its loss or its logits.
        compare: (seen in float, seen now) -> effects, one for the batch, as `increase`, or one for each example, as
            `divergence`.
        tell: hears of each decision that is measured.
    """
    seen = []
    decisions, total = len(space.decisions), len(space.decisions) * len(batches)
    noun = "layers" if all(len(decision.layers) == 1 for decision in space.decisions) else "groups of layers"
    examples = sum(map(examples_of, batches))
    tell(MEASURING, 0, total, f"{decisions} {noun} in {space.num_choices} formats on {examples} examples")
    with evaluating(model):
        for number, batch in enumerate(batches):
            effects: list[list[Tensor]] = [[] for _ in space.decisions]
            with in_float(modules), statistics_of_batch(model, batch), prefix_cached(modules) as cache:
                reference = look(model, batch)
                for d, decision in enumerate(space.decisions):
                    for formats in decision.choices:
                        set_formats(modules, dict.fromkeys(decision.layers, formats))
                        cache.restart()
                        effects[d].append(compare(reference, look(model, batch)).view(-1))
                    set_formats(modules, dict.fromkeys(decision.layers, (FLOAT, FLOAT)))
                    of_batches = f", batch {number + 1} of {len(batches)}" if len(batches) > 1 else ""
                    tell(MEASURING, number * decisions + d + 1, total, f"{noun} {d + 1} of {decisions}{of_batches}")
            seen.append(np.array([[own.double().cpu().numpy() for own in row] for row in effects]))
    values = np.concatenate(seen, axis=-1)
    mean, count = values.mean(axis=-1), values.shape[-1]
    return Sensitivity(mean, values.std(axis=-1, ddof=1) / np.sqrt(count) if count > 1 else np.zeros_like(mean))


def increase(reference: Tensor, now: Tensor) -> Tensor:
    """How much a scalar, such as a loss, has grown, float64 0-d."""
    return now.double() - reference.double()


def divergence(reference: Tensor, now: Tensor) -> Tensor:
    """KL(reference || now) >= 0 of each example, float32 (examples,) in nats, from logits (examples, classes).

    The loss of a well-trained model hangs on the few examples it gets wrong; in this, every example has a say.
    """
    before, after = reference.float().log_softmax(-1), now.float().log_softmax(-1)
    return (before.exp() * (before - after)).sum(-1).clamp(min=0)


def fisher_effect(
    model: nn.Module,
    modules: Mapping[str, QuantModule],
    space: SearchSpace,
    batches: Sequence[Mapping[str, Any]],
    loss: Any,
) -> Table:
    """First-order sensitivity, (decisions, choices): sum of squared gradient x squared change of a layer's output.

    One forward and one backward pass a batch; each layer also computes its own output in every choice, from its float
    input. Mean over examples. Source: the score of NVIDIA Model Optimizer's gradient-based auto_quantize.
    """
    scores = {name: np.zeros(space.num_choices) for name in modules}
    choices = {layer: decision.choices for decision in space.decisions for layer in decision.layers}
    examples = 1

    def watch(name: str) -> Any:
        layer = modules[name]

        def hook(module: Any, inputs: Any, named: Any, output: Tensor) -> None:
            # A layer that was replaced shares its hooks with the new one: a model that still calls it calls them.
            if module is not layer or not output.requires_grad:
                return
            with torch.no_grad():
                changes = []
                for formats in choices[name]:
                    layer.set_formats(*formats)
                    changes.append((layer.forward(*inputs, **named) - output).square())
                layer.set_formats(FLOAT, FLOAT)

            def add(gradient: Tensor) -> None:
                squared = (gradient * examples).square()  # of each example's own loss, not of their mean
                scores[name] += [float((squared * change).sum()) / examples for change in changes]

            output.register_hook(add)

        return hook

    handles = [modules[name].register_forward_hook(watch(name), with_kwargs=True) for name in choices]
    frozen = [m.weight for m in modules.values() if isinstance(m.weight, nn.Parameter) and not m.weight.requires_grad]
    try:
        for weight in frozen:
            weight.requires_grad_(True)
        with evaluating(model), in_float(modules), torch.enable_grad():
            for batch in batches:
                examples = examples_of(batch)
                loss(model, batch).backward()  # not autograd.grad, which recomputed activations forbid
                model.zero_grad()
    finally:
        for handle in handles:
            handle.remove()
        for weight in frozen:
            weight.requires_grad_(False)
    return np.array([sum(scores[layer] for layer in decision.layers) for decision in space.decisions]) / len(batches)


@torch.no_grad()
def weight_errors(modules: Mapping[str, QuantModule], space: SearchSpace) -> dict[str, NDArray[np.float64]]:
    """Layer -> squared error of its rounded weight in each choice, (choices,)."""
    errors = {}
    with in_float(modules):
        for decision in space.decisions:
            for layer in decision.layers:
                module = modules[layer]
                own = []
                for weight, _ in decision.choices:
                    module.set_formats(weight, FLOAT)
                    own.append(float((module.weight_quantizer(module.weight) - module.weight).square().sum()))
                errors[layer] = np.array(own)
    return errors


def hessian_effect(
    model: nn.Module,
    modules: Mapping[str, QuantModule],
    space: SearchSpace,
    batches: Sequence[Mapping[str, Any]],
    loss: Any,
    kind: str,
    seed: int,
) -> Table:
    """Second-order sensitivity, (decisions, choices): curvature of a layer's loss x squared error of its weight.

    Args:
        kind: 'hawq_v2': the mean diagonal of the layer's Hessian, Tr(H) / n, negative ones as 0 (arXiv 1911.03852);
            'qbert': |mean| + standard deviation over the batches of its top eigenvalue (arXiv 1909.05840).

    Activations do not enter: neither method sees them.
    """
    generator = torch.Generator().manual_seed(seed)
    layers = {layer: modules[layer] for decision in space.decisions for layer in decision.layers}
    with in_float(modules):
        if kind == "hawq_v2":
            traces = hessian_traces(model, layers, batches, loss, generator=generator, jointly=True)
            curvature = {name: max(t.trace, 0.0) / modules[name].weight.numel() for name, t in traces.items()}
        else:
            found = top_eigenvalues(model, layers, batches, loss, max_iterations=EIGEN_STEPS, generator=generator)
            curvature = {name: eigen.score for name, eigen in found.items()}
    errors = weight_errors(modules, space)
    return np.array(
        [sum(curvature[layer] * errors[layer] for layer in decision.layers) for decision in space.decisions]
    )


def believing_prior(effect: Table, budget: Budget) -> tuple[Tensor, Tensor]:
    """Policy logits that follow measured effects at an expected cost that meets the budget.

    The logits are -effect / temperature - pressure x cost. The temperature gives the policy `PRIOR_ENTROPY` of a
    uniform one's entropy: a decision whose formats differ clearly starts decided, one whose formats hardly differ
    starts open. Returns the logits and the part of them that is cost pressure, each float64 (decisions, choices).
    """
    spread = float(np.median(effect.max(axis=1) - effect.min(axis=1))) or 1.0
    wanted = PRIOR_ENTROPY * np.log(effect.shape[1]) * len(effect)
    coldest, hottest = spread * 1e-4, spread * 1e4
    for _ in range(60):  # entropy grows with the temperature
        temperature = np.sqrt(coldest * hottest)
        logits, pressure = _at_cost(-effect / temperature, budget)
        if _entropy(logits) < wanted:
            coldest = temperature
        else:
            hottest = temperature
    return torch.from_numpy(logits), torch.from_numpy(-pressure)


def _at_cost(logits: Table, budget: Budget) -> tuple[Table, Table]:
    """logits less the pressure of the costs that brings every expected cost down to its limit; and that pressure."""
    pressure = np.zeros_like(logits)
    for _ in range(1 if len(budget.tables) == 1 else 20):  # several limits take turns until none gives way any more
        for costs, limit in zip(budget.tables, budget.limits, strict=True):
            unit = costs / costs.sum(axis=0).max()
            low, high = 0.0, 1e6
            for _ in range(100):
                middle = (low + high) / 2
                if (_softmax(logits - pressure - middle * unit) * costs).sum() > limit:
                    low = middle
                else:
                    high = middle
            pressure = pressure + high * unit
    return logits - pressure, pressure


def _softmax(logits: Table) -> Table:
    weights = np.exp(logits - logits.max(axis=1, keepdims=True))
    return weights / weights.sum(axis=1, keepdims=True)


def _entropy(logits: Table) -> float:
    p = _softmax(logits)
    return float(-(p * np.log(np.maximum(p, 1e-300))).sum())
