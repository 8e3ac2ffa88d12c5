"""Groups of output channels within a layer, whose weights may differ in format: 'int4+int2'.

A weight with a scale for each output channel can be rounded to a format for each output channel as well. The layer
stays one layer, with its weight in its own order and one format of its activations; only the weight's quantizer knows
which channel belongs to which group. So float outputs, names in state dicts and all arithmetic stay as they are.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from quant.analysis.tied import tied_layers
from quant.errors import UserError
from quant.formats import CHANNEL_GROUPS
from quant.quant_experts import ExpertLinear
from quant.quant_module import QuantModule


def split_channels(
    modules: Mapping[str, QuantModule], groups: int, sensitivity: Mapping[str, Tensor] | None = None
) -> list[str]:
    """Divide the output channels of quantized layers into groups, which may differ in weight format from now on.

    Args:
        modules: The quantized layers, by name. Those that `can_split` leaves out stay whole.
        groups: Groups of each layer: 2 or 4. A mix of formats names one for each: 'int4+int2'.
        sensitivity: Layer name -> (channels,), how much rounding the weights of each output channel costs; the first
            group takes the channels with the largest values. None, or a layer that is missing: channels in their order.

    Returns:
        Names of the layers that were divided.

    Raises:
        UserError: For another number of groups, weights without a scale for each channel, and layers none of which can
            be divided.
    """
    if groups not in CHANNEL_GROUPS[1:]:
        raise UserError(f"groups of output channels must be one of {', '.join(map(str, CHANNEL_GROUPS[1:]))}: {groups}")
    names = can_split(modules, groups)
    if not names:
        raise UserError(f"none of {len(modules)} layers has output channels for {groups} groups of its own")
    for name in names:
        config = modules[name].weight_quantizer.config
        if config.granularity != "channel" or config.learned_offset:
            raise UserError(f"layer {name}: groups of output channels need a scale for each, and no learned offset")
        modules[name].weight_quantizer.split(groups)
    order_channels({name: modules[name] for name in names}, sensitivity or {})
    return names


def order_channels(modules: Mapping[str, QuantModule], sensitivity: Mapping[str, Tensor]) -> None:
    """Put the most sensitive channels of divided layers into their first groups; the sizes of the groups stay.

    Args:
        modules: Layers that `split_channels` has divided, by name.
        sensitivity: Layer name -> (channels,), see `split_channels`.
    """
    for name, module in modules.items():
        if name in sensitivity:
            group = module.weight_quantizer.channel_group
            order = sensitivity[name].to(group.device).argsort(descending=True, stable=True)
            group.view(-1)[order] = group.flatten().sort().values


def split_layers(modules: Mapping[str, QuantModule]) -> dict[str, int]:
    """Return layer name -> its number of groups, of the layers that are divided."""
    groups = {name: module.weight_quantizer.config.channel_groups for name, module in modules.items()}
    return {name: number for name, number in groups.items() if number > 1}


def can_split(layers: Mapping[str, nn.Module], groups: int) -> list[str]:
    """Return the names of layers, plain or quantized, whose output channels can be divided into groups.

    Embeddings, experts, layers that share their weight, and layers with fewer channels than groups stay whole.

    Args:
        layers: Layers by name.
        groups: Groups of each layer.
    """
    tied = tied_layers(layers)
    shared = {*tied, *tied.values()}
    return [
        name
        for name, layer in layers.items()
        if name not in shared
        and isinstance(weight := getattr(layer, "weight", None), Tensor)
        and not isinstance(layer, nn.Embedding | ExpertLinear)
        and weight.dim() >= 2
        and weight.shape[1 if isinstance(layer, Conv1D) else 0] >= groups
    ]


def groups_of(module: QuantModule) -> list[Tensor]:
    """Return the indices of the output channels in each group of a divided layer, int64, in ascending order."""
    quantizer = module.weight_quantizer
    group = quantizer.channel_group.flatten()
    return [torch.nonzero(group == number).flatten() for number in range(quantizer.config.channel_groups)]
