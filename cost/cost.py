"""Cost of an assignment, computed from layer profiles, and rewards that combine quality and cost."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence

from torch import nn

from cost.profile import FileShare, LayerProfile
from cost.units import CostType
from quant.convert import Assignment
from quant.engines.table import ENGINES
from quant.errors import UserError
from quant.formats import (
    FLOAT,
    BlockFormat,
    Format,
    GroupFormat,
    IntFormat,
    MixedFormat,
    bits_in_rows,
    index_bits,
    parse_format,
)

MIB_BITS = 8 * 2**20


def memory_cost(profiles: Sequence[LayerProfile], assignment: Assignment) -> float:
    """Return the memory of the profiled layers' weights in MiB: sum of weights x weight bits / 8 / 2^20.

    Scales and zero points are not included, see `overhead_memory`; in profiles of `cost.file_scope`, they and the rest
    of the model are.

    Args:
        profiles: Profiles of the layers.
        assignment: Layer name -> (weight format, activation format).

    Raises:
        ValueError: Unless profiles and assignment have the same layers.
    """
    weights = cost_of_bits(profiles, _bits(profiles, assignment), "memory")
    others = (
        profile.file.rest * FLOAT.bits + 8 * _range_bytes(profile.file, *assignment[profile.name])
        for profile in profiles
        if profile.file is not None
    )
    return weights + sum(others) / MIB_BITS


def compute_cost(profiles: Sequence[LayerProfile], assignment: Assignment) -> float:
    """Return the bit operations per example in GBOPs: sum of MACs x weight bits x activation bits / 1e9.

    Profiles made with `charge_attention` add their share of attention products: MACs x activation bits squared.

    Args:
        profiles: Profiles of the layers.
        assignment: Layer name -> (weight format, activation format).

    Raises:
        ValueError: Unless profiles and assignment have the same layers.
    """
    return cost_of_bits(profiles, _bits(profiles, assignment), "compute")


COSTS: dict[CostType, Callable[[Sequence[LayerProfile], Assignment], float]] = {
    "memory": memory_cost,
    "compute": compute_cost,
}


def cost_of_bits(profiles: Sequence[LayerProfile], bits: Sequence[tuple[float, float]], cost_type: CostType) -> float:
    """Return the cost for given bits.

    The sum is rounded once, before the division, so equal totals give equal costs, however layers are grouped.

    Args:
        profiles: Profiles of the layers.
        bits: (weight bits, activation bits) per profile; fractions such as 4.5 are allowed.
        cost_type: 'memory' or 'compute'.

    Returns:
        MiB or GBOPs.
    """
    pairs = zip(profiles, bits, strict=True)
    if cost_type == "memory":
        return math.fsum(profile.params * weight for profile, (weight, _) in pairs) / MIB_BITS
    return math.fsum((profile.macs * weight + profile.attention * act) * act for profile, (weight, act) in pairs) / 1e9


def charged_bits(profile: LayerProfile, weight: Format) -> float:
    """Return the bits that a layer's weights are charged in a format: those in the file of its engine.

    The last group or block of a row may be short, and is charged a whole scale.
    """
    bits = weight.bits if profile.engine is None else ENGINES[profile.engine].weight_bits(weight)
    if not profile.channels:
        return bits
    if isinstance(weight, MixedFormat):
        return weight.bits_of(profile.channels)
    return bits_in_rows(bits, weight, profile.params // profile.channels)


def overhead_memory(profiles: Sequence[LayerProfile], assignment: Assignment, per_channel: bool = True) -> float:
    """Return the memory of scales and zero points in MiB, which `memory_cost` does not include.

    Charged per layer:

    - weight: a float32 scale per output channel, or per layer without `per_channel`; weights have no zero point;
    - groups of output channels with formats of their own: the number of each channel's group, in 1 or 2 bits;
    - activation: one float32 scale, and for integers a zero point of 1 byte (2 bytes above int8);
    - block and group formats: nothing, as their scales are part of the effective bits, except nvfp4's float32 per
      tensor;
    - float: nothing.

    Args:
        profiles: Profiles of the layers.
        assignment: Layer name -> (weight format, activation format).
        per_channel: Whether weights have a scale per output channel.
    """
    shares = (FileShare(scales_of(profile, per_channel)) for profile in profiles)
    pairs = zip(shares, (assignment[profile.name] for profile in profiles), strict=True)
    return sum(_range_bytes(share, *formats) for share, formats in pairs) / 2**20


def scales_of(profile: LayerProfile, per_channel: bool) -> int:
    """Return the number of a layer's weight scales; 0 for a weight that belongs to an earlier layer."""
    return 0 if profile.tied_to is not None else profile.channels if per_channel else 1


def unsearched_memory(model: nn.Module, names: Collection[str]) -> float:
    """Return the memory of the parameters that stay in float, at 16 bits each, in MiB.

    Those are all parameters but the weights of the searched layers. A tied parameter counts once, and not at all if
    only searched layers use it: an embedding that is tied to a searched head is read in float, in addition to the
    head's rounded weight. All parameters of a searched layer except its bias count as its weight, for example learned
    scales.

    Args:
        model: The model.
        names: Names of the searched layers.

    Raises:
        ValueError: For an unknown name.
    """
    return unsearched_numbers(model, names) * FLOAT.bits / MIB_BITS


