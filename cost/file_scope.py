"""The whole file as a cost: weights at their formats, scales and zero points, and what stays in float at 16 bits.

The profiles that this file makes let `cost.cost.memory_cost`, and every budget built on it, count a packed file.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

from torch import nn

from cost.cost import scales_of, unsearched_numbers
from cost.profile import FileShare, LayerProfile
from quant.formats import FLOAT


def charge_file(
    profiles: Sequence[LayerProfile],
    model: nn.Module,
    per_channel: bool = True,
    zero_points: bool = False,
    input_ranges: bool = True,
) -> list[LayerProfile]:
    """Charge the layers for everything that a packed file of the model holds besides its header.

    Args:
        profiles: Profiles of the layers that have formats.
        model: The model.
        per_channel: Whether weights have a scale per output channel.
        zero_points: Whether integer weights have zero points.
        input_ranges: Whether the ranges of inputs are fixed, so that the file holds them.

    Returns:
        The profiles with a share of the file each; the first one has all that no layer holds.
    """
    rest = file_rest(model, [profile.name for profile in profiles])
    return [
        replace(
            profile,
            file=FileShare(
                scales_of(profile, per_channel),
                zero_points,
                input_ranges and profile.kind != "embedding",
                rest=0 if place else rest,
            ),
        )
        for place, profile in enumerate(profiles)
    ]


def file_rest(model: nn.Module, names: Sequence[str]) -> int:
    """Return what a file holds outside the weights of `names`, in numbers of 16 bits: parameters and saved buffers.

    Buffers of integers, such as a batch norm's count of batches, keep their own width.
    """
    buffers: dict[int, int] = {}
    for module in model.modules():
        for key, buffer in module._buffers.items():
            if buffer is not None and key not in module._non_persistent_buffers_set:
                bits = FLOAT.bits if buffer.is_floating_point() else 8 * buffer.element_size()
                buffers[id(buffer)] = math.ceil(buffer.numel() * bits / FLOAT.bits)
    return unsearched_numbers(model, names) + sum(buffers.values())
