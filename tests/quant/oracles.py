"""Reference roundings in float64, written from the definitions, independent of the code under test."""

import ml_dtypes
import numpy as np
import torch

DTYPES = [
    ("e4m3", ml_dtypes.float8_e4m3fn),
    ("e5m2", ml_dtypes.float8_e5m2),
    ("e3m2", ml_dtypes.float6_e3m2fn),
    ("e2m3", ml_dtypes.float6_e2m3fn),
    ("e2m1", ml_dtypes.float4_e2m1fn),
    ("bf16", ml_dtypes.bfloat16),
    ("fp16", np.float16),
]
"""formats that another library has too"""
MINIFLOATS = [(exponent, mantissa) for exponent in range(1, 9) for mantissa in range(1, 16 - exponent)]
"""every (exponent, mantissa) of at most 16 bits"""


def float_values(exponent: int, mantissa: int, reserved: int = 0) -> np.ndarray:
    """Values of a minifloat by code, float64, ascending; without the top `reserved` codes and those past float32."""
    codes = np.arange(2 ** (exponent + mantissa) - reserved)
    e, m = np.divmod(codes, 2**mantissa)
    bias = 2 ** (exponent - 1) - 1
    normal, subnormal = (1 + m / 2**mantissa) * 2.0 ** (e - bias), m * 2.0 ** (1 - bias - mantissa)
    values = np.where(e == 0, subnormal, normal)
    return values[values <= np.finfo(np.float32).max]


def nearest(v: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Round v to +-values, ties to the even code, saturating; NaN stays NaN and zero keeps its sign. float64."""
    magnitude = np.abs(v.astype(np.float64))
    low = np.clip(np.searchsorted(values, magnitude, side="right") - 1, 0, len(values) - 1)
    high = np.minimum(low + 1, len(values) - 1)
    middle = (values[low] + values[high]) / 2
    up = (magnitude > middle) | ((magnitude == middle) & (low % 2 == 1))
    rounded = np.where(up, values[high], values[low])
    return np.where(np.isnan(v), np.nan, np.copysign(rounded, v))


def bit_patterns(count: int, seed: int = 0) -> np.ndarray:
    """Random float32 bit patterns, sorted by value (NaN last), which makes table searches fast."""
    bits = np.random.default_rng(seed).integers(0, 2**32, count, dtype=np.uint32)
    return np.sort(bits.view(np.float32))


def bfloat16_patterns() -> np.ndarray:
    """All 2^16 bfloat16 values as float32, -0.0, infinities, NaN and subnormals among them."""
    return (np.arange(2**16, dtype=np.uint32) << 16).view(np.float32)


def around(points: np.ndarray) -> np.ndarray:
    """The points and the float32 numbers next to them, with both signs."""
    points = points.astype(np.float32)
    points = points[np.isfinite(points)]
    near = [points, np.nextafter(points, np.float32(np.inf)), np.nextafter(points, np.float32(-np.inf))]
    return np.concatenate([*near, *(-part for part in near)])


def middles(values: np.ndarray) -> np.ndarray:
    """Midpoints between neighbours, and the values themselves."""
    return np.concatenate([(values[1:] + values[:-1]) / 2, values])


def assert_same_bits(actual: torch.Tensor, expected: torch.Tensor) -> None:
    """Equal dtype, shape and bits; any NaN equals any NaN."""
    assert actual.dtype == expected.dtype and actual.shape == expected.shape
    nan = expected.isnan()
    assert torch.equal(actual.isnan(), nan)
    integer = {2: torch.int16, 4: torch.int32}[actual.element_size()]
    a, b = actual.contiguous().view(integer), expected.contiguous().view(integer)
    different = (a != b) & ~nan
    assert not different.any(), (
        f"{int(different.sum())} differ, first {actual[different][:3]} != {expected[different][:3]}"
    )
