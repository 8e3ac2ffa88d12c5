"""GGUF: a rounded weight in one of ggml's tensor types, with the codes and scales of the run.

ggml keeps 32 values of a row in a block: a scale in fp16 and codes of 4, 5 or 8 bits; the types that end in _1 also
keep the block's smallest value. Source: `ggml/src/ggml-common.h` of llama.cpp, and the package gguf.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from quant.export.layer_report import LayerVerdict
from quant.export.weights import RoundedWeight
from quant.formats import (
    FLOAT,
    BlockFormat,
    FloatFormat,
    FloatOff,
    Format,
    GroupFormat,
    IntFormat,
    MixedFormat,
    mx_element,
    values_per_scale,
)
from quant.kernels.groups import spread

BLOCK = 32
"""Values of a row that share a scale."""
BITS = {
    **{"Q4_0": 4.5, "Q4_1": 5.0, "Q5_0": 5.5, "Q5_1": 6.0, "Q8_0": 8.5, "MXFP4": 4.25},
    **{"F16": 16.0, "BF16": 16.0, "F32": 32.0},
}
"""Tensor type -> bits of a value, scales included."""
SYMMETRIC = {"Q4_0": 4, "Q5_0": 5, "Q8_0": 8}
"""Types of signed codes -> bits of a code."""
WITH_MINIMUM = {"Q4_1": 4, "Q5_1": 5}
"""Types of unsigned codes over a smallest value -> bits of a code."""
MOST_HALF = 65504.0
LLAMA_CPP_INPUTS = "llama.cpp rounds inputs by rules of its own: the file has no place for their format"


@dataclass(frozen=True)
class GgufTensor:
    """A tensor as a GGUF file holds it."""

    type: str
    """ggml's name of the type, such as 'Q4_0'."""
    data: np.ndarray
    """(rows, bytes per row) uint8 of block types, (rows, columns) of the other types, BF16 as its bits in uint16."""

    def rows(self, order: np.ndarray) -> GgufTensor:
        """Return the tensor with its rows in another order: row i is row `order[i]` of this one."""
        return GgufTensor(self.type, np.ascontiguousarray(self.data[order]))


def tensor_type(format: Format, columns: int, zero_point: bool = False) -> str:
    """Return the smallest type that holds the codes of a format.

    Args:
        format: The weight's format.
        columns: Length of its rows.
        zero_point: Whether its codes have zero points, for integers without groups (groups say it themselves).

    Returns:
        A key of `BITS`; F16, or F32 for formats of more than 11 bits, if no type of blocks does.
    """
    if isinstance(format, FloatOff) or format.name == "fp16":
        return "F16"
    if format.name == "bf16":
        return "BF16"
    if isinstance(format, FloatFormat | IntFormat) and _precision(format) > 11:
        return "F32"
    size = values_per_scale(format)
    if columns % BLOCK or (size is not None and size % BLOCK):
        return "F16"
    if format.name == "mxfp4":
        return "MXFP4"
    if isinstance(format, GroupFormat):
        zero_point = format.zero_point
    element = _element(format)
    if zero_point and isinstance(element, IntFormat):
        with_minimum = [kind for kind, width in WITH_MINIMUM.items() if element.width <= width]
        # elements of fewer than 8 bits stay within -127..127 whatever the zero point
        return with_minimum[0] if with_minimum else ("Q8_0" if element.width < 8 else "F16")
    most = element.qmax / element.smallest_subnormal
    return next((kind for kind, width in SYMMETRIC.items() if most < 2 ** (width - 1)), "F16")


def _element(format: Format) -> IntFormat | FloatFormat:
    assert not isinstance(format, FloatOff | MixedFormat)
    return format.element if isinstance(format, BlockFormat | GroupFormat) else format


def _precision(format: FloatFormat | IntFormat) -> int:
    """Bits that tell neighbouring values apart: those of an integer, or a minifloat's mantissa and leading one."""
    return format.width if isinstance(format, IntFormat) else format.mantissa + 1


def float_tensor(values: Tensor, type: str = "F16") -> GgufTensor:
    """Store values in a type without blocks.

    Args:
        values: Any floating dtype and shape.
        type: 'F16', which becomes 'F32' for values beyond it, 'BF16' or 'F32'.
    """
    values = values.detach().float().contiguous()
    if type == "BF16":
        return GgufTensor(type, values.bfloat16().view(torch.int16).numpy().view(np.uint16))
    if type == "F16" and bool((values.abs() <= MOST_HALF).all()):
        return GgufTensor(type, values.half().numpy())
    return GgufTensor("F32", values.numpy())


