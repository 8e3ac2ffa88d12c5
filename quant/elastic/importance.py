"""Order channels by importance, so that the first ones are those worth keeping; the model's outputs stay the same."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from quant.convert import run_model
from quant.elastic.channels import Channels
from quant.module_utils import evaluating


@torch.no_grad()
def order_by_importance(model: nn.Module, channels: Sequence[Channels], example: Any) -> None:
    """Permute channels, in place, by falling importance.

    The importance of a channel is the expected squared norm of what it contributes to the layers that read it: its
    mean square on the example times the squared norm of the weights that multiply it, summed over these layers
    (criterion of Wanda, arXiv 2306.11695, per channel).

    Args:
        model: The float model.
        channels: What `find_channels` returned for it.
        example: A batch, of as many examples as possible.
    """
    layers: Mapping[str, Any] = dict(model.named_modules())
    energy = _energy(model, {name: layers[name] for group in channels for name in group.readers}, example)
    for group in channels:
        scores = torch.stack([energy[name] * _read_norms(layers[name]) for name in group.readers]).sum(0)
        units = scores.view(-1, group.unit).sum(1).argsort(descending=True, stable=True)
        order = units[:, None] * group.unit + torch.arange(group.unit, device=units.device)
        permute(layers, group, order.flatten())


@torch.no_grad()
def permute(layers: Mapping[str, Any], group: Channels, order: Tensor) -> None:
    """Reorder channels in all layers that write, follow or read them.

    Args:
        layers: Name -> layer.
        group: The channels.
        order: int64 (channels,), the old index of each new channel.
    """
    for name in (*group.writers, *group.followers):
        for tensor in (*layers[name]._parameters.values(), *layers[name]._buffers.values()):
            if tensor is not None and tensor.dim():
                tensor.copy_(tensor[order])
    for name in group.readers:
        weight = layers[name].weight
        weight.copy_(weight[:, order])


def _read_norms(layer: Any) -> Tensor:
    """Return the squared norm of the weights that multiply each input channel."""
    square: Tensor = layer.weight.square()
    return square.sum([axis for axis in range(square.dim()) if axis != 1])


def _energy(model: nn.Module, layers: Mapping[str, nn.Module], example: Any) -> dict[str, Tensor]:
    """Return layer name -> mean square of each of its input channels."""
    found: dict[str, Tensor] = {}

    def watch(name: str) -> Callable[..., None]:
        def hook(layer: nn.Module, args: tuple[Any, ...]) -> None:
            axis = args[0].dim() - 1 if isinstance(layer, nn.Linear) else 1
            mean = args[0].float().square().mean([other for other in range(args[0].dim()) if other != axis])
            found[name] = found.get(name, torch.zeros_like(mean)) + mean

        return hook

    hooks = [layer.register_forward_pre_hook(watch(name)) for name, layer in layers.items()]
    try:
        with evaluating(model):
            run_model(model, example)
    finally:
        for hook in hooks:
            hook.remove()
    return found
