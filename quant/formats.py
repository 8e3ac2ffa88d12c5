"""Number formats: their names, their values and the bits that they cost.

The only place where formats are defined. It does not import torch, so that flags are checked in milliseconds.
Sources: OCP MX v1.0 (block formats, FP8, FP6, FP4), IEEE 754 (fp16), bfloat16, NVIDIA NVFP4.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, TypeAlias

IntGrid: TypeAlias = Literal["narrow", "full", "unsigned"]
"""Codes of a k-bit integer: narrow -(2^(k-1)-1)..2^(k-1)-1, full -2^(k-1)..2^(k-1)-1, unsigned 0..2^k-1."""


@dataclass(frozen=True)
class Rounding:
    """Five numbers that describe a grid, so that one kernel rounds to every format (`kernels.eager.round_to_grid`)."""

    low: float
    """Smallest value of the grid, before the scale."""
    high: float
    """Largest value of the grid, before the scale."""
    smallest_power: float
    """Power of two below which the step between values no longer shrinks."""
    magic: float
    """1.5 * 2^(23 - mantissa): adding it to a value in [1, 2) rounds the value to the mantissa's step."""
    keep_sign: float
    """1: negative values that round to zero become -0.0; 0: they become +0.0."""


@dataclass(frozen=True)
class ByteGrid:
    """One-byte codes of a grid: value before the scale = step * (code - zero_point), exactly."""

    step: float
    zero_point: int
    """Zero point of unsigned codes, 0..255."""
    signed: bool
    """Whether int8 codes with zero point 0 hold the values as well."""


@dataclass(frozen=True)
class FloatOff:
    """Not quantized. Costs 16 bits: the model would be stored and run in a 16-bit type."""

    @property
    def name(self) -> str:
        """Name that `parse_format` reads."""
        return "float"

    @property
    def bits(self) -> float:
        """Bits that a value costs."""
        return 16

    @property
    def scaled(self) -> bool:
        """False: there is no grid to stretch."""
        return False

    def __str__(self) -> str:
        return self.name


@dataclass(frozen=True)
class IntFormat:
    """Two's complement integers of `width` bits on a uniform grid."""

    width: int

    def __post_init__(self) -> None:
        if not 2 <= self.width <= 16:
            raise ValueError(f"int{self.width}: integer formats have 2 to 16 bits (int1 has no symmetric grid)")

    @property
    def name(self) -> str:
        """Name that `parse_format` reads."""
        return f"int{self.width}"

    @property
    def bits(self) -> float:
        """Bits that a value costs."""
        return self.width

    @property
    def qmax(self) -> float:
        """Largest value of the symmetric grid."""
        return float(2 ** (self.width - 1) - 1)

    @property
    def smallest_normal(self) -> float:
        """Smallest positive value: the step of the grid."""
        return 1.0

    @property
    def smallest_subnormal(self) -> float:
        """Smallest positive value: the step of the grid."""
        return 1.0

    @property
    def scaled(self) -> bool:
        """True: a scale stretches the grid to the tensor's range."""
        return True

    def bounds(self, grid: IntGrid = "narrow") -> tuple[int, int]:
        """Return the smallest and the largest code of the grid."""
        half = 2 ** (self.width - 1)
        return {"narrow": (1 - half, half - 1), "full": (-half, half - 1), "unsigned": (0, 2 * half - 1)}[grid]

    def rounding(self, grid: IntGrid = "narrow") -> Rounding:
        """Return the numbers to round with.

        The smallest power lies above every code, also after a zero point has moved the bounds, so that the step is 1.
        """
        mantissa = self.width + 1
        low, high = self.bounds(grid)
        return Rounding(low, high, 2.0**mantissa, 1.5 * 2.0 ** (23 - mantissa), 0.0)

    def __str__(self) -> str:
        return self.name