def weight_tensor(weight: RoundedWeight) -> GgufTensor:
    """Store a rounded weight of (rows, columns) with its own codes.

    Args:
        weight: The rounded weight of a Linear or an Embedding.
    """
    rows, columns = weight.elements.shape
    kind = tensor_type(weight.format, columns, weight.zero_point is not None)
    if BITS[kind] >= 16:
        return float_tensor(weight.values(), kind)
    if kind == "MXFP4":
        return GgufTensor(kind, _mxfp4(weight))
    step = _element(weight.format).smallest_subnormal
    unit = mx_element(weight.format)[1] if isinstance(weight.format, BlockFormat) else 1.0
    codes = (weight.elements / step).reshape(rows, -1, BLOCK)
    scale = _block_scales(weight.scale * unit * step, weight.in_block, rows, columns)
    half = scale.half()
    if isinstance(weight.format, BlockFormat) and bool(((half != scale).unsqueeze(-1) & (codes != 0)).any()):
        return float_tensor(weight.values())  # powers of two beyond fp16
    parts = [_bytes(half)]
    if kind in WITH_MINIMUM:
        assert weight.zero_point is not None
        lowest = _element(weight.format).qmax + 1 + weight.zero_point  # the smallest element is minus this
        lowest = _block_scales(lowest, weight.in_block, rows, columns)
        parts.append(_bytes((-lowest * half.float()).half()))
        codes = codes + lowest.unsqueeze(-1)
        width = WITH_MINIMUM[kind]
    else:
        width = SYMMETRIC[kind]
        codes = codes if width == 8 else codes + 2 ** (width - 1)
    parts.append(_codes(codes, width))
    return GgufTensor(kind, np.concatenate(parts, axis=-1).reshape(rows, -1))


def _block_scales(values: Tensor, size: int | None, rows: int, columns: int) -> Tensor:
    """Return numbers per channel, tensor or group as (rows, blocks)."""
    if size is None:
        return values.reshape(-1, 1).expand(rows, columns // BLOCK)
    return spread(values.reshape(rows, -1), size // BLOCK, columns // BLOCK)


def _bytes(values: Tensor) -> np.ndarray:
    """Return fp16 numbers (rows, blocks) as (rows, blocks, 2) uint8."""
    return values.contiguous().numpy()[..., None].view(np.uint8)


def _codes(codes: Tensor, width: int) -> np.ndarray:
    """Pack codes.

    Args:
        codes: (rows, blocks, 32) whole numbers; signed for 8 bits, else unsigned.
        width: 4, 5 or 8.

    Returns:
        (rows, blocks, bytes) uint8: the fifth bits of 5-bit codes first, then two codes a byte, value i with i + 16.
    """
    if width == 8:
        return codes.to(torch.int8).numpy().view(np.uint8)
    whole = codes.to(torch.uint8).numpy()
    low = whole & 15
    nibbles = low[..., : BLOCK // 2] | (low[..., BLOCK // 2 :] << 4)
    return nibbles if width == 4 else np.concatenate([np.packbits(whole >> 4, -1, "little"), nibbles], axis=-1)


def _mxfp4(weight: RoundedWeight) -> np.ndarray:
    """Return (rows, blocks x 17) uint8: of each block the power of two with a bias of 127, then codes of e2m1."""
    magnitudes = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])
    rows = len(weight.elements)
    elements = weight.elements.reshape(rows, -1, BLOCK)
    codes = torch.searchsorted(magnitudes, elements.abs()) + 8 * torch.signbit(elements)
    powers = (torch.log2(weight.scale.reshape(rows, -1, 1)) + 127).to(torch.uint8).numpy()
    return np.concatenate([powers, _codes(codes, 4)], axis=-1).reshape(rows, -1)


def gguf_verdict(weight: Format, activation: Format, type: str) -> LayerVerdict:
    """Say how a file holds a layer.

    Args:
        weight: Weight format that the run chose.
        activation: Activation format that the run chose.
        type: Type of the tensor.
    """
    bits, why = BITS[type], []
    if bits > weight.bits:
        fit = {"F16": ", rounded to 11 bits", "F32": ""}.get(type, f": a scale in fp16 for each {BLOCK} values")
        why.append(f"weights stored as {type}, {bits:g} bits a value{fit}")
    if activation != FLOAT:
        why.append(LLAMA_CPP_INPUTS)
    return LayerVerdict(weight, activation, type, FLOAT.name, bits, FLOAT.bits, tuple(why))
