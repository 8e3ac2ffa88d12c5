"""Which of a model's matrices stay in float beside its quantized layers, and how much of it they are."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass

from torch import Tensor, nn

from quant.quantizers.quant_params import QuantParams


@dataclass(frozen=True)
class FloatShare:
    """What stays in float of the weights that stand in matrices: parameters with two axes or more.

    Tied parameters count once. Tables that are looked up, of tokens or of positions, are no factors of a product: they
    are counted apart.
    """

    left: dict[str, int]
    """`name (class of the module that holds it)` -> number of weights"""
    quantized: int
    """weights of the quantized layers"""
    embeddings: int
    """weights in tables"""

    @property
    def share(self) -> float:
        """The part of the matrices' weights that stays in float, 0 to 1."""
        left = sum(self.left.values())
        return left / (left + self.quantized) if left else 0.0

    def __str__(self) -> str:
        """`12 % of the weights in matrices stay in float: names, the largest first`."""
        largest = sorted(self.left, key=lambda name: -self.left[name])
        names = ", ".join(largest[:3]) + (f" and {len(largest) - 3} more" if len(largest) > 3 else "")
        share = 100 * self.share
        return f"{share:.{0 if share >= 1 else 2}f} % of the weights in matrices stay in float: {names}"


def float_share(model: nn.Module, layers: Collection[str]) -> FloatShare:
    """What stays in float where only `layers` (names of modules) are quantized."""
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
    """(name, module that holds it, parameter); what quantizers have learned is none of the model's weights."""
    for prefix, module in model.named_modules():
        if not isinstance(module, QuantParams):
            for name, parameter in module.named_parameters(prefix, recurse=False):
                if parameter.dim() > 1 and name.rpartition(".")[2] != "bias":  # those of experts are a matrix
                    yield name, module, parameter


def _own_matrices(layer: nn.Module) -> Iterator[Tensor]:
    """A layer's weight, or what a parametrization computes it from; not what it holds beside (LoRA's matrices)."""
    if (weight := layer._parameters.get("weight")) is not None:
        yield weight
    else:
        yield from (parameter for name, _, parameter in _matrices(layer) if "weight" in name)


def _spans_batch(parameter: Tensor) -> bool:
    """Whether it is added to every example, as positions are: a first axis of one before two more."""
    return parameter.dim() > 2 and parameter.shape[0] == 1
