"""Sizes of an extracted model as JSON values, and the way back: the same sizes for the architecture it came from."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from quant.elastic.blocks import Skip
from quant.elastic.kernels import grow_kernel
from quant.elastic.layers import Size, freeze_size, make_elastic

NOTE = "extracted_sizes"
"""Attribute of an extracted model that holds its description."""


UNEVEN = "its files hold one size for all layers, and --architecture_space has chosen sizes for each"
"""Why formats whose reader builds the model from a config.json cannot hold an extracted one."""


def described_sizes(model: nn.Module) -> dict[str, Any]:
    """Return what `shrink` needs: `sizes`, layer -> [out, read, kernel], and `skipped`, block -> whether in a tuple."""
    described: dict[str, Any] = getattr(model, NOTE, {})
    return described


def shrink(model: nn.Module, described: Mapping[str, Any]) -> None:
    """Give a model of the whole architecture, in place, the sizes of the one that was extracted from it.

    Weights are the first channels and the centres of the kernels, as they are; load others for those of the extracted.

    Args:
        model: The float model.
        described: What `described_sizes` returned; empty: nothing is changed.
    """
    if not described:
        return
    for name, in_tuple in described["skipped"].items():
        _replace(model, name, Skip(in_tuple))
    for name, size in described["sizes"].items():
        layer = model.get_submodule(name)
        if isinstance(layer, nn.Conv2d) and layer.kernel_size[0] < size[2]:
            grow_kernel(layer, size[2])  # as the search has, from scratch
        plain = type(layer)
        elastic = make_elastic(layer)
        elastic.resize(Size(*size))
        freeze_size(elastic, plain)
        _replace(model, name, elastic)
    setattr(model, NOTE, dict(described))


def _replace(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, child = name.rpartition(".")
    model.get_submodule(parent)._modules[child] = module
