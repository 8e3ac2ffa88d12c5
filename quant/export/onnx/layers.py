"""Which ONNX types a layer's weight and input are stored in, and the verdict on that."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np
import torch
from torch import Tensor

from quant.engines.rules import holds
from quant.errors import UserError
from quant.export.layer_report import LayerVerdict
from quant.export.weights import RoundedWeight, StaticRange, plain_weight, round_weight, static_range
from quant.formats import FLOAT, BlockFormat, FloatFormat, FloatOff, Format, GroupFormat, IntFormat, MixedFormat
from quant.kernels.groups import to_rows
from quant.quant_conv2d import QuantConv2d
from quant.quant_embedding import QuantEmbedding
from quant.quant_linear import QuantLinear
from quant.quant_module import QuantModule


@dataclass(frozen=True)
class Storage:
    """A type of ONNX."""

    name: str
    dtype: Any
    """Its numpy dtype."""
    bits: int
    dequantized: bool = True
    """Whether DequantizeLinear reads it; otherwise Cast does."""


INT_STORAGE = (Storage("int4", ml_dtypes.int4, 4), Storage("int8", np.int8, 8), Storage("int16", np.int16, 16))
INT8, INT16 = INT_STORAGE[1:]
INT32_SUMS = 2**31
"""Smallest magnitude of a sum that does not fit into int32."""
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
"""ONNX type -> the format with the same values."""


@dataclass(frozen=True)
class OnnxLayer:
    """How a layer's weight and input are stored in the file."""

    name: str
    formats: tuple[Format, Format]
    weight: RoundedWeight | None
    weight_storage: Storage | None
    range: StaticRange | None
    input_storage: Storage | None
    """None although there is a format: float operations round the input."""
    transposed: bool
    """Whether the file stores the weight as (in, out), for MatMul, while the layer has (out, in)."""
    float_weight: Tensor
    overflows: bool = False
    """Whether an output could overflow int32, in which engines accumulate products of integers."""
    table: bool = False
    """Whether the layer is an embedding, whose rows are looked up."""
    owner: str = ""
    """The layer that a shared weight is stored under; empty: this one."""

    @classmethod
    def of(cls, name: str, module: QuantModule, integers: bool = False) -> OnnxLayer:
        """Choose the types for a layer in its current formats.

        Args:
            name: Name of the layer.
            module: The layer.
            integers: Whether integer convolutions are to run in integers, which requires 8-bit inputs.

        Raises:
            UserError: If the range of the input exists only at run time, or see `round_weight`.
        """
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
            inputs = INT16  # holds the same values, and no engine multiplies int16
        elif integers and isinstance(module, QuantConv2d) and all(map(narrow, module.formats)):
            inputs = INT8
        made = weight, storage, range, inputs, transposed, plain_weight(name, module).float(), overflows
        return cls(name, module.formats, *made, table=isinstance(module, QuantEmbedding))

    @property
    def group_storages(self) -> tuple[Storage, ...]:
        """The type of each group of output channels of a mix of integers; empty for all other weights."""
        weight = self.formats[0]
        if not isinstance(weight, MixedFormat) or self.weight is None:
            return ()
        integers = [integer_storage(part) for part in weight.parts if isinstance(part, IntFormat)]
        return tuple(integers) if len(integers) == len(weight.parts) else ()

    @property
    def in_integers(self) -> bool:
        """Whether engines can multiply weight and input as 8-bit integers."""
        return all(map(narrow, self.formats)) and not self.overflows

    @property
    def is_product(self) -> bool:
        """Whether the layer is a matrix product, not a convolution."""
        return self.float_weight.dim() == 2 and not self.table

    @property
    def unpacked_in_products(self) -> bool:
        """Whether engines unpack the weight, integers in groups, while they multiply it with float inputs."""
        return isinstance(self.formats[0], GroupFormat) and self.is_product and self.input_storage is None

    @property
    def emulated(self) -> bool:
        """Whether float operations round the input, because no type has exactly its values."""
        own = self.input_storage is not None and own_name(self.input_storage) == self.formats[1].name
        return not isinstance(self.formats[1], FloatOff | IntFormat) and not own

    @property
    def scale_bits(self) -> int:
        """Bits of the scale of a channel, block or group in the file.

        Scales of groups are fp16 values and those of MX powers of two: 16 bits hold them exactly.
        """
        if self.weight is None:
            return 32
        halved = isinstance(self.weight.format, BlockFormat | GroupFormat) and self.weight.tensor_scale is None
        return 16 if halved else 32

    @property
    def verdict(self) -> LayerVerdict:
        """Return the types in the file, and the reasons where they differ from the formats."""
        weight, activation = self.formats
        stored, bits, why = weight.name, weight.bits, []
        if self.weight is not None:
            stored = "float32" if self.weight_storage is None else own_name(self.weight_storage)
            element_bits: float = FLOAT.bits if self.weight_storage is None else self.weight_storage.bits
            if groups := self.group_storages:
                stored = "+".join(own_name(storage) for storage in groups)
                sizes = zip(self.weight.groups, groups, strict=True)
                element_bits = sum(len(channels) * storage.bits for channels, storage in sizes)
                element_bits /= self.weight.scale.numel()
            bits = element_bits
            if isinstance(weight, GroupFormat):
                element = weight.element.name
                scales = self.weight.scale.numel() / self.weight.elements.numel()  # a short group has one as well
                bits += (self.scale_bits + element_bits * weight.zero_point) * scales
                if stored == element:
                    stored = weight.name
                else:
                    why.append(f"weights: {weight} stored as {stored} in groups of {weight.size}")
            elif isinstance(weight, BlockFormat) and self.weight_storage is not None:
                bits += self.scale_bits * self.weight.scale.numel() / self.weight.elements.numel()
                scaled = f"block scales of {self.scale_bits} bits"
                why.append(f"weights: {weight} as {stored} with {scaled}, ONNX Runtime has no {weight}")
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
                elif isinstance(activation, IntFormat) and activation.width == 4:
                    reason = "ONNX Runtime's convolutions read bytes"
                why.append(f"activations: {activation} values {how} as {run}, {reason}")
        return LayerVerdict(weight, activation, stored, run, bits, activation_bits, tuple(why))


