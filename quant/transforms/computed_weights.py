"""Weights that a layer computes at every call: weight norm, spectral norm and other parametrizations, of both kinds."""

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
    """The weight that `layer` computes with in eval mode now, whatever it is made from."""
    if (weight := layer._parameters.get("weight")) is not None:
        return weight.detach()
    hook = norm_hook(layer)
    if isinstance(hook, WeightNorm):
        return hook.compute_weight(layer).detach()
    if isinstance(hook, SpectralNorm):
        return hook.compute_weight(layer, do_power_iteration=False).detach()
    with evaluating(layer):  # in training, reading a weight moves spectral norm's estimate
        return layer.weight.detach().clone()


def norm_hook(layer: nn.Module) -> WeightNorm | SpectralNorm | None:
    """The hook that `torch.nn.utils.weight_norm` or `spectral_norm` has put before the forward pass."""
    hooks = (hook for hook in layer._forward_pre_hooks.values() if isinstance(hook, WeightNorm | SpectralNorm))
    return next((hook for hook in hooks if hook.name == "weight"), None)


def sources(layer: nn.Module) -> tuple[str, ...]:
    """How the names in the layer's state dict begin that its weight is computed from; none where it holds a weight."""
    if layer._parameters.get("weight") is not None:
        return ()
    if norm_hook(layer) is None:
        return ("parametrizations.weight.",)
    return "weight_g", "weight_v", "weight_orig", "weight_u"


def fold_weight(layer: nn.Module) -> None:
    """Have a float layer hold the weight that it computed, as a plain parameter."""
    hook = norm_hook(layer)
    if isinstance(hook, WeightNorm):
        remove_weight_norm(layer)
    elif isinstance(hook, SpectralNorm):
        remove_spectral_norm(layer)
    elif parametrize.is_parametrized(layer, "weight"):
        parametrize.remove_parametrizations(layer, "weight", leave_parametrized=True)