@dataclass(frozen=True)
class FloatFormat:
    """Minifloat: a sign, `exponent` and `mantissa` bits; values beyond qmax saturate."""

    exponent: int
    mantissa: int
    reserved: int = 0
    """Number of largest magnitude codes that mean infinity or NaN: 0 for e2m1, 1 for e4m3 (FN), 4 for e5m2."""

    def __post_init__(self) -> None:
        if not (1 <= self.exponent <= 8 and self.mantissa >= 1 and self.exponent + self.mantissa <= 15):
            raise ValueError(
                f"e{self.exponent}m{self.mantissa}: minifloats have 1 to 8 exponent bits, "
                "at least 1 mantissa bit and at most 16 bits in all"
            )

    @property
    def name(self) -> str:
        """Name that `parse_format` reads."""
        return _WIDE_NAMES.get((self.exponent, self.mantissa, self.reserved), f"e{self.exponent}m{self.mantissa}")

    @property
    def bits(self) -> float:
        """Bits that a value costs."""
        return 1 + self.exponent + self.mantissa

    @property
    def bias(self) -> int:
        """Bias of the exponent field, as in IEEE 754."""
        return int(2 ** (self.exponent - 1) - 1)

    @cached_property
    def emin(self) -> int:
        """Exponent of the smallest normal value."""
        return 1 - self.bias

    @cached_property
    def emax(self) -> int:
        """Exponent of the largest value."""
        return (2 ** (self.exponent + self.mantissa) - 1 - self.reserved) // 2**self.mantissa - self.bias

    @cached_property
    def qmax(self) -> float:
        """Largest value."""
        exponent, fraction = divmod(2 ** (self.exponent + self.mantissa) - 1 - self.reserved, 2**self.mantissa)
        return (2**self.mantissa + fraction) * 2.0 ** (exponent - self.bias - self.mantissa)

    @property
    def smallest_normal(self) -> float:
        """Smallest positive value with a leading one."""
        return 2.0**self.emin

    @property
    def smallest_subnormal(self) -> float:
        """Smallest positive value: the step of the grid around zero."""
        return 2.0 ** (self.emin - self.mantissa)

    @property
    def scaled(self) -> bool:
        """Whether a scale stretches the grid; bf16, fp16 and 8 exponent bits are wide enough for a plain cast."""
        return self.exponent < 8 and self.name != "fp16"

    def rounding(self, grid: IntGrid = "narrow") -> Rounding:
        """Return the numbers to round with; minifloats are symmetric, so `grid` makes no difference."""
        return Rounding(-self.qmax, self.qmax, 2.0**self.emin, 1.5 * 2.0 ** (23 - self.mantissa), 1.0)

    def __str__(self) -> str:
        return self.name


@dataclass(frozen=True)
class BlockFormat:
    """Elements that share a scale in blocks along the reduction axis; the last block may be shorter."""

    name: str
    element: IntFormat | FloatFormat
    block_size: int
    scale_bits: int = 8

    @property
    def bits(self) -> float:
        """Effective bits: those of the element, plus its share of the block's scale."""
        return self.element.bits + self.scale_bits / self.block_size

    @property
    def qmax(self) -> float:
        """Largest value of the elements."""
        return self.element.qmax

    @property
    def smallest_normal(self) -> float:
        """Smallest normal value of the elements."""
        return self.element.smallest_normal

    @property
    def smallest_subnormal(self) -> float:
        """Smallest positive value of the elements."""
        return self.element.smallest_subnormal

    @property
    def scaled(self) -> bool:
        """False: block scales are computed from the tensor at every use, none is kept."""
        return False

    @property
    def two_level(self) -> bool:
        """True for nvfp4: e4m3 block scales under one float scale per tensor. False for MX: powers of two alone."""
        return self.name == "nvfp4"

    def __str__(self) -> str:
        return self.name


