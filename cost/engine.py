"""Layers of a model as an engine sees them: their kind, their rows, and the formats that it stores them in."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

from torch import nn
from transformers.pytorch_utils import Conv1D

from cost.profile import channels_of, experts_of
from quant.engines.rules import UNQUANTIZED, Engine, Kind, Pair
from quant.quant_cache import QuantCache
from quant.quant_experts import ExpertLinear

RunsAs: TypeAlias = Callable[[str, Pair], Pair | None]
"""(layer, formats) -> the formats that an engine stores and runs it in; None if it has none that hold these."""


def layer_kind(layer: nn.Module) -> Kind:
    """Return what a layer, plain or quantized, is to an engine."""
    if isinstance(layer, nn.Conv1d | nn.Conv2d | nn.Conv3d):
        return "depthwise" if layer.groups == layer.in_channels > 1 else "conv"
    if isinstance(layer, QuantCache):
        return "cache"
    kinds: dict[type[nn.Module], Kind] = {nn.Embedding: "embedding", ExpertLinear: "experts", Conv1D: "conv1d"}
    return next((kind for base, kind in kinds.items() if isinstance(layer, base)), "linear")


def row_of(layer: nn.Module) -> int:
    """Return how many values a row of a layer's weight has, along which groups run."""
    weight: Any = layer.weight
    return int(weight.numel()) // (channels_of(layer) * experts_of(layer))


def stores(engine: Engine, layers: Mapping[str, nn.Module], per_token: bool) -> RunsAs:
    """Return a function that tells in which formats an engine stores and runs the layers.

    Args:
        engine: The engine.
        layers: Layers by name, plain or quantized. All other names are those of caches.
        per_token: Whether inputs have a range for each token.
    """
    kinds: dict[str, Kind] = {name: layer_kind(layer) for name, layer in layers.items()}
    rows = {name: None if kinds[name] == "cache" else row_of(layer) for name, layer in layers.items()}
    return lambda name, pair: engine.stored_as(kinds.get(name, "cache"), pair, per_token, rows.get(name))


def runnable(layers: Mapping[str, nn.Module], pairs: Sequence[Pair], stores: RunsAs) -> list[str]:
    """Return the layers that an engine runs quantized in one of some formats.

    A layer that shares its weight with one that it does not run so is left out with it.

    Args:
        layers: Layers by name, plain or quantized.
        pairs: The formats asked for.
        stores: The formats that the engine stores a layer in.
    """
    runs = {name for name in layers if any(stores(name, pair) not in (None, UNQUANTIZED) for pair in pairs)}
    shared = {id(layer.weight) for name, layer in layers.items() if name not in runs and hasattr(layer, "weight")}
    return [name for name, layer in layers.items() if name in runs and id(getattr(layer, "weight", None)) not in shared]
