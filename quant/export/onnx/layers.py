"""How an ONNX file holds one layer's weight and input: in which types, and what the verdict says of that."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np
import torch
from torch import Tensor

from quant.errors import UserError
from quant.export.layer_report import LayerVerdict
from quant.export.weights import RoundedWeight, StaticRange, plain_weight, round_weight, static_range, to_rows
from quant.formats import FLOAT, BlockFormat, FloatFormat, FloatOff, Format, IntFormat
from quant.quant_conv2d import QuantConv2d
from quant.quant_linear import QuantLinear
from quant.quant_module import QuantModule


@dataclass(frozen=True)
class Storage:
    """A type that a file can hold values in."""

    name: str
    dtype: Any
    """its numpy type"""
    bits: int
    dequantized: bool = True
    """whether DequantizeLinear reads it; else Cast does"""


INT_STORAGE = (Storage("int4", ml_dtypes.int4, 4), Storage("int8", np.int8, 8), Storage("int16", np.int16, 16))
INT8, INT16 = INT_STORAGE[1:]
INT32_SUMS = 2**31
"""the least size of a sum that int32 does not hold"""
FLOAT8_STORAGE = (
    Storage("float8e4m3fn", ml_dtypes.float8_e4m3fn, 8),
    Storage("float8e5m2", ml_dtypes.float8_e5m2, 8),
)
FLOAT_STORAGE = (
    *FLOAT8_STORAGE,
    Storage("float16", np.float16, 16, dequantized=False),
    Storage("bfloat16", ml_dtypes.bfloat16, 16, dequantized=False),
)
NAMES = {"float8e4m3fn": "e4m3", "float8e5m2": "e5m2", "float16": "fp16", "bfloat16": "bf16"}
"""ONNX's names of types that are formats of ours"""


@dataclass(frozen=True)
class OnnxLayer:
    """How one layer's weight and input are held in the file."""

    name: str
    formats: tuple[Format, Format]
    weight: RoundedWeight | None
    weight_storage: Storage | None
    range: StaticRange | None
    input_storage: Storage | None
    """None with a format: the input is rounded by float operations alone"""
    transposed: bool
    """whether the file holds the weight as (in, out), what a matrix product takes, and the layer as (out, in)"""
    float_weight: Tensor
    overflows: bool = False
    """whether int32, in which engines add products of integers up, may not hold what one output adds up to"""
    owner: str = ""
    """the layer that a weight is stored with which several share; empty: this one"""

    @classmethod
    def of(cls, name: str, module: QuantModule, integers: bool = False) -> OnnxLayer:
        """integers: a convolution of integers is to be computed in integers, which have 8 bits."""
        weight, quantizer = round_weight(name, module), module.input_quantizer
        range = static_range(name, module)
        if quantizer.format.scaled and range is None:
            raise UserError(
                f"--format onnx: the input of {name} has no fixed range (--per_token, or ranges found at run time); "
                "QuantizeLinear needs one: choose --format packed, or run again without --per_token"
            )
        storage = None if weight is None else weight_storage(weight)
        inputs = input_storage(quantizer.format)
        transposed = isinstance(module, QuantLinear)
        overflows = sums_overflow(weight, range, module.weight_quantizer.reduction_dim)
        if overflows:
            inputs = INT16  # the same values, which no engine multiplies as integers
        elif integers and isinstance(module, QuantConv2d) and all(map(narrow, module.formats)):
            inputs = INT8
        made = weight, storage, range, inputs, transposed, plain_weight(name, module).float(), overflows
        return cls(name, module.formats, *made)

    @property
    def in_integers(self) -> bool:
        """Whether weight and input are integers of at most 8 bits: engines multiply those of 8."""
        return all(map(narrow, self.formats)) and not self.overflows

    @property
    def is_product(self) -> bool:
        """Whether this is a matrix product, not a convolution."""
        return self.float_weight.dim() == 2

    @property
    def float8(self) -> bool:
        """Whether the weight or the input is held in a type of 8 bits that is no integer."""
        return not {self.weight_storage, self.input_storage}.isdisjoint(FLOAT8_STORAGE)

    @property
    def emulated(self) -> bool:
        """Whether float operations round the input, since no type has its grid."""
        own = self.input_storage is not None and own_name(self.input_storage) == self.formats[1].name
        return not isinstance(self.formats[1], FloatOff | IntFormat) and not own

    @property
    def verdict(self) -> LayerVerdict:
        weight, activation = self.formats
        stored, bits, why = weight.name, weight.bits, []
        if self.weight is not None:
            stored = "float32" if self.weight_storage is None else own_name(self.weight_storage)
            element_bits = FLOAT.bits if self.weight_storage is None else self.weight_storage.bits
            bits = element_bits
            if isinstance(weight, BlockFormat) and self.weight_storage is not None:
                bits += 32 / weight.block_size
                why.append(f"weights: {weight} as {stored} with float32 block scales, ONNX Runtime has no {weight}")
            elif stored != weight.name:
                why.append(f"weights: {weight} values stored as {stored}, ONNX Runtime has no {weight}")
        run, activation_bits = activation.name, activation.bits
        if activation != FLOAT:
            run = "float32" if self.input_storage is None else own_name(self.input_storage)
            activation_bits = FLOAT.bits if self.input_storage is None else self.input_storage.bits
            if run != activation.name:
                how = "rounded by float operations, held" if self.emulated else "clipped to their range, held"
                reason = f"ONNX Runtime has no {activation}"
                if self.overflows:
                    reason = "ONNX Runtime adds products of bytes up in int32, which these long rows would overflow"
                why.append(f"activations: {activation} values {how} as {run}, {reason}")
        return LayerVerdict(weight, activation, stored, run, bits, activation_bits, tuple(why))


def sums_overflow(weight: RoundedWeight | None, range: StaticRange | None, reduction_dim: int | None) -> bool:
    """Whether products of integers of at most 8 bits could add up to more than int32 holds, for inputs on the grid."""
    if weight is None or range is None or not (narrow(weight.format) and narrow(range.format)):
        return False
    rows = to_rows(weight.elements.abs(), reduction_dim).sum(1, dtype=torch.float64)
    return float(rows.max()) * max(-range.low, range.high) >= INT32_SUMS


def narrow(format: Format) -> bool:
    """Whether a format is integers of at most 8 bits."""
    return isinstance(format, IntFormat) and format.width <= 8


def own_name(storage: Storage) -> str:
    """A type by our name for it, where it is one of our formats."""
    return NAMES.get(storage.name, storage.name)


def weight_storage(weight: RoundedWeight) -> Storage | None:
    """The smallest type that holds every element; None: float32."""
    if isinstance(weight.element, IntFormat):
        return next(storage for storage in INT_STORAGE if weight.element.width <= storage.bits)
    return storage_of(weight.element)


def input_storage(format: Format) -> Storage | None:
    """The type that QuantizeLinear rounds an input of `format` to; None: there is none."""
    if isinstance(format, IntFormat):
        return next(storage for storage in INT_STORAGE if format.width <= storage.bits)
    storage = storage_of(format) if isinstance(format, FloatFormat) else None
    return storage if storage is not None and storage.dequantized else None


def storage_of(format: FloatFormat) -> Storage | None:
    """The smallest type that holds every value of a minifloat."""
    for storage in FLOAT_STORAGE:
        limits = ml_dtypes.finfo(storage.dtype)
        step = float(limits.smallest_subnormal)
        fits = format.qmax <= float(limits.max) and format.smallest_subnormal >= step
        if fits and format.mantissa <= limits.nmant and format.smallest_subnormal >= step:
            return storage
    return None
