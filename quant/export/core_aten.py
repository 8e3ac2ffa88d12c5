"""A quantized model as a graph of core ATen operations, which ExecuTorch and other compilers of torch.export read.

Weights are integers behind torch's own dequantize operations, inputs are rounded by its quantize and dequantize
operations (`quantized_decomposed`). Integers over 8 bits, minifloats and block formats have no such operation for
weights: their rounded values are constants in float32. Inputs in them are rounded by float operations.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.ao.quantization.fx import _decomposed  # noqa: F401  registers quantized_decomposed

from quant.errors import UserError
from quant.export.layer_report import LayerVerdict
from quant.export.weights import StaticRange, plain_weight, round_weight, static_range
from quant.formats import FLOAT, BlockFormat, FloatFormat, FloatOff, Format, GroupFormat, IntFormat
from quant.kernels.emulation import emulate, round_minifloat
from quant.kernels.groups import from_rows
from quant.module_utils import OfOrderedInputs
from quant.quant_embedding import QuantEmbedding
from quant.quant_experts import ExpertLinear
from quant.quant_module import QuantModule

OPS = torch.ops.quantized_decomposed
INT8 = IntFormat(8)
FLOAT32 = "float32"
SCALE_BITS = 32
"""Bits of a scale in the graph."""


class CoreLayer(nn.Module):
    """A quantized layer in operations that a graph of core ATen has.

    Args:
        name: Name of the layer, for errors.
        module: The layer, in its formats.
    """

    def __init__(self, name: str, module: QuantModule) -> None:
        super().__init__()
        self.layer = _without_weight(module)
        self.weight = _weight(name, module)
        self.input = _input(name, module)

    def __getattr__(self, name: str) -> Any:
        """Return a setting of the layer, such as its stride: models read them to pad its input."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self._modules["layer"], name)

    def forward(self, x: Tensor) -> Tensor:
        """Compute the layer: x as the layer takes it."""
        made: Tensor = self.layer.compute(self.input(x), self.weight())
        return made


def _without_weight(module: QuantModule) -> Any:
    """Return the layer with its bias and settings alone."""
    plain = copy.copy(module)
    plain._parameters = {"bias": module._parameters.get("bias")}
    plain._modules, plain._buffers = {}, {}
    return plain


class _Constant(nn.Module):
    """A weight in float32."""

    def __init__(self, values: Tensor) -> None:
        super().__init__()
        self.register_buffer("values", values.detach().float().contiguous())

    def forward(self) -> Tensor:
        """Return the weight."""
        values: Tensor = self.values  # type: ignore[assignment]
        return values


class _Integers(nn.Module):
    """A weight in integers with a scale per channel."""

    def __init__(self, codes: Tensor, scale: Tensor, zero_point: Tensor, width: int, axis: int) -> None:
        super().__init__()
        self.register_buffer("codes", codes.to(torch.int8).contiguous())
        self.register_buffer("scale", scale.contiguous())
        self.register_buffer("zero_point", zero_point.to(torch.int64).contiguous())
        self.axis, self.bounds = axis, IntFormat(width).bounds("full")

    def forward(self) -> Tensor:
        """Return the values of the codes."""
        made: Tensor = OPS.dequantize_per_channel(
            self.codes, self.scale, self.zero_point, self.axis, *self.bounds, torch.int8
        )
        return made


class _Groups(_Integers):
    """A weight (out, in) in integers with a scale for each group of a row.

    Each group is a channel of `dequantize_per_channel`: ExecuTorch has no kernel for `dequantize_per_channel_group`.
    """

    def __init__(self, codes: Tensor, scale: Tensor, zero_point: Tensor, format: GroupFormat) -> None:
        super().__init__(codes.reshape(-1, format.size), scale.flatten(), zero_point.flatten(), format.width, 0)
        self.shape = codes.shape

    def forward(self) -> Tensor:
        """Return the values of the codes."""
        return super().forward().reshape(self.shape)


