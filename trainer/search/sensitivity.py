"""Sensitivity: the loss of quality from each single decision, and the policy prior that follows it."""

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
from policy.solve import Table
from policy.space import SearchSpace
from quant.convert import in_float, set_formats
from quant.formats import FLOAT, Format, has_channel_scales
from quant.module_utils import evaluating, examples_of
from quant.quant_module import QuantModule
from quant.quantizers.prefix_cache import prefix_cached
from trainer.search.measured_pairs import measured_pairs
from trainer.training.batch_norm import statistics_of_batch
from trainer.training.progress import Listener, unheard

PRIOR_ENTROPY = 0.2
"""Entropy of the starting policy relative to a uniform one: it mostly follows the measurement and still explores."""

MEASURING = "measuring"
"""Name of the phase in progress reports."""

EIGEN_STEPS = 20
"""Power iterations per layer. They only rank layers, for which a tenth of an eigenvalue makes no difference."""


@dataclass(frozen=True)
class Sensitivity:
    """Degradation from one decision at a time, all others in float, on the same batches."""

    mean: Table
    """Mean over the compared values, in their unit."""
    error: Table
    """Standard error of the mean."""


@torch.no_grad()
def measure_sensitivity(
    model: nn.Module,
    modules: Mapping[str, QuantModule],
    space: SearchSpace,
    batches: Sequence[Mapping[str, Any]],
    observe: Callable[[nn.Module, Any], Any],
    compare: Callable[[Any, Any], Tensor],
    tell: Listener = unheard,
    first_order: Table | None = None,
) -> Sensitivity:
    """Measure every decision in each of its choices, in decisions x choices forward passes per batch.

    Mixes of formats within a layer, and wide formats beside `first_order`, take fewer: `trainer.search.measured_pairs`.

    The model runs in eval mode, batch norms on the statistics of the batch. Its mode and formats are restored.

    Args:
        model: model whose layers are `modules`.
        modules: layer name -> quantized layer.
        space: decisions and their choices.
        batches: batches of held-out data.
        observe: (model, batch) -> what is compared, such as the loss or the logits.
        compare: (observed in float, observed now) -> degradation: one value for the batch, as `increase`, or one per
            example, as `divergence`.
        tell: listener of the progress.
        first_order: estimates such as `fisher_sensitivity`, (decisions, choices); None: every choice is measured.
    """
    observed = []
    decisions, work = len(space.decisions), layers_run(modules, space)
    total = int(work.sum()) * len(batches)
    noun = "layers" if all(len(decision.layers) == 1 for decision in space.decisions) else "groups of layers"
    examples = sum(map(examples_of, batches))
    estimates = [None] * decisions if first_order is None else list(first_order)
    plans = [measured_pairs(decision.choices, own) for decision, own in zip(space.decisions, estimates, strict=True)]
    most = max(len(plan.pairs) for plan in plans)
    tell(MEASURING, 0, total, f"{decisions} {noun} in {most} formats on {examples} examples")
    with evaluating(model):
        for number, batch in enumerate(batches):
            changes: list[list[Tensor]] = [[] for _ in space.decisions]
            with in_float(modules), statistics_of_batch(model, batch), prefix_cached(modules) as cache:
                reference = observe(model, batch)
                for d, decision in enumerate(space.decisions):
                    for formats in plans[d].pairs:
                        set_formats(modules, dict.fromkeys(decision.layers, formats))
                        cache.restart()
                        changes[d].append(compare(reference, observe(model, batch)).view(-1))
                    set_formats(modules, dict.fromkeys(decision.layers, (FLOAT, FLOAT)))
                    of_batches = f", batch {number + 1} of {len(batches)}" if len(batches) > 1 else ""
                    done = number * int(work.sum()) + int(work[: d + 1].sum())
                    tell(MEASURING, done, total, f"{noun} {d + 1} of {decisions}{of_batches}")
            measured = [np.array([own.double().cpu().numpy() for own in row]) for row in changes]
            observed.append(np.array([plan.shares @ own for plan, own in zip(plans, measured, strict=True)]))
    values = np.concatenate(observed, axis=-1)
    mean, count = values.mean(axis=-1), values.shape[-1]
    return Sensitivity(mean, values.std(axis=-1, ddof=1) / np.sqrt(count) if count > 1 else np.zeros_like(mean))


