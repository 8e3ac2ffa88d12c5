"""Layers that share a weight: it has one format, one scale, and is stored once in every file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import nn
from transformers.pytorch_utils import Conv1D

from quant.quant_module import QuantModule


def tied_layers(layers: Mapping[str, nn.Module]) -> dict[str, str]:
    """Find layers that share a weight.

    A Linear and a Conv1D of transformers never count as tied: their output channels are different axes.

    Args:
        layers: Layers by name.

    Returns:
        Each layer whose weight belongs to an earlier one -> the first layer with that weight.
    """
    first: dict[tuple[int, bool], str] = {}
    tied = {}
    for name, layer in layers.items():
        weight = layer._parameters.get("weight")
        if weight is None:
            continue
        owner = first.setdefault((id(weight), isinstance(layer, Conv1D)), name)
        if owner != name:
            tied[name] = owner
    return tied


def tied_groups(tied: Mapping[str, str | None]) -> list[list[str]]:
    """Return lists of layers that share a weight.

    Args:
        tied: Layer -> the first layer with its weight, as from `tied_layers`; None: not tied.
    """
    groups: dict[str, list[str]] = {}
    for name, owner in tied.items():
        if owner is not None:
            groups.setdefault(owner, [owner]).append(name)
    return list(groups.values())


def share_quantizers(model: nn.Module) -> None:
    """Give quantized layers that share a weight the weight quantizer of the first of them."""
    modules = {name: module for name, module in model.named_modules() if isinstance(module, QuantModule)}
    for name, owner in tied_layers(modules).items():
        own, shared = modules[name].weight_quantizer, modules[owner].weight_quantizer
        if own is not shared and (own.config, own.shape) == (shared.config, shared.shape):
            for format in own.prepared:
                shared.prepare(format)
            modules[name].weight_quantizer = shared


def stored_with(modules: Mapping[str, QuantModule]) -> dict[str, str]:
    """Return each layer that shares weight and weight quantizer with an earlier one -> the first of these."""
    tied = tied_layers(modules)
    same = {n: modules[n].weight_quantizer is modules[owner].weight_quantizer for n, owner in tied.items()}
    return {name: owner for name, owner in tied.items() if same[name]}


def differing(tied: Mapping[str, str], weights: Mapping[str, object]) -> Sequence[str]:
    """Find tied layers with different values.

    Args:
        tied: What `tied_layers` returned.
        weights: Layer -> value, such as its weight format.

    Returns:
        The first layer that differs from its weight's owner, and the owner; empty if there is none.
    """
    return next(([n, o] for n, o in tied.items() if n in weights and o in weights and weights[n] != weights[o]), [])