@dataclass(frozen=True)
class GroupFormat:
    """Integers of weights with a fp16 scale for each group of values along the reduction axis.

    Block formats compute their scales from the tensor; a group's scale is chosen from data or learned, as a channel's.
    The last group of a row may be shorter.
    """

    width: int
    size: int
    """Values in a group, M of `intNgM`."""
    zero_point: bool = False
    """Whether each group also has a zero point of `width` bits (`uintNgM`: the codes are 0..2^N-1)."""

    def __post_init__(self) -> None:
        if not 2 <= self.width <= 8:
            raise ValueError(f"{self.name}: integers in groups have 2 to 8 bits")
        if not 8 <= self.size <= 65536:
            raise ValueError(f"{self.name}: groups have 8 to 65536 values")

    @property
    def name(self) -> str:
        """Name that `parse_format` reads."""
        return f"{'u' if self.zero_point else ''}int{self.width}g{self.size}"

    @property
    def bits(self) -> float:
        """Effective bits: those of the integer, plus its share of the group's scale and zero point."""
        return self.width + (GROUP_SCALE_BITS + (self.width if self.zero_point else 0)) / self.size

    @property
    def element(self) -> IntFormat:
        """The integers of a group."""
        return IntFormat(self.width)

    @property
    def scaled(self) -> bool:
        """True: a scale stretches each group's grid."""
        return True

    def __str__(self) -> str:
        return self.name


GROUP_SCALE_BITS = 16
"""Bits of a group's scale, which is stored in fp16."""


@dataclass(frozen=True)
class MixedFormat:
    """Weights whose output channels form groups with a format each, see `quant.channel_groups`.

    Every channel has a scale, as in each of the formats alone.
    """

    parts: tuple[IntFormat | FloatFormat, ...]
    """Format of each group; the first is that of the most sensitive channels."""

    def __post_init__(self) -> None:
        if len(set(self.parts)) < 2:
            raise ValueError(f"{self.name}: groups of channels that all have one format are no mix")

    @property
    def name(self) -> str:
        """Name that `parse_format` reads: 'int4+int2'."""
        return "+".join(part.name for part in self.parts)

    @property
    def bits(self) -> float:
        """Bits that a weight costs if the groups are equally large; see `bits_of` for all others."""
        return sum(part.bits for part in self.parts) / len(self.parts)

    def bits_of(self, channels: int) -> float:
        """Return the mean bits of a weight with this many output channels."""
        sizes = group_sizes(channels, len(self.parts))
        return sum(size * part.bits for size, part in zip(sizes, self.parts, strict=True)) / channels

    @property
    def scaled(self) -> bool:
        """True: a scale stretches each channel's grid."""
        return True

    def __str__(self) -> str:
        return self.name


CHANNEL_GROUPS = (1, 2, 4)
"""Groups that a layer's output channels may form."""


def index_bits(groups: int) -> int:
    """Return the bits that tell the group of a channel in a file."""
    return (groups - 1).bit_length()


