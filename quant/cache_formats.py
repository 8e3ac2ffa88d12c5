"""Formats of key-value caches: which there are, and what they take; without torch."""

from __future__ import annotations

from quant.errors import UserError
from quant.formats import BlockFormat, Format, GroupFormat, IntFormat, MixedFormat, parse_format

SCALE_BITS = 16
"""Bits of the scale that a token has in each head."""


def parse_cache_format(name: str) -> Format:
    """Parse the name of a format of caches.

    Raises:
        UserError: For an unknown name, or a format that a cache cannot have.
    """
    try:
        format = parse_format(name)
    except ValueError as error:
        raise UserError(f"--quantize_kv_cache: {error}") from None
    if isinstance(format, GroupFormat):
        instead = f"give {format.element.name}: it has a scale for each token and head"
        raise UserError(f"--quantize_kv_cache {name}: groups are formats of weights; {instead}")
    if isinstance(format, MixedFormat):
        raise UserError(f"--quantize_kv_cache {name}: a cache has no output channels to mix formats in")
    if isinstance(format, BlockFormat) and format.two_level:
        raise UserError(f"--quantize_kv_cache {name}: a cache that grows has no scale of the whole tensor; give mxfp4")
    return format


def parse_cache_formats(names: str) -> tuple[Format, ...]:
    """Parse a comma list of formats of caches; raises UserError as `parse_cache_format`, and for a repeated one."""
    formats = tuple(parse_cache_format(name.strip()) for name in names.split(","))
    if len(set(formats)) < len(formats):
        raise UserError(f"--quantize_kv_cache {names} names a format twice")
    return formats


def bits_per_value(format: Format, head_dim: int) -> float:
    """Return the bits that one value of a cache takes, with its share of the scale (fp16) and the zero point."""
    if not format.scaled:
        return format.bits
    zero_point = format.width if isinstance(format, IntFormat) else 0
    return format.bits + (SCALE_BITS + zero_point) / head_dim