def unsearched_numbers(model: nn.Module, names: Collection[str]) -> int:
    """Return how many numbers `unsearched_memory` counts."""
    modules = dict(model.named_modules())
    if unknown := sorted(set(names) - modules.keys()):
        raise ValueError(f"no modules of {type(model).__name__}: {', '.join(unknown)}")
    searched = {id(value) for name in names for key, value in modules[name].named_parameters() if key != "bias"}
    inside = {part for name in names for part in modules[name].modules()}
    outside = {id(value) for part in modules.values() if part not in inside for value in part._parameters.values()}
    kept = (value.numel() for value in model.parameters() if id(value) not in searched or id(value) in outside)
    return sum(kept)


def assignment_to_json(assignment: Assignment) -> dict[str, list[str]]:
    """Convert an assignment to JSON values: layer -> [weight format, activation format], by name."""
    return {layer: [weight.name, activation.name] for layer, (weight, activation) in assignment.items()}


def assignment_from_json(values: object) -> dict[str, tuple[Format, Format]]:
    """Read an assignment from the values that `assignment_to_json` returned.

    Args:
        values: JSON values.

    Raises:
        UserError: If they are not an assignment; the message names the layer.
    """
    if not isinstance(values, Mapping):
        raise UserError(f"assignment must map layers to [weight format, activation format], got {values!r}")
    assignment = {}
    for layer, pair in values.items():
        if not (isinstance(pair, Sequence) and not isinstance(pair, str) and len(pair) == 2):
            raise UserError(f"assignment of {layer} must be [weight format, activation format], got {pair!r}")
        try:
            assignment[layer] = (parse_format(pair[0]), parse_format(pair[1]))
        except ValueError as error:
            raise UserError(f"assignment of {layer}: {error}") from None
    return assignment


def tunas_abs(quality: float, cost: float, target: float, beta: float) -> float:
    """Return Q - beta |r - 1| with r = cost / target (TuNAS, arXiv 2008.06120); deviations on both sides are penalized.

    Args:
        quality: Q, in (0, 1].
        cost: In the unit of the target, not negative.
        target: Positive.
        beta: Not negative.

    Raises:
        ValueError: If an argument is out of its range. The other rewards have the same arguments.
    """
    return quality - beta * abs(_ratio(quality, cost, target, beta) - 1)


def one_sided_tunas_abs(quality: float, cost: float, target: float, beta: float) -> float:
    """Return Q - beta max(0, r - 1): only a cost above the target is penalized; arguments as for `tunas_abs`."""
    return quality - beta * max(0.0, _ratio(quality, cost, target, beta) - 1)


def soft_exponential(quality: float, cost: float, target: float, beta: float) -> float:
    """Return Q r^(-beta) (MnasNet, arXiv 1807.11626): a lower cost is always better.

    Args:
        quality: Q, in (0, 1].
        cost: In the unit of the target, positive.
        target: Positive.
        beta: Not negative.

    Raises:
        ValueError: If an argument is out of its range.
    """
    ratio = _ratio(quality, cost, target, beta)
    if ratio == 0:
        raise ValueError("soft_exponential needs a cost above 0")
    return quality * ratio**-beta


def hard_exponential(quality: float, cost: float, target: float, beta: float) -> float:
    """Return Q max(1, r)^(-beta): only a cost above the target is penalized; arguments as for `tunas_abs`."""
    return quality * max(1.0, _ratio(quality, cost, target, beta)) ** -beta


REWARDS: dict[str, Callable[[float, float, float, float], float]] = {
    "tunas_abs": tunas_abs,
    "one_sided_tunas_abs": one_sided_tunas_abs,
    "soft_exponential": soft_exponential,
    "hard_exponential": hard_exponential,
}
"""Name -> reward(quality, cost, target, beta), which rises with quality and, above the target, falls with cost."""


def _ratio(quality: float, cost: float, target: float, beta: float) -> float:
    """Return cost / target; raise ValueError for arguments out of range, for which rewards would change direction."""
    if not 0 < quality <= 1:
        raise ValueError(f"quality must be in (0, 1], got {quality}")
    if not 0 <= cost < math.inf:
        raise ValueError(f"cost must be finite and not negative, got {cost}")
    if not 0 < target < math.inf:
        raise ValueError(f"cost target must be positive, got {target}")
    if not 0 <= beta < math.inf:
        raise ValueError(f"cost beta must not be negative, got {beta}")
    return cost / target


def _bits(profiles: Sequence[LayerProfile], assignment: Assignment) -> list[tuple[float, float]]:
    """Return (weight bits, activation bits) per profile."""
    if differing := sorted({profile.name for profile in profiles} ^ assignment.keys()):
        raise ValueError(f"layers with a profile or a format, but not both: {', '.join(differing)}")
    return [
        (charged_bits(profile, assignment[profile.name][0]), assignment[profile.name][1].bits) for profile in profiles
    ]


def _range_bytes(share: FileShare, weight: Format, activation: Format) -> float:
    """Return the bytes of a layer's scales and zero points that are not part of its formats' bits."""
    total: float = _scale_bytes(weight, share.scales)
    if share.zero_points and (isinstance(weight, IntFormat) or _mixes_integers(weight)):
        total += 2 * share.scales
    if isinstance(weight, MixedFormat):
        total += math.ceil(share.scales * index_bits(len(weight.parts)) / 8)
    if share.input_range:
        total += _scale_bytes(activation, 1)
        if isinstance(activation, IntFormat):
            total += 1 if activation.width <= 8 else 2
    return total


def _mixes_integers(weight: Format) -> bool:
    return isinstance(weight, MixedFormat) and any(isinstance(part, IntFormat) for part in weight.parts)


def _scale_bytes(fmt: Format, scales: int) -> int:
    if isinstance(fmt, BlockFormat):
        return 4 if fmt.two_level and scales else 0
    if isinstance(fmt, GroupFormat):
        return 0
    return 4 * scales if fmt.scaled else 0
