"""Which weight matrices of a model stay in float beside its quantized layers, and their share of the model."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass

from torch import Tensor, nn

from quant.quantizers.quant_params import QuantParams


@dataclass(frozen=True)
class FloatShare:
    """Numbers of weights in matrices, which are parameters with two or more axes.

    Tied parameters count once. Embeddings of tokens or positions are looked up, not multiplied, and counted separately.
    """

    left: dict[str, int]
    """Matrices in float: `name (class of the module that holds it)` -> number of weights."""
    quantized: int
    """Number of weights in quantized layers."""
    embeddings: int
    """Number of weights in embeddings."""

    @property
    def share(self) -> float:
        """Share of the matrices' weights that stays in float, 0 to 1."""
        left = sum(self.left.values())
        return left / (left + self.quantized) if left else 0.0

    def __str__(self) -> str:
        """Return a line such as `12 % of the weights in matrices stay in float: names`, the largest first."""
        largest = sorted(self.left, key=lambda name: -self.left[name])
        names = ", ".join(largest[:3]) + (f" and {len(largest) - 3} more" if len(largest) > 3 else "")
        share = 100 * self.share
        return f"{share:.{0 if share >= 1 else 2}f} % of the weights in matrices stay in float: {names}"


def float_share(model: nn.Module, layers: Collection[str]) -> FloatShare:
    """Count what stays in float if only `layers` (names of modules) are quantized."""
    modules = dict(model.named_modules())
    taken = {id(parameter): parameter for name in layers for parameter in _own_matrices(modules[name])}
    tables = [module for module in modules.values() if isinstance(module, nn.Embedding | nn.EmbeddingBag)]
    looked_up = {id(table.weight) for table in tables}
    left: dict[str, int] = {}
    seen = set(taken)
    embeddings = 0
    for name, holder, parameter in _matrices(model):
        if id(parameter) in seen:
            continue
        seen.add(id(parameter))
        if id(parameter) in looked_up or _spans_batch(parameter):
            embeddings += parameter.numel()
        else:
            left[f"{name} ({type(holder).__name__})"] = parameter.numel()
    return FloatShare(left, sum(parameter.numel() for parameter in taken.values()), embeddings)


def _matrices(model: nn.Module) -> Iterator[tuple[str, nn.Module, Tensor]]:
    """Yield (name, module that holds it, parameter), without the parameters of quantizers."""
    for prefix, module in model.named_modules():
        if not isinstance(module, QuantParams):
            for name, parameter in module.named_parameters(prefix, recurse=False):
                if parameter.dim() > 1 and name.rpartition(".")[2] != "bias":  # the biases of experts are a matrix, too
                    yield name, module, parameter


def _own_matrices(layer: nn.Module) -> Iterator[Tensor]:
    """Yield a layer's weight, or what a parametrization computes it from; not LoRA's matrices inside the layer."""
    if (weight := layer._parameters.get("weight")) is not None:
        yield weight
    else:
        yield from (parameter for name, _, parameter in _matrices(layer) if "weight" in name)


def _spans_batch(parameter: Tensor) -> bool:
    """Whether the parameter is added to every example, as position embeddings are: (1, ...) with 3 or more axes."""
    return parameter.dim() > 2 and parameter.shape[0] == 1