def layers_run(modules: Mapping[str, QuantModule], space: SearchSpace) -> NDArray[np.int64]:
    """Return the layers that a pass runs for each decision: those before its first one come from the prefix cache.

    They are counted in the order of the modules; progress that counts decisions would promise twice the time.
    """
    place = {name: place for place, name in enumerate(modules)}
    return np.array([len(place) - min(place[layer] for layer in decision.layers) for decision in space.decisions])


def increase(reference: Tensor, now: Tensor) -> Tensor:
    """Return the increase of a scalar such as a loss, float64 0-d."""
    return now.double() - reference.double()


def fisher_sensitivity(
    model: nn.Module,
    modules: Mapping[str, QuantModule],
    space: SearchSpace,
    batches: Sequence[Mapping[str, Any]],
    loss: Any,
) -> Table:
    """Estimate the sensitivity to first order: squared gradient x squared change of a layer's output, summed.

    One forward and one backward pass per batch; each layer also computes its own output in every choice, from its
    float input. Source: the score of NVIDIA Model Optimizer's gradient-based auto_quantize.

    Args:
        model: model whose layers are `modules`.
        modules: layer name -> quantized layer.
        space: decisions and their choices.
        batches: batches of held-out data.
        loss: (model, batch) -> mean loss, scalar.

    Returns:
        Mean over the examples, float64 (decisions, choices).
    """
    choices = {layer: decision.choices for decision in space.decisions for layer in decision.layers}
    found = _squared_changes(model, modules, choices, batches, loss, lambda name, change: change.sum())
    scores = {name: own.cpu().numpy() for name, own in found.items()}
    nothing = np.zeros(space.num_choices)
    return np.array([sum(scores.get(layer, nothing) for layer in d.layers) for d in space.decisions]) / len(batches)


def channel_sensitivity(
    model: nn.Module, modules: Mapping[str, QuantModule], batches: Sequence[Mapping[str, Any]], loss: Any
) -> dict[str, Tensor]:
    """Estimate what rounding the weights of each output channel costs: `fisher_sensitivity`, kept apart by channel.

    A channel's score is the squared gradient of the loss w.r.t. its output x the squared change of that output when its
    weights take the narrowest prepared format, summed over positions; inputs are in float.

    Args:
        model: model whose layers are `modules`.
        modules: layer name -> quantized layer, with a scale for each output channel.
        batches: batches of training data.
        loss: (model, batch) -> mean loss, scalar.

    Returns:
        Layer name -> mean over the examples, float64 (channels,); without layers that no batch reaches.
    """
    pairs = {name: ((narrowest(module), FLOAT),) for name, module in modules.items()}

    def of_channels(name: str, change: Tensor) -> Tensor:
        axis = change.dim() + modules[name].input_reduction_dim  # outputs have their channels where inputs have them
        return change.sum([other for other in range(change.dim()) if other != axis])

    found = _squared_changes(model, modules, pairs, batches, loss, of_channels)
    return {name: own[0] / len(batches) for name, own in found.items()}


def narrowest(module: QuantModule) -> Format:
    """Return the format with the fewest bits that a layer's channels may have."""
    prepared = filter(has_channel_scales, module.weight_quantizer.prepared)
    return min(prepared, key=lambda format: (format.bits, format.name))


def _squared_changes(
    model: nn.Module,
    modules: Mapping[str, QuantModule],
    choices: Mapping[str, Sequence[tuple[Format, Format]]],
    batches: Sequence[Mapping[str, Any]],
    loss: Any,
    reduce: Callable[[str, Tensor], Tensor],
) -> dict[str, Tensor]:
    """Return squared gradient x squared change of the outputs of layers, reduced, mean over each batch's examples.

    Args:
        model: model whose layers are `modules`.
        modules: layer name -> quantized layer.
        choices: layer name -> its formats.
        batches: batches of data.
        loss: (model, batch) -> mean loss, scalar.
        reduce: (layer name, product with the shape of the layer's output) -> what is kept of it.

    Returns:
        Layer name -> float64 (choices, ...), summed over the batches; without layers that no batch reaches.
    """
    scores: dict[str, Tensor] = {}
    examples = 1

    def watch(name: str) -> Any:
        layer = modules[name]

        def hook(module: Any, inputs: Any, named: Any, output: Tensor) -> None:
            # A replaced layer shares its hooks with the new one, and some models still call the old one.
            if module is not layer or not output.requires_grad:
                return
            with torch.no_grad():
                changes = []
                for formats in choices[name]:
                    layer.set_formats(*formats)
                    changes.append((layer.forward(*inputs, **named) - output).square())
                layer.set_formats(FLOAT, FLOAT)

            def add(gradient: Tensor) -> None:
                squared = (gradient * examples).square()  # the gradient of each example's own loss
                own = torch.stack([reduce(name, squared * change).double() / examples for change in changes])
                scores[name] = scores[name] + own if name in scores else own

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
    return scores


