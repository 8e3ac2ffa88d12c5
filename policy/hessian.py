"""Curvature of the loss in each layer's weight: Hessian traces (Hutchinson) and top eigenvalues (power iteration).

Sources: HAWQ-V2 (arXiv 1911.03852) for traces, Q-BERT (arXiv 1909.05840) for eigenvalues over draws of the data.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from statistics import fmean, pstdev, stdev
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.utils.parametrize import is_parametrized

from quant.errors import UserError
from quant.module_utils import evaluating

Loss = Callable[[nn.Module, Any], Tensor]
"""(model, batch) -> mean loss of the batch, scalar."""

MOST_DRAWS = 50
"""Largest number of random vectors per trace."""
MIN_DRAWS = 8
"""Draws before a standard error is used: two draws may agree by chance."""


@dataclass(frozen=True)
class TraceEstimate:
    """Trace of one layer's Hessian block; it can be negative away from a minimum, or by chance."""

    trace: float
    error: float
    """Standard error over the draws."""
    draws: int


@dataclass(frozen=True)
class EigenEstimate:
    """Eigenvalue of the largest magnitude of one layer's Hessian block, over draws of the data."""

    mean: float
    spread: float
    """Standard deviation over the batches, 0 for one batch."""
    residual: float
    """Largest final |Hv - lambda v| / |lambda| of the power iterations: a bound on the relative error."""

    @property
    def score(self) -> float:
        """Q-BERT's sensitivity: |mean| + spread."""
        return abs(self.mean) + self.spread


def hessian_traces(
    model: nn.Module,
    layers: Mapping[str, nn.Module],
    batches: Sequence[Any],
    loss: Loss,
    *,
    max_draws: int = MOST_DRAWS,
    tolerance: float = 0.1,
    generator: torch.Generator | None = None,
    jointly: bool = False,
) -> dict[str, TraceEstimate]:
    """Estimate the trace of the Hessian of the mean loss in each layer's weight, by Hutchinson's estimator.

    A draw is the mean over all batches of v'Hv, with new Rademacher vectors v for each batch. Source: HAWQ-V2, arXiv
    1911.03852.

    Args:
        model: model whose layers are `layers`.
        layers: name -> module with a parameter `weight`; quantized layers must run in float (`quant.convert.in_float`).
        batches: batches of data.
        loss: (model, batch) -> mean loss, scalar.
        max_draws: largest number of draws per layer.
        tolerance: a layer is finished once the standard error is at most this share of its trace.
        generator: source of the vectors, on the CPU.
        jointly: one double backward per batch serves all layers, with v on all of them at once. The mean of v'Hv is
            the same, because the cross terms have mean zero. Their variance, 2 * the squared entries of H outside the
            block, is added, so more draws are needed. Otherwise every layer takes a double backward of its own.

    Returns:
        Name -> trace with its standard error.

    Raises:
        ValueError: without batches, or for fewer than 2 draws, which a standard error needs.
    """
    if not batches or max_draws < 2:
        raise ValueError(f"a trace needs at least 1 batch and 2 draws, got {len(batches)} and max_draws={max_draws}")
    generator = torch.Generator().manual_seed(0) if generator is None else generator
    samples: dict[str, list[float]] = {name: [] for name in layers}
    open_layers = list(layers)
    for draw in range(1, max_draws + 1):
        totals = dict.fromkeys(open_layers, 0.0)
        for batch in batches:
            with gradients(model, {name: layers[name] for name in open_layers}, batch, loss) as blocks:
                vectors = {name: _rademacher(block.weight, generator) for name, block in blocks.items()}
                products = _joint_products(blocks, vectors) if jointly else _block_products(blocks, vectors)
                for name, product in products:
                    totals[name] += float((vectors[name] * product).sum(dtype=torch.float64)) / len(batches)
        for name, value in totals.items():
            samples[name].append(value)
        if draw >= min(MIN_DRAWS, max_draws):
            estimates = {name: _estimate(samples[name]) for name in open_layers}
            open_layers = [name for name, e in estimates.items() if e.error > tolerance * abs(e.trace)]
        if not open_layers:
            break
    return {name: _estimate(values) for name, values in samples.items()}


def top_eigenvalues(
    model: nn.Module,
    layers: Mapping[str, nn.Module],
    batches: Sequence[Any],
    loss: Loss,
    *,
    max_iterations: int = 50,
    tolerance: float = 0.01,
    generator: torch.Generator | None = None,
) -> dict[str, EigenEstimate]:
    """Estimate the eigenvalue of the largest magnitude of each layer's Hessian block by power iteration, per batch.

    Source: Q-BERT, arXiv 1909.05840.

    Args:
        model: model whose layers are `layers`.
        layers: as in `hessian_traces`.
        batches: batches of data.
        loss: (model, batch) -> mean loss, scalar.
        max_iterations: largest number of iterations per layer and batch.
        tolerance: an iteration ends at |Hv - lambda v| <= tolerance * |lambda|, so that an eigenvalue is that near.
        generator: source of the starting vectors, on the CPU.

    Returns:
        Name -> mean and spread over the batches.

    Raises:
        ValueError: without batches.
    """
    if not batches:
        raise ValueError("eigenvalues need at least 1 batch, got 0")
    generator = torch.Generator().manual_seed(0) if generator is None else generator
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in layers}
    for batch in batches:
        with gradients(model, layers, batch, loss) as blocks:
            for name, block in blocks.items():
                found[name].append(_power_iteration(block, max_iterations, tolerance, generator))
    return {
        name: EigenEstimate(fmean(v for v, _ in pairs), pstdev(v for v, _ in pairs), max(r for _, r in pairs))
        for name, pairs in found.items()
    }


