"""Narrow the quantizer of a weight to its first channels."""

from __future__ import annotations

from typing import cast

import torch

from quant.quantizers.quant_params import QuantParams
from quant.quantizers.quantizer import Quantizer


@torch.no_grad()
def narrow(quantizer: Quantizer, channels: int, weight_shape: tuple[int, ...]) -> None:
    """Keep the scales of the first channels, in place.

    Args:
        quantizer: Quantizer of a weight, with a scale per tensor or per output channel on axis 0.
        channels: Number of channels to keep.
        weight_shape: Shape of the smaller weight.
    """
    quantizer.weight_shape = weight_shape
    if not quantizer.shape or quantizer.shape[0] in (1, channels):
        return
    quantizer.shape = (channels, *quantizer.shape[1:])
    for name, grid in list(quantizer.grids.items()):
        before = cast(QuantParams, grid)
        symmetric, offset = not before.moved and before.offset is None, before.offset is not None
        after = QuantParams(before.format, quantizer.shape, before.learned, symmetric, before.scale.device, offset)
        if before.is_ready:
            after.set(before.scale[:channels], before.zero_point[:channels] if before.moved else None)
            if after.offset is not None and before.offset is not None:
                after.offset.copy_(before.offset[:channels])
        quantizer.grids[name] = after