@torch.no_grad()
def weight_errors(modules: Mapping[str, QuantModule], space: SearchSpace) -> dict[str, NDArray[np.float64]]:
    """Return the squared rounding error of each layer's weight: layer -> float64 (choices,)."""
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


def hessian_sensitivity(
    model: nn.Module,
    modules: Mapping[str, QuantModule],
    space: SearchSpace,
    batches: Sequence[Mapping[str, Any]],
    loss: Any,
    kind: str,
    seed: int,
) -> Table:
    """Estimate the sensitivity to second order: curvature of the loss in a weight x its squared rounding error.

    Neither method takes activations into account.

    Args:
        model: model whose layers are `modules`.
        modules: layer name -> quantized layer.
        space: decisions and their choices.
        batches: batches of held-out data.
        loss: (model, batch) -> mean loss, scalar.
        kind: 'hawq_v2' takes the mean diagonal of the layer's Hessian, Tr(H) / n, with negative ones as 0 (arXiv
            1911.03852); 'qbert' |mean| + standard deviation over the batches of its top eigenvalue (arXiv 1909.05840).
        seed: seed of the random vectors.

    Returns:
        float64 (decisions, choices).
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


def sensitivity_prior(sensitivity: Table, budget: Budget) -> tuple[Tensor, Tensor]:
    """Return policy logits that follow sensitivities, at an expected cost that meets the budget.

    The logits are -sensitivity / temperature - pressure x cost. The temperature gives the policy `PRIOR_ENTROPY` times
    the entropy of a uniform one: decisions with clearly different formats start decided, the others start open.

    Returns:
        The logits, and the part of them that is cost pressure, each float64 (decisions, choices).
    """
    temperature = prior_temperature(sensitivity, lambda logits: entropy(at_cost(logits, budget)[0]))
    logits, pressure = at_cost(-sensitivity / temperature, budget)
    return torch.from_numpy(logits), torch.from_numpy(-pressure)


def prior_temperature(sensitivity: Table, entropy_of: Callable[[Table], float]) -> float:
    """Return the temperature at which the logits -sensitivity / temperature have the entropy that `PRIOR_ENTROPY` asks.

    Args:
        sensitivity: degradation from each choice alone, (decisions, choices).
        entropy_of: logits -> entropy of the policy that starts from them.
    """
    spread = float(np.median(sensitivity.max(axis=1) - sensitivity.min(axis=1))) or 1.0
    wanted = PRIOR_ENTROPY * np.log(sensitivity.shape[1]) * len(sensitivity)
    coldest, hottest = spread * 1e-4, spread * 1e4
    for _ in range(60):  # entropy grows with the temperature
        temperature = np.sqrt(coldest * hottest)
        if entropy_of(-sensitivity / temperature) < wanted:
            coldest = temperature
        else:
            hottest = temperature
    return float(temperature)


def at_cost(logits: Table, budget: Budget) -> tuple[Table, Table]:
    """Subtract the cost pressure that lowers every expected cost to its limit; also return the pressure."""
    pressure = np.zeros_like(logits)
    for _ in range(1 if len(budget.tables) == 1 else 20):  # several limits take turns to converge
        for index, (costs, limit) in enumerate(zip(budget.tables, budget.limits, strict=True)):
            unit = costs / costs.sum(axis=0).max()
            low, high = 0.0, 1e6
            for _ in range(100):
                middle = (low + high) / 2
                if budget.expected_costs(softmax(logits - pressure - middle * unit))[index] > limit:
                    low = middle
                else:
                    high = middle
            pressure = pressure + high * unit
    return logits - pressure, pressure


def softmax(logits: Table) -> Table:
    """Return the probabilities of logits, (decisions, choices)."""
    weights = np.exp(logits - logits.max(axis=1, keepdims=True))
    return weights / weights.sum(axis=1, keepdims=True)


def entropy(logits: Table) -> float:
    """Return the entropy of logits, (decisions, choices), summed over decisions, in nats."""
    p = softmax(logits)
    return float(-(p * np.log(np.maximum(p, 1e-300))).sum())