def group_sizes(channels: int, groups: int) -> list[int]:
    """Return how many output channels each group has: the same number, the first ones one more if that is uneven."""
    return [channels // groups + (group < channels % groups) for group in range(groups)]


Format: TypeAlias = FloatOff | IntFormat | FloatFormat | BlockFormat | GroupFormat | MixedFormat

FLOAT = FloatOff()
E4M3 = FloatFormat(4, 3, 1)
NVFP4_SCALE = E4M3
"""Format of nvfp4's block scales."""
_E5M2, _E3M2, _E2M1 = FloatFormat(5, 2, 4), FloatFormat(3, 2), FloatFormat(2, 1)
_WIDE_NAMES = {(8, 7, 128): "bf16", (5, 10, 1024): "fp16"}
_NAMED: dict[str, Format] = {
    "float": FLOAT,
    "fp8": E4M3,
    "fp4": _E2M1,
    "bf16": FloatFormat(8, 7, 128),
    "fp16": FloatFormat(5, 10, 1024),
    "mxfp8": BlockFormat("mxfp8", E4M3, 32),
    "mxfp6": BlockFormat("mxfp6", _E3M2, 32),
    "mxfp4": BlockFormat("mxfp4", _E2M1, 32),
    "mxint8": BlockFormat("mxint8", IntFormat(8), 32),
    "nvfp4": BlockFormat("nvfp4", _E2M1, 16),
}
_RESERVED_CODES = {(4, 3): 1, (5, 2): 4}


def mx_element(format: BlockFormat) -> tuple[int, float]:
    """Return the exponent of an MX element's largest value, and the element's step.

    mxint8's elements are whole numbers of 1/64 (OCP MX v1.0, section 5.3.4); of minifloats the step is part of the
    format.
    """
    element = format.element
    return (0, 2.0**-6) if isinstance(element, IntFormat) else (element.emax, 1.0)


def byte_grid(format: IntFormat | FloatFormat, low: float, high: float) -> ByteGrid | None:
    """Return one-byte codes for the values of a format.

    Args:
        format: The format; all its values are multiples of its smallest positive one.
        low: Smallest value of the grid, before the scale.
        high: Largest value of the grid, before the scale.

    Returns:
        The codes, or None if 256 are too few or `low` is positive.
    """
    step = format.smallest_subnormal
    if (high - low) / step > 255 or low > 0:
        return None
    return ByteGrid(step, int(-low / step), -128 * step <= low and high <= 127 * step)


CHOICES = (
    "int2..int8, int16, e4m3 (fp8), e5m2, e3m2, e2m3, e2m1 (fp4), any eXmY, "
    "mxfp8, mxfp6, mxfp4, mxint8, nvfp4, weights in groups intNgM or, with zero points, uintNgM (int4g128), "
    "bf16, fp16, float (0)"
)
"""Choices that the message about an unknown name lists."""


def parse_format(name: str | int) -> Format:
    """Return the format of a name.

    Args:
        name: For example 'int4', '4' or 4; 'e4m3' or 'fp8'; 'mxfp4'; 'int4g128'; 'float', '0' or 0. Case and outer
            spaces are ignored.

    Returns:
        The format; equal names give equal formats.

    Raises:
        ValueError: For any other name; the message holds the value and the choices.
    """
    text = str(name).strip().lower()
    if text in _NAMED:
        return _NAMED[text]
    if "+" in text:
        return _parse_mix(text)
    try:
        if match := re.fullmatch(r"(?:int)?(\d{1,2})", text):
            width = int(match[1])
            if width == 0 and text == "0":
                return FLOAT
            if 2 <= width <= 8 or width == 16:
                return IntFormat(width)
        if match := re.fullmatch(r"(u?)int(\d{1,2})g(\d{1,5})", text):
            return GroupFormat(int(match[2]), int(match[3]), bool(match[1]))
        if match := re.fullmatch(r"e(\d)m(\d{1,2})", text):
            exponent, mantissa = int(match[1]), int(match[2])
            # With 8 exponent bits the top code is reserved: 2^128 exceeds float32, which every kernel computes in.
            reserved = 2**mantissa if exponent == 8 else _RESERVED_CODES.get((exponent, mantissa), 0)
            return FloatFormat(exponent, mantissa, reserved)
    except ValueError as error:
        raise ValueError(f"unknown format {str(name)!r} ({error}); choices: {CHOICES}") from None
    raise ValueError(f"unknown format {str(name)!r}; choices: {CHOICES}")


def _parse_mix(text: str) -> MixedFormat:
    """Return the format of groups of output channels, such as 'int4+int2'; raise ValueError for what is none."""
    parts = [parse_format(part) for part in text.split("+")]
    if whole := [part for part in parts if not has_channel_scales(part)]:
        raise ValueError(f"unknown format {text!r} ({whole[0]} has no scale for each channel); choices: {CHOICES}")
    try:
        return MixedFormat(tuple(parts))  # type: ignore[arg-type]
    except ValueError as error:
        raise ValueError(f"unknown format {text!r} ({error}); choices: {CHOICES}") from None


def has_channel_scales(format: Format) -> bool:
    """Whether a weight in this format has one scale for each channel, so that channels may differ in format."""
    return isinstance(format, IntFormat | FloatFormat) and format.scaled


def mixed_formats(formats: Sequence[Format], groups: int) -> tuple[MixedFormat, ...]:
    """Return the mixes of formats for groups of output channels: no group has more bits than a more sensitive one.

    Args:
        formats: Formats to mix; those without a scale for each channel are formats of whole layers alone.
        groups: Groups of output channels in a layer.
    """
    falling = sorted(filter(has_channel_scales, formats), key=lambda format: -format.bits)
    parts = itertools.combinations_with_replacement(falling, groups)
    return tuple(MixedFormat(own) for own in parts if len(set(own)) > 1)  # type: ignore[arg-type]


def values_per_scale(format: Format) -> int | None:
    """Return how many values along the reduction axis share a scale; None if whole channels or the tensor do."""
    if isinstance(format, GroupFormat):
        return format.size
    return format.block_size if isinstance(format, BlockFormat) else None


def bits_in_rows(bits: float, format: Format, row: int) -> float:
    """Return the bits of a value in rows whose last group or block may be short: it has a whole scale nevertheless.

    Args:
        bits: Bits of a value in whole groups or blocks, with its share of their scale.
        format: The format that these bits are of.
        row: Values in a row.
    """
    size = values_per_scale(format)
    if size is None or row % size == 0:
        return bits
    assert isinstance(format, BlockFormat | GroupFormat)
    return format.element.bits + (bits - format.element.bits) * size * math.ceil(row / size) / row


def activation_format(format: Format) -> Format:
    """Return the activation format that goes with a weight format: the same, but float for groups of values.

    Of groups of output channels, the activations take the format of the most sensitive ones.
    """
    if isinstance(format, MixedFormat):
        return format.parts[0]
    return FLOAT if isinstance(format, GroupFormat) else format


def format_pairs(
    formats: Sequence[Format], weight_only: bool = False, separate_activations: bool = False, groups: int = 1
) -> tuple[tuple[Format, Format], ...]:
    """Return the (weight format, activation format) pairs that a search space of formats means.

    Args:
        formats: Formats to choose from.
        weight_only: Activations are in float.
        separate_activations: Any weight format may go with the activation format of any other.
        groups: Groups of output channels, whose weights may differ in format; the activations of a layer have one.
    """
    weights = (*formats, *(mixed_formats(formats, groups) if groups > 1 else ()))
    if weight_only:
        return tuple((weight, FLOAT) for weight in weights)
    if separate_activations:
        return tuple(itertools.product(weights, dict.fromkeys(map(activation_format, formats))))
    return tuple((weight, activation_format(weight)) for weight in weights)


def parse_search_space(text: str) -> tuple[Format, ...]:
    """Return the formats of a comma-separated list such as '2,4,8' or 'int4,e2m1,e4m3', in the order given.

    Raises:
        ValueError: For an empty entry, an unknown name, a format named twice, or fewer than two formats.
    """
    names = text.split(",")
    if any(not name.strip() for name in names):
        raise ValueError(f"search space {text!r} has an empty entry; write for example 4,8 or int4,e2m1,e4m3")
    formats = tuple(parse_format(name) for name in names)
    if mixed := [format for format in formats if isinstance(format, MixedFormat)]:
        raise ValueError(f"search space {text!r}: {mixed[0]} is a mix of formats; name these alone, and channel groups")
    if len(set(formats)) < len(formats):
        raise ValueError(f"search space {text!r} names a format twice; name each once")
    if len(formats) < 2:
        raise ValueError(f"search space {text!r} leaves no choice; name at least two formats")
    return formats
