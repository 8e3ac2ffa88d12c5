"""Layers that share their weight: one tensor, so one format, one scale and one place in every file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import nn
from transformers.pytorch_utils import Conv1D

from quant.quant_module import QuantModule


def tied_layers(layers: Mapping[str, nn.Module]) -> dict[str, str]:
    """Each layer that shares its weight with an earlier one of these -> the first that has it.

    One that holds the same numbers as other rows (a Linear beside a Conv1D of transformers) rounds them otherwise.
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
    """Layers that share a weight, together; tied: what `tied_layers` gives."""
    groups: dict[str, list[str]] = {}
    for name, owner in tied.items():
        if owner is not None:
            groups.setdefault(owner, [owner]).append(name)
    return list(groups.values())


def share_quantizers(model: nn.Module) -> None:
    """Let all quantized layers of `model` that share a weight round it with the quantizer of the first of them."""
    modules = {name: module for name, module in model.named_modules() if isinstance(module, QuantModule)}
    for name, owner in tied_layers(modules).items():
        own, shared = modules[name].weight_quantizer, modules[owner].weight_quantizer
        if own is not shared and (own.config, own.shape) == (shared.config, shared.shape):
            for format in own.prepared:
                shared.prepare(format)
            modules[name].weight_quantizer = shared


def stored_with(modules: Mapping[str, QuantModule]) -> dict[str, str]:
    """Each layer whose rounded weight is that of an earlier one -> the first that has it."""
    tied = tied_layers(modules)
    same = {n: modules[n].weight_quantizer is modules[owner].weight_quantizer for n, owner in tied.items()}
    return {name: owner for name, owner in tied.items() if same[name]}


def differing(tied: Mapping[str, str], weights: Mapping[str, object]) -> Sequence[str]:
    """A layer and the owner of its weight that have different weight formats in `weights`; empty if none have."""
    return next(([n, o] for n, o in tied.items() if n in weights and o in weights and weights[n] != weights[o]), [])
