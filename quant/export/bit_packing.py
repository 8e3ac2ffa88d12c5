"""Codes, the integers that represent a format's values, and packing of their bits into bytes.

Integers are two's complement, minifloats sign-exponent-mantissa, MX block scales e8m0 (OCP MX v1.0, section 5.3).
"""

from __future__ import annotations

from typing import TypeAlias

import numpy as np

from quant.formats import FloatFormat, IntFormat

Array: TypeAlias = np.ndarray

_CODES_AT_ONCE = 2**20
"""Bounds the memory of packing; a multiple of 8, so that every part but the last ends at a byte boundary."""
_E8M0_BIAS = 127


def pack_bits(codes: Array, width: int) -> Array:
    """Pack codes into bytes, lowest bit first, without gaps.

    Args:
        codes: Integers, any shape with n elements, each in 0..2^width-1.
        width: Bits per code.

    Returns:
        uint8 (ceil(n * width / 8),).
    """
    flat = np.ascontiguousarray(codes, dtype=np.uint32).reshape(-1)
    places = np.arange(width, dtype=np.uint32)
    parts = [flat[start : start + _CODES_AT_ONCE] for start in range(0, flat.size, _CODES_AT_ONCE)]
    packed = [np.packbits(((part[:, None] >> places) & 1).astype(np.uint8), bitorder="little") for part in parts]
    return np.concatenate(packed) if packed else np.empty(0, np.uint8)


def unpack_bits(data: Array, width: int, count: int) -> Array:
    """Invert `pack_bits`.

    Args:
        data: uint8 (bytes,).
        width: Bits per code.
        count: Number of codes.

    Returns:
        uint32 (count,).

    Raises:
        ValueError: If `data` has another number of bytes.
    """
    if data.size != packed_bytes(count, width):
        raise ValueError(f"{count} codes of {width} bits take {packed_bytes(count, width)} bytes, got {data.size}")
    codes = np.empty(count, np.uint32)
    weights = (1 << np.arange(width)).astype(np.uint32)
    for start in range(0, count, _CODES_AT_ONCE):
        size = min(_CODES_AT_ONCE, count - start)
        part = data[start * width // 8 : start * width // 8 + packed_bytes(size, width)]
        bits = np.unpackbits(part, count=size * width, bitorder="little").reshape(size, width)
        codes[start : start + size] = (bits * weights).sum(axis=1, dtype=np.uint32)
    return codes


def packed_bytes(count: int, width: int) -> int:
    """Return the number of bytes that `count` codes of `width` bits take."""
    return -(-count * width // 8)


def encode(values: Array, format: IntFormat | FloatFormat) -> Array:
    """Return the codes of values; negative zero keeps its sign.

    Args:
        values: float32, any shape, on the format's grid, before the scale.
        format: The format.

    Returns:
        uint32 with the shape of values.
    """
    if isinstance(format, IntFormat):
        return values.astype(np.int64).astype(np.uint32) & np.uint32(2**format.width - 1)
    magnitude = np.abs(values.astype(np.float64))
    exponent = np.where(magnitude > 0, np.maximum(np.frexp(magnitude)[1] - 1, format.emin), format.emin)
    steps = np.ldexp(magnitude, format.mantissa - exponent).astype(np.int64)  # at least 2^mantissa for normal values
    field = (exponent - format.emin) * 2**format.mantissa + steps  # a leading one raises the exponent field
    return (field + (np.signbit(values).astype(np.int64) << (format.exponent + format.mantissa))).astype(np.uint32)


def decode(codes: Array, format: IntFormat | FloatFormat) -> Array:
    """Return the values of codes.

    Args:
        codes: Integers, any shape.
        format: The format.

    Returns:
        float32 with the shape of codes.
    """
    signed = codes.astype(np.int64)
    if isinstance(format, IntFormat):
        half = 2 ** (format.width - 1)
        return ((signed ^ half) - half).astype(np.float32)
    sign, magnitude = np.divmod(signed, 2 ** (format.exponent + format.mantissa))
    exponent, fraction = np.divmod(magnitude, 2**format.mantissa)
    steps = np.where(exponent > 0, fraction + 2**format.mantissa, fraction).astype(np.float64)
    value = np.ldexp(steps, np.maximum(exponent, 1) - 1 + format.emin - format.mantissa)
    return np.where(sign > 0, -value, value).astype(np.float32)


def encode_powers(powers: Array) -> Array:
    """Return the e8m0 codes, uint8, of powers of two from 2^-127 to 2^127."""
    return (np.frexp(powers.astype(np.float64))[1] - 1 + _E8M0_BIAS).astype(np.uint8)


def decode_powers(codes: Array) -> Array:
    """Return the powers of two, float32, of e8m0 codes."""
    return np.ldexp(1.0, codes.astype(np.int64) - _E8M0_BIAS).astype(np.float32)