def _weight(name: str, module: QuantModule) -> nn.Module:
    rounded = round_weight(name, module)
    if rounded is None:
        return _Constant(plain_weight(name, module))
    dim = module.weight_quantizer.reduction_dim
    if stored_width(module) is None:
        values = rounded.values()
        return _Constant(values if rounded.in_block is None else from_rows(values, module.weight.shape, dim))
    point = torch.zeros_like(rounded.scale) if rounded.zero_point is None else rounded.zero_point
    if isinstance(rounded.format, GroupFormat):
        codes = rounded.elements + point.repeat_interleave(rounded.format.size, 1)
        return _Groups(codes, rounded.scale, point, rounded.format)
    axis = 0 if dim is None or dim % module.weight.dim() else 1  # transformers' Conv1D has its outputs last
    channels = module.weight.shape[axis]
    width = int(rounded.element.bits)
    scale, points = (values.reshape(-1).expand(channels) for values in (rounded.scale, point))
    return _Integers(rounded.elements + point, scale, points, width, axis)


def stored_width(module: QuantModule) -> int | None:
    """Return the bits of the integers that a weight is stored in: 8; None if its values are stored in float32."""
    format = module.formats[0]
    if isinstance(module, QuantEmbedding):
        return None
    if isinstance(format, GroupFormat):
        last = module.weight_quantizer.reduction_dim in (None, -1, 1) and module.weight.dim() == 2
        return 8 if last and module.weight.shape[-1] % format.size == 0 else None
    return 8 if isinstance(format, IntFormat) and format.width <= 8 else None


class _Same(nn.Module):
    """An input in float."""

    def forward(self, x: Tensor) -> Tensor:
        """Return x."""
        return x


class _Static(nn.Module):
    """An input in a fixed range."""

    def __init__(self, range: StaticRange) -> None:
        super().__init__()
        self.range = range

    def forward(self, x: Tensor) -> Tensor:
        """Return x, rounded."""
        range = self.range
        x = x if range.offset is None else x - range.offset
        if isinstance(range.format, IntFormat):
            x = self._integers(x, range.format.width)
        else:
            x = round_minifloat(x / range.scale, range.format) * range.scale
        return x if range.offset is None else x + range.offset

    def _integers(self, x: Tensor, width: int) -> Tensor:
        range = self.range
        dtype, lowest = (torch.int8, -128) if width <= 8 else (torch.int16, -32768)
        fits = range.low >= lowest and range.high < -lowest
        point = 0 if fits else int(lowest - range.low)
        grid = range.scale, point, int(range.low) + point, int(range.high) + point, dtype
        made: Tensor = OPS.dequantize_per_tensor(OPS.quantize_per_tensor(x, *grid), *grid)
        return made


class _PerToken(nn.Module):
    """An input in int8 with a scale and a zero point for each token; of images, for each position.

    Args:
        features: Axis of a token's features, which the operations expect last.
    """

    def __init__(self, features: int) -> None:
        super().__init__()
        self.features = features

    def forward(self, x: Tensor) -> Tensor:
        """Return x, rounded."""
        x = x.movedim(self.features, -1)
        scale, point = OPS.choose_qparams_per_token_asymmetric(x, torch.int8)
        grid = scale, point, -128, 127, torch.int8
        made: Tensor = OPS.dequantize_per_token(OPS.quantize_per_token(x, *grid), *grid, torch.float32)
        return made.movedim(-1, self.features)


class _Blocks(nn.Module):
    """An input in a block format."""

    def __init__(self, format: BlockFormat, dim: int | None) -> None:
        super().__init__()
        self.format, self.dim = format, dim

    def forward(self, x: Tensor) -> Tensor:
        """Return x, rounded."""
        return emulate(x, self.format, self.dim)


def _input(name: str, module: QuantModule) -> nn.Module:
    quantizer = module.input_quantizer
    format = quantizer.format
    if isinstance(format, FloatOff) or input_reason(module) is not None:
        return _Same()
    if isinstance(format, BlockFormat):
        return _Blocks(format, quantizer.reduction_dim)
    range = static_range(name, module)
    return _PerToken(module.input_reduction_dim) if range is None else _Static(range)


def input_reason(module: QuantModule) -> str | None:
    """Return why the inputs of a layer are read in float; None if they are rounded, or in float anyway."""
    config, format = module.input_quantizer.config, module.formats[1]
    if not isinstance(format, IntFormat | FloatFormat) or not format.scaled or config.range != "dynamic":
        return None
    token = config.granularity == "token" and config.observer == "minmax" and not config.percentile
    if format == INT8 and token and not config.symmetric:
        return None
    return f"torch has no operation that rounds to {format} in ranges found at run time like these"


