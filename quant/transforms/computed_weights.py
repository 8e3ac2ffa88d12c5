"""Weights that a layer computes at every call: weight norm and spectral norm (old and new style), parametrizations."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize, remove_spectral_norm, remove_weight_norm
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

from quant.module_utils import evaluating


@torch.no_grad()
def weight_of(layer: Any) -> Tensor:
    """Return the weight that a layer uses in eval mode, detached."""
    if (weight := layer._parameters.get("weight")) is not None:
        return weight.detach()
    hook = norm_hook(layer)
    if isinstance(hook, WeightNorm):
        return hook.compute_weight(layer).detach()
    if isinstance(hook, SpectralNorm):
        return hook.compute_weight(layer, do_power_iteration=False).detach()
    with evaluating(layer):  # in training mode, reading it would update spectral norm's estimate
        return layer.weight.detach().clone()


def norm_hook(layer: nn.Module) -> WeightNorm | SpectralNorm | None:
    """Return the forward pre-hook of `torch.nn.utils.weight_norm` or `spectral_norm`, if the layer has one."""
    hooks = (hook for hook in layer._forward_pre_hooks.values() if isinstance(hook, WeightNorm | SpectralNorm))
    return next((hook for hook in hooks if hook.name == "weight"), None)


def sources(layer: nn.Module) -> tuple[str, ...]:
    """Return the prefixes of the state-dict keys that the weight is computed from; empty if it is a parameter."""
    if layer._parameters.get("weight") is not None:
        return ()
    if norm_hook(layer) is None:
        return ("parametrizations.weight.",)
    return "weight_g", "weight_v", "weight_orig", "weight_u"


def fold_weight(layer: nn.Module) -> None:
    """Replace the computed weight of a float layer by a plain parameter."""
    hook = norm_hook(layer)
    if isinstance(hook, WeightNorm):
        remove_weight_norm(layer)
    elif isinstance(hook, SpectralNorm):
        remove_spectral_norm(layer)
    elif parametrize.is_parametrized(layer, "weight"):
        parametrize.remove_parametrizations(layer, "weight", leave_parametrized=True)