def sums_overflow(weight: RoundedWeight | None, range: StaticRange | None, reduction_dim: int | None) -> bool:
    """Whether an output of a layer in integers of at most 8 bits could overflow int32.

    Args:
        weight: The rounded weight.
        range: The range of the input.
        reduction_dim: The weight's axis that is summed over; None: all but the first.
    """
    if weight is None or range is None or not (narrow(weight.format) and narrow(range.format)):
        return False
    rows = to_rows(weight.elements.abs(), reduction_dim).sum(1, dtype=torch.float64)
    return float(rows.max()) * max(-range.low, range.high) >= INT32_SUMS


def narrow(format: Format) -> bool:
    """Whether a format has integers of at most 8 bits."""
    if isinstance(format, MixedFormat):
        return all(map(narrow, format.parts))
    return isinstance(format, IntFormat) and format.width <= 8


def own_name(storage: Storage) -> str:
    """Return the name of the format with the type's values, or the type's own name."""
    return NAMES.get(storage.name, storage.name)


def weight_storage(weight: RoundedWeight) -> Storage | None:
    """Return the smallest type that holds every element of a weight; None: float32."""
    if isinstance(weight.format, MixedFormat) and not any(holds(part, weight.format) for part in weight.format.parts):
        return None
    return integer_storage(weight.element) if isinstance(weight.element, IntFormat) else storage_of(weight.element)


def integer_storage(format: IntFormat) -> Storage:
    """Return the smallest type that holds every value of an integer format."""
    return next(storage for storage in INT_STORAGE if format.width <= storage.bits)


def input_storage(format: Format) -> Storage | None:
    """Return the type that QuantizeLinear rounds an input of this format to; None if there is none."""
    if isinstance(format, IntFormat):
        return integer_storage(format)
    storage = storage_of(format) if isinstance(format, FloatFormat) else None
    return storage if storage is not None and storage.dequantized else None


def storage_of(format: FloatFormat) -> Storage | None:
    """Return the smallest type that holds every value of a minifloat; None: float32."""
    for storage in FLOAT_STORAGE:
        limits = ml_dtypes.finfo(storage.dtype)
        step = float(limits.smallest_subnormal)
        fits = format.qmax <= float(limits.max) and format.smallest_subnormal >= step
        if fits and format.mantissa <= limits.nmant and format.smallest_subnormal >= step:
            return storage
    return None