@dataclass(frozen=True)
class Block:
    """A layer's weight and the gradient of the loss in it, attached to its graph."""

    weight: Tensor
    gradient: Tensor

    def product(self, vector: Tensor) -> Tensor:
        """Multiply the Hessian block by a vector shaped like the weight, by double backward."""
        if not self.gradient.requires_grad:  # the loss is linear in this weight, or does not depend on it
            return torch.zeros_like(self.weight)
        return torch.autograd.grad(
            self.gradient, self.weight, vector, retain_graph=True, allow_unused=True, materialize_grads=True
        )[0]


@contextmanager
def gradients(model: nn.Module, layers: Mapping[str, nn.Module], batch: Any, loss: Loss) -> Iterator[dict[str, Block]]:
    """Compute the layers' `Block`s for one batch, in eval mode, with an attention kernel that has second derivatives.

    Inside the context only these weights require gradients. Weights that several layers share are the same block under
    each name.
    """
    wanted = {parameter: parameter.requires_grad for parameter in model.parameters()}
    model.requires_grad_(False)
    try:
        with evaluating(model), held_weights(layers) as weights, torch.enable_grad(), sdpa_kernel(SDPBackend.MATH):
            for weight in weights.values():
                weight.requires_grad_(True)
            grads = torch.autograd.grad(
                loss(model, batch), list(weights.values()), create_graph=True, allow_unused=True, materialize_grads=True
            )
            yield {
                name: Block(weight, gradient) for (name, weight), gradient in zip(weights.items(), grads, strict=True)
            }
    finally:
        for parameter, before in wanted.items():
            parameter.requires_grad_(before)


@contextmanager
def held_weights(layers: Mapping[str, nn.Module]) -> Iterator[dict[str, Tensor]]:
    """Fix the weights of layers that compute them (weight norm), so that gradients in them exist.

    Yields every layer's weight. Raises UserError for a layer whose weight cannot be fixed.
    """
    weights: dict[str, Any] = {name: layer.weight for name, layer in layers.items()}
    with ExitStack() as stack:
        for name, layer in layers.items():
            if not isinstance(weights[name], nn.Parameter):
                weights[name] = weights[name].detach().requires_grad_(True)
                _hold(name, layer, weights[name], stack)
        yield weights


def _hold(name: str, layer: Any, weight: Tensor, stack: ExitStack) -> None:
    """Make a layer use this weight until `stack` is closed."""
    if is_parametrized(layer, "weight"):
        # Not torch's cache, which mistakes a copy of a layer for the layer itself.
        stack.enter_context(layer.parametrizations.weight.register_forward_hook(lambda *_: weight))
    elif "weight" in vars(layer) or "weight" in layer._buffers:
        # A plain tensor, as torch.nn.utils.weight_norm sets before every forward.
        stack.callback(setattr, layer, "weight", layer.weight)
        layer.weight = weight
        stack.enter_context(layer.register_forward_pre_hook(lambda *_: setattr(layer, "weight", weight)))
    else:
        raise UserError(
            f"layer {name}: its weight is computed in a way in which the loss cannot be differentiated by it"
        )


def _block_products(blocks: Mapping[str, Block], vectors: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    for name, block in blocks.items():
        yield name, block.product(vectors[name])


def _joint_products(blocks: Mapping[str, Block], vectors: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """Yield the Hv of each layer, with v on all layers at once."""
    curved = {name: block for name, block in blocks.items() if block.gradient.requires_grad}
    products: dict[str, Tensor] = {}
    if curved:
        grads = torch.autograd.grad(
            [block.gradient for block in curved.values()],
            [block.weight for block in curved.values()],
            [vectors[name] for name in curved],
            allow_unused=True,
            materialize_grads=True,
        )
        products = dict(zip(curved, grads, strict=True))
    for name, block in blocks.items():
        yield name, products.get(name, torch.zeros_like(block.weight))


def _rademacher(weight: Tensor, generator: torch.Generator) -> Tensor:
    """Draw +1 and -1, shaped and placed like the weight; on the CPU, so that every device gets the same."""
    signs = torch.randint(0, 2, weight.shape, generator=generator) * 2 - 1
    return signs.to(weight.device, weight.dtype)


def _estimate(samples: Sequence[float]) -> TraceEstimate:
    return TraceEstimate(fmean(samples), stdev(samples) / math.sqrt(len(samples)), len(samples))


def _power_iteration(
    block: Block, max_iterations: int, tolerance: float, generator: torch.Generator
) -> tuple[float, float]:
    """Return (eigenvalue, relative residual)."""
    vector = torch.randn(block.weight.shape, generator=generator).to(block.weight.device, block.weight.dtype)
    eigenvalue, residual = 0.0, 0.0
    for _ in range(max_iterations):
        vector = vector / torch.linalg.vector_norm(vector)
        product = block.product(vector)
        eigenvalue = float((vector * product).sum())
        if not product.any():
            return 0.0, 0.0
        rest = float(torch.linalg.vector_norm(product - eigenvalue * vector))
        residual = rest / abs(eigenvalue) if eigenvalue else math.inf
        if residual <= tolerance:
            break
        vector = product
    return eigenvalue, residual