def core_verdict(module: QuantModule) -> LayerVerdict:
    """Say how the graph holds a layer."""
    weight, activation = module.formats
    why, bits, stored = [], weight.bits, weight.name
    if weight != FLOAT and stored_width(module) is None:
        stored, bits = FLOAT32, 32
        why.append("rounded weights in float32: torch dequantizes integers of at most 8 bits, in whole groups of a row")
    elif weight != FLOAT:
        assert isinstance(weight, IntFormat | GroupFormat)
        stored = "int8"
        bits = 8 + (2 * SCALE_BITS / weight.size if isinstance(weight, GroupFormat) else 0)
        if bits > weight.bits:
            why.append(f"weights in bytes, {bits:g} bits with scales")
    exported: Format = activation
    if (reason := input_reason(module)) is not None:
        exported = FLOAT
        why.append(f"inputs in float: {reason}")
    return LayerVerdict(weight, activation, stored, exported.name, bits, exported.bits, tuple(why))


def core_model(model: nn.Module, modules: Mapping[str, QuantModule]) -> nn.Module:
    """Return a copy of a model whose quantized layers use core ATen operations and torch's quantize operations.

    Args:
        model: The quantized model.
        modules: Its quantized layers by name, in their formats.

    Raises:
        UserError: A layer holds the matrices of many experts.
    """
    if stacked := [name for name, layer in modules.items() if isinstance(layer, ExpertLinear)]:
        raise UserError(f"--format executorch: {stacked[0]} holds the matrices of many experts; choose --format packed")
    layers = {id(module): CoreLayer(name, module) for name, module in modules.items()}
    plain = copy.deepcopy(model, {key: layer for key, layer in layers.items()})  # layers take the place of their own
    return plain.eval().requires_grad_(False)


class _Logits(OfOrderedInputs):
    """A model as a function of its inputs, in order, that returns the logits."""

    def forward(self, *inputs: Tensor) -> Tensor:
        """Return the logits; raise UserError if there are none."""
        output = super().forward(*inputs)
        if isinstance(output, Tensor):
            return output
        if not isinstance(output, Mapping) or "logits" not in output:
            raise UserError(
                f"--format executorch: the model returns a {type(output).__name__}, not a tensor or something with "
                "'logits'; choose --format packed or onnx"
            )
        logits: Tensor = output["logits"]
        return logits


def export_graph(
    model: nn.Module,
    modules: Mapping[str, QuantModule],
    inputs: Mapping[str, Tensor],
    dynamic: Any = None,
    decompose: bool = True,
) -> torch.export.ExportedProgram:
    """Export a model as a graph of core ATen operations.

    Args:
        model: The quantized model; it returns a tensor, or something with `logits`.
        modules: Its quantized layers by name, in their formats.
        inputs: Example inputs by name.
        dynamic: `dynamic_shapes` of torch.export.export, for the inputs in order.
        decompose: Reduce all operations to core ATen; a compiler that does so itself knows larger ones, such as linear.

    Returns:
        The program, whose operations are core ATen or in `quantized_decomposed`. It takes the inputs in order and
        returns the logits.

    Raises:
        UserError: torch.export cannot follow the model.
    """
    traced = _Logits(core_model(model, modules), list(inputs)).eval()
    shapes = None if dynamic is None else (tuple(dynamic),)
    try:
        with torch.no_grad():
            program = torch.export.export(traced, tuple(inputs.values()), dynamic_shapes=shapes)
    except (RuntimeError, ValueError, torch._dynamo.exc.TorchDynamoException) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"--format executorch: {type(model).__name__} cannot be exported: {reason}") from None
    program = program.run_decompositions() if decompose else program
    for node in list(program.graph.nodes):
        if node.target is torch.ops.aten._assert_tensor_metadata.default:
            program.graph.erase_node(node)  # a check of torch.export's own
    program.graph_module.recompile()
    return program


def unlike_core(program: torch.export.ExportedProgram) -> list[str]:
    """Return the names of operations of a program that are neither core ATen nor torch's quantize operations."""
    import operator

    found = set()
    for node in program.graph.nodes:
        if node.op != "call_function" or node.target is operator.getitem:
            continue
        core = torch.Tag.core in getattr(node.target, "tags", ())
        name = str(node.target)
        if not core and not name.startswith("quantized_decomposed."):
            found.add(name)
    return sorted(found)
