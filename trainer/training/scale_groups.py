"""Parameter groups for learned scales in optimizers whose step size does not follow the gradient's magnitude.

Adam changes every parameter by about the learning rate, so a scale of 0.01 would double within a few steps. Scales are
grouped by magnitude, with a learning rate relative to it. SGD needs no groups: LSQ's gradient is scaled for it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

SCALES = "_quantizer.grids."
"""Part of the parameter names of learned scales."""


def scale_exponents(model: nn.Module) -> dict[str, int]:
    """Return name -> exponent of the power of two that scales its learning rate, for scales and offsets."""
    named = _scales(model)
    # An offset (LSQ+) can be 0 or negative, so it takes the magnitude of its scale.
    size = {
        name: named[name.removesuffix("offset") + "scale"] if name.endswith(".offset") else p
        for name, p in named.items()
    }
    return {name: round(math.log2(p.detach().mean().item())) for name, p in size.items()}


def group_scales(optimizer: torch.optim.Optimizer, model: nn.Module, exponents: Mapping[str, int]) -> None:
    """Move the model's scales into one group per exponent, without weight decay.

    Args:
        optimizer: optimizer to change in place.
        model: model with the scales.
        exponents: see `scale_exponents`.
    """
    scales = {parameter: exponents[name] for name, parameter in _scales(model).items()}
    for group in optimizer.param_groups:
        group["params"] = [parameter for parameter in group["params"] if parameter not in scales]
    template = {key: value for key, value in optimizer.param_groups[-1].items() if key != "params"}
    for exponent in sorted(set(scales.values())):
        members = [parameter for parameter, own in scales.items() if own == exponent]
        own: dict[str, Any] = {"lr": template["lr"] * 2.0**exponent, "weight_decay": 0.0, "scale_exponent": exponent}
        optimizer.add_param_group({**template, **own, "params": members})


def needs_groups(optimizer: torch.optim.Optimizer) -> bool:
    """Return whether the scales need groups and have none yet."""
    grouped = any("scale_exponent" in group for group in optimizer.param_groups)
    return not isinstance(optimizer, torch.optim.SGD) and not grouped


def freeze_weights(model: nn.Module) -> None:
    """Let an optimizer train nothing but the learned scales and offsets."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(SCALES in name)


def _scales(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: parameter for name, parameter in model.named_parameters() if SCALES in name}
