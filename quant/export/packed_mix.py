"""Weights whose output channels differ in format, in a packed file: the codes of each group in their own bits.

Tensors of a layer L, in place of `L.weight.codes`: `L.weight.group_codes.N` uint8, the codes of group N's channels in
ascending order, and `L.weight.channel_group` uint8, the number of each channel's group in 1 or 2 bits. Scales and zero
points stand in the order of the channels, as for other weights.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from quant.export.bit_packing import decode, encode, pack_bits, unpack_bits
from quant.export.weights import RoundedWeight
from quant.formats import MixedFormat, index_bits
from quant.quantizers.quantizer import Quantizer

CODES, INDEX = "group_codes", "channel_group"


def pack_mix(weight: RoundedWeight) -> dict[str, Tensor]:
    """Return the tensors of a rounded weight in a mix of formats, without those that other weights have, too."""
    assert isinstance(weight.format, MixedFormat)
    codes = weight.elements if weight.zero_point is None else weight.elements + weight.zero_point
    rows = codes.movedim(weight.channels, 0)
    group = torch.empty(len(rows), dtype=torch.uint8)
    packed = {}
    for number, (part, channels) in enumerate(zip(weight.format.parts, weight.groups, strict=True)):
        own = encode(rows[channels].contiguous().numpy(), part)
        packed[f"{CODES}.{number}"] = torch.from_numpy(pack_bits(own, int(part.bits)))
        group[channels] = number
    packed[INDEX] = torch.from_numpy(pack_bits(group.numpy(), index_bits(len(weight.groups))))
    return packed


def unpack_mix(tensors: Mapping[str, Tensor], format: MixedFormat, shape: torch.Size, quantizer: Quantizer) -> Tensor:
    """Return the codes of a weight as float32 of its shape, and note the groups of its channels in the quantizer.

    Args:
        tensors: The tensors of the layer, named as in `pack_mix` behind 'weight.'.
        format: The weight's format.
        shape: The weight's shape.
        quantizer: The weight's quantizer.
    """
    axis = max(range(len(shape)), key=lambda place: quantizer.shape[place])
    index = unpack_bits(tensors[f"weight.{INDEX}"].numpy(), index_bits(len(format.parts)), shape[axis])
    group = torch.from_numpy(index.astype("uint8"))
    quantizer.channel_group.copy_(group.view(quantizer.shape))
    rows = torch.empty(shape).movedim(axis, 0).contiguous()
    for number, part in enumerate(format.parts):
        channels = torch.nonzero(group == number).flatten()
        own = torch.empty((len(channels), *rows.shape[1:]))
        codes = unpack_bits(tensors[f"weight.{CODES}.{number}"].numpy(), int(part.bits), own.numel())
        rows[channels] = torch.from_numpy(decode(codes, part)).view_as(own)
    return rows.movedim(0, axis).contiguous()
