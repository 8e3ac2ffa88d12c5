"""Learned scales in an optimizer whose steps do not follow the gradient's size: each gets a pace that suits it.

Adam moves every number by about the learning rate, so a scale of 0.01 would double within a few steps. Scales are
grouped by magnitude, and a group's learning rate is relative to it. SGD needs none of this: LSQ's gradient is already
made for it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

SCALES = "_quantizer.grids."
"""what the names of learned scales contain"""


def scale_exponents(model: nn.Module) -> dict[str, int]:
    """Name of each learned scale or offset -> the power of two that its learning rate is multiplied by."""
    named = _scales(model)
    # An offset (LSQ+) may be 0 or negative: it moves at the pace of its scale.
    size = {
        name: named[name.removesuffix("offset") + "scale"] if name.endswith(".offset") else p
        for name, p in named.items()
    }
    return {name: round(math.log2(p.detach().mean().item())) for name, p in size.items()}


def group_scales(optimizer: torch.optim.Optimizer, model: nn.Module, exponents: Mapping[str, int]) -> None:
    """Move the model's scales into groups of their own, one for each exponent, without weight decay."""
    scales = {parameter: exponents[name] for name, parameter in _scales(model).items()}
    for group in optimizer.param_groups:
        group["params"] = [parameter for parameter in group["params"] if parameter not in scales]
    template = {key: value for key, value in optimizer.param_groups[-1].items() if key != "params"}
    for exponent in sorted(set(scales.values())):
        members = [parameter for parameter, own in scales.items() if own == exponent]
        own: dict[str, Any] = {"lr": template["lr"] * 2.0**exponent, "weight_decay": 0.0, "scale_exponent": exponent}
        optimizer.add_param_group({**template, **own, "params": members})


def needs_groups(optimizer: torch.optim.Optimizer) -> bool:
    """Whether the scales are still to be grouped."""
    grouped = any("scale_exponent" in group for group in optimizer.param_groups)
    return not isinstance(optimizer, torch.optim.SGD) and not grouped


def _scales(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: parameter for name, parameter in model.named_parameters() if SCALES in name}
