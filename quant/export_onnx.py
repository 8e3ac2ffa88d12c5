"""ONNX with QuantizeLinear/DequantizeLinear: weights in the smallest type that holds their codes, inputs on their grid.

The model is traced by torch.onnx.export with two placeholders a layer, one where its input is rounded and one for its
weight; these are then replaced by ONNX's own nodes. Types: int4, int8, int16, float8e4m3fn and float8e5m2 of opset 21.
A format without a type of its own is stored in the next wider one that holds every value of its grid: the values stay
the same.
"""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import torch
from onnx import NodeProto, TensorProto, helper, numpy_helper
from torch import Tensor, nn

from quant.errors import UserError
from quant.export_emulation import emulate
from quant.export_verdict import LayerVerdict
from quant.export_weights import RoundedWeight, StaticRange, block_unit, plain_weight, round_weight, static_range
from quant.formats import FLOAT, BlockFormat, FloatFormat, FloatOff, Format, IntFormat
from quant.quant_linear import QuantConv1D, QuantLinear
from quant.quant_module import QuantModule

OPSET = 21
"""the first with int4, and with block scales in DequantizeLinear"""
DOMAIN = "mpq"
LARGEST_FILE = 2**31 - 1
"""bytes of a protobuf message; more would have to stand in files of their own"""
OUTPUT = "logits"


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
FLOAT_STORAGE = (
    Storage("float8e4m3fn", ml_dtypes.float8_e4m3fn, 8),
    Storage("float8e5m2", ml_dtypes.float8_e5m2, 8),
    Storage("float16", np.float16, 16, dequantized=False),
    Storage("bfloat16", ml_dtypes.bfloat16, 16, dequantized=False),
)
NAMES = {"float8e4m3fn": "e4m3", "float8e5m2": "e5m2", "float16": "fp16", "bfloat16": "bf16"}
"""ONNX's names of types that are formats of ours"""


def export_onnx(
    path: Path,
    model: nn.Module,
    modules: Mapping[str, QuantModule],
    inputs: Mapping[str, Tensor],
    fold: bool = False,
) -> dict[str, LayerVerdict]:
    """Write `model` with the quantized layers `modules`, in the formats they are set to now, to `path`.

    Args:
        inputs: an example of one or more rows: what the model is called with, by name. The first axis is the batch; it
            and the axis behind whole numbers (token ids, masks) may have other sizes when the file is run.
        fold: make int8 convolutions with their batch norm, bias and activation one integer operation. Faster, but ONNX
            Runtime then rounds their biases, and logits differ by more than float rounding.

    The file takes these inputs by name and returns `logits`. Raises UserError for ranges that only exist at run time,
    for an operation that ONNX lacks and for a model that does not pass ONNX's checker.
    """
    return write_onnx(path, trace(model, modules, inputs), modules, fold)


def write_onnx(
    path: Path, traced: onnx.ModelProto, modules: Mapping[str, QuantModule], fold: bool = False
) -> dict[str, LayerVerdict]:
    """`export_onnx` of a model that was traced, possibly in other formats: only blocks of inputs are in the trace."""
    layers = {name: OnnxLayer.of(name, module) for name, module in modules.items()}
    proto = onnx.ModelProto()
    proto.CopyFrom(traced)
    Replacement(proto, layers, fold).run()
    set_opset(proto)
    if proto.ByteSize() > LARGEST_FILE:
        raise UserError(f"--format onnx: the model takes {proto.ByteSize():,} bytes, a file holds {LARGEST_FILE:,}")
    try:
        onnx.checker.check_model(proto, full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        raise UserError(f"--format onnx: ONNX's checker refuses the model: {str(error).splitlines()[0]}") from None
    path.write_bytes(proto.SerializeToString())
    return {name: layer.verdict for name, layer in layers.items()}


def onnx_sizes(path: Path, layers: Mapping[str, LayerVerdict]) -> dict[str, int]:
    """Bytes of an ONNX file by what they hold, as `packed_sizes`; `header` is the graph."""
    sizes = dict.fromkeys(("codes", "block_scales", "scales", "zero_points", "float_weights", "rest"), 0)
    for tensor in onnx.load(path).graph.initializer:
        layer, _, part = tensor.name.partition(".weight.")
        if tensor.name.endswith((".weight", ".weight.codes")) and layer.removesuffix(".weight") in layers:
            kind = "float_weights" if layer.endswith(".weight") and not part else "codes"
        elif layer in layers and part == "scale":
            kind = "block_scales" if isinstance(layers[layer].weight, BlockFormat) else "scales"
        elif tensor.name.endswith(".input.scale"):
            kind = "scales"
        elif tensor.name.endswith((".input.zero_point", ".weight.zero_point")):
            kind = "zero_points"
        else:
            kind = "rest"
        sizes[kind] += len(tensor.raw_data) if tensor.HasField("raw_data") else numpy_helper.to_array(tensor).nbytes
    return {**sizes, "header": path.stat().st_size - sum(sizes.values())}


# ------------------------------------------------------ what becomes of a layer


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

    @classmethod
    def of(cls, name: str, module: QuantModule) -> OnnxLayer:
        weight, quantizer = round_weight(name, module), module.input_quantizer
        range = static_range(quantizer)
        if quantizer.format.scaled and range is None:
            raise UserError(
                f"--format onnx: the input of {name} has no fixed range (--per_token, or ranges found at run time); "
                "QuantizeLinear needs one: choose --format packed, or run again without --per_token"
            )
        storage = None if weight is None else weight_storage(weight)
        inputs = input_storage(quantizer.format)
        transposed = isinstance(module, QuantLinear)
        return cls(name, module.formats, weight, storage, range, inputs, transposed, plain_weight(name, module))

    @property
    def is_int8(self) -> bool:
        """Whether weight and input are integers of 8 bits."""
        return all(format == IntFormat(8) for format in self.formats)

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
                why.append(f"activations: {activation} values {how} as {run}, ONNX Runtime has no {activation}")
        return LayerVerdict(weight, activation, stored, run, bits, activation_bits, tuple(why))


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


# ------------------------------------------------------ tracing


class _Traced(nn.Module):
    """Stands in for a layer while the model is traced: placeholders where its input and weight are rounded."""

    def __init__(self, name: str, module: QuantModule) -> None:
        super().__init__()
        self.name = name
        self.module = module

    def forward(self, x: Tensor) -> Tensor:
        module = self.module
        for hook in module._forward_pre_hooks.values():  # a migrated layer divides its input, or shows it to a shortcut
            x = (hook(module, (x,)) or (x,))[0]
        activation = module.input_quantizer
        if isinstance(activation.format, BlockFormat):
            x = emulate(x, activation.format, activation.reduction_dim)
        else:
            x = placeholder("Input", self.name, x.shape, x)
        shape = module.weight.shape
        source = module.weight.new_empty(1)
        if isinstance(module, QuantLinear | QuantConv1D):
            # A plain product with the weight as (in, out), which engines recognise behind quantized operands.
            x = x @ placeholder("Weight", self.name, shape if isinstance(module, QuantConv1D) else shape[::-1], source)
            return x if module.bias is None else x + module.bias
        return module.compute(x, placeholder("Weight", self.name, shape, source))


def placeholder(kind: str, layer: str, shape: Any, x: Tensor) -> Tensor:
    """A node of our own domain, float32 of `shape`, to be replaced in the file."""
    symbolic = torch.onnx.ops.symbolic
    return symbolic(f"{DOMAIN}::{kind}", (x,), {"layer": layer}, dtype=torch.float32, shape=shape, version=1)


class _Logits(nn.Module):
    """The model as a function from its inputs, in order, to its logits."""

    def __init__(self, model: nn.Module, names: list[str]) -> None:
        super().__init__()
        self.model = model
        self.names = names

    def forward(self, *inputs: Tensor) -> Tensor:
        single = isinstance(self.model, nn.Sequential)  # its forward has a name for its input that says nothing
        output = self.model(*inputs) if single else self.model(**dict(zip(self.names, inputs, strict=True)))
        return output if isinstance(output, Tensor) else output["logits"]


def trace(model: nn.Module, modules: Mapping[str, QuantModule], inputs: Mapping[str, Tensor]) -> onnx.ModelProto:
    """The model as ONNX with placeholders. Raises UserError for an operation that ONNX lacks."""
    names = list(inputs)
    # One row would be taken for a model of batches of one.
    rows = [x if x.shape[0] > 1 else x.repeat(2, *(1,) * (x.dim() - 1)) for x in inputs.values()]
    axes = [{0: "batch", **({1: "length"} if x.dim() == 2 and not x.is_floating_point() else {})} for x in rows]
    traced = _Logits(model, names).eval()
    with _placeholders(model, modules), _quiet():
        try:
            program: Any = torch.onnx.export(
                traced,
                tuple(rows),
                input_names=names,
                output_names=[OUTPUT],
                opset_version=OPSET,
                dynamic_shapes=(tuple(axes),),
                dynamo=True,
                verbose=False,
            )
        except torch.onnx.errors.OnnxExporterError as error:
            cause: BaseException = error
            while cause.__cause__ is not None:
                cause = cause.__cause__
            reason = " ".join(str(cause).split())[:300]
            raise UserError(f"--format onnx: {type(model).__name__} cannot be exported: {reason}") from None
    return program.model_proto


@contextlib.contextmanager
def _placeholders(model: nn.Module, modules: Mapping[str, QuantModule]) -> Iterator[None]:
    """Within, the quantized layers of `model` are placeholders."""
    traced = {id(module): _Traced(name, module) for name, module in modules.items()}
    swapped = [
        (parent, key, child)
        for parent in list(model.modules())
        for key, child in list(parent._modules.items())
        if id(child) in traced
    ]
    try:
        for parent, key, child in swapped:
            parent._modules[key] = traced[id(child)]
        yield
    finally:
        for parent, key, child in swapped:
            parent._modules[key] = child


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """The exporter reports its progress on stdout and through loggers; what fails is raised anyway."""
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()), torch.no_grad():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(logging.NOTSET)


# ------------------------------------------------------ placeholders become ONNX's own nodes


class Replacement:
    """Replaces the placeholders of a traced model, in place."""

    def __init__(self, proto: onnx.ModelProto, layers: Mapping[str, OnnxLayer], fold: bool) -> None:
        self.fold = fold
        self.proto = proto
        self.graph = proto.graph
        self.layers = dict(layers)
        self.made: dict[str, str] = {}
        """layer -> its weight's tensor: made once, however often the layer is called"""
        self.new_nodes: list[NodeProto] = []

    def run(self) -> None:
        self._settle_convolutions()
        for node in list(self.graph.node):
            if node.domain != DOMAIN:
                self.new_nodes.append(node)
                continue
            layer = self.layers[layer_of(node)]
            source = self._weight(layer) if node.op_type == "Weight" else self._input(layer, node)
            # The name that the rest of the graph reads.
            self.new_nodes.append(helper.make_node("Identity", [source], list(node.output)))
        del self.graph.node[:]
        self.graph.node.extend(self.new_nodes)
        self._drop_identities()
        self._drop_unused()

    def _constant(self, name: str, value: Any) -> str:
        if name not in {tensor.name for tensor in self.graph.initializer}:
            self.graph.initializer.append(numpy_helper.from_array(np.ascontiguousarray(value), name))
        return name

    def _node(self, kind: str, inputs: list[str], output: str, **attributes: Any) -> str:
        self.new_nodes.append(helper.make_node(kind, inputs, [output], name=output, **attributes))
        return output

    def _input(self, layer: OnnxLayer, node: NodeProto) -> str:
        """Nodes that round a layer's input; returns the rounded tensor."""
        range, storage, x = layer.range, layer.input_storage, node.input[0]
        if range is None:
            return x
        start = f"{node.output[0]}/{layer.name}"
        if range.offset is not None:
            offset = self._constant(f"{layer.name}.input.offset", np.float32(range.offset))
            x = self._node("Sub", [x, offset], f"{start}/moved")
        scale = self._constant(f"{layer.name}.input.scale", np.float32(range.scale))
        if layer.emulated:
            x = self._emulated(layer, x, start)
        if storage is None:
            return x
        dtype = storage.dtype
        zero_point = range.zero_point
        if isinstance(range.format, IntFormat):
            low, high = range.low, range.high
            if high - low + 1 < 2**storage.bits:  # the type is wider than the grid
                bounds = [
                    self._constant(f"{layer.name}.input.{end}", np.float32(np.float32(value) * np.float32(range.scale)))
                    for end, value in (("low", low), ("high", high))
                ]
                x = self._node("Clip", [x, *bounds], f"{start}/clip")
            # Unsigned, the same codes moved: what processors multiply with signed weights.
            unsigned = {4: ml_dtypes.uint4, 8: np.uint8, 16: np.uint16}
            dtype, zero_point = unsigned[storage.bits], zero_point + 2 ** (storage.bits - 1)
        point = self._constant(f"{layer.name}.input.zero_point", np.asarray(zero_point).astype(dtype))
        codes = self._node("QuantizeLinear", [x, scale, point], f"{start}/codes")
        rounded = self._node("DequantizeLinear", [codes, scale, point], f"{start}/rounded")
        return rounded if range.offset is None else self._node("Add", [rounded, offset], f"{start}/back")

    def _emulated(self, layer: OnnxLayer, x: str, start: str) -> str:
        """Float operations that round to a minifloat, see `export_emulation`."""
        format, range = layer.formats[1], layer.range
        assert isinstance(format, FloatFormat) and range is not None

        def constant(value: float) -> str:
            return self._constant(f"{DOMAIN}.{np.float32(value)!r}", np.float32(value))

        count = 0

        def op(kind: str, *inputs: str) -> str:
            nonlocal count
            count += 1
            return self._node(kind, list(inputs), f"{start}/round{count}")

        scale = self._constant(f"{layer.name}.input.scale", np.float32(range.scale))
        y = op("Clip", op("Div", x, scale), constant(-format.qmax), constant(format.qmax))
        size = op("Max", op("Abs", y), constant(format.smallest_normal))
        exponent = op("Floor", op("Div", op("Log", size), constant(np.log(2.0))))
        power = op("Pow", constant(2.0), exponent)
        power = op("Where", op("Greater", power, size), op("Mul", power, constant(0.5)), power)
        double = op("Mul", power, constant(2.0))
        power = op("Where", op("LessOrEqual", double, size), double, power)
        step = op("Mul", power, constant(2.0**-format.mantissa))
        return op("Mul", op("Mul", op("Round", op("Div", y, step)), step), scale)

    def _weight(self, layer: OnnxLayer) -> str:
        """Nodes that make a layer's weight from its codes; returns the weight's tensor."""
        if layer.name in self.made:
            return self.made[layer.name]
        weight, storage, name = layer.weight, layer.weight_storage, f"{layer.name}.weight"
        if weight is None:
            plain = layer.float_weight.T if layer.transposed else layer.float_weight
            return self._constant(name, plain.float().numpy())
        blocked = isinstance(weight.format, BlockFormat)
        elements, scale = weight.elements, weight.scale
        if isinstance(weight.format, BlockFormat):
            factor = block_unit(weight.format) * (1 if weight.tensor_scale is None else weight.tensor_scale)
            scale = scale * factor
        point = None if weight.zero_point is None else weight.zero_point
        if point is not None:
            elements = elements + point
        # To the layout that the layer computes with: (in, out) behind a matrix product, else the weight's own.
        rows_last = layer.transposed or (blocked and layer.float_weight.dim() == 2)
        if rows_last:
            elements = elements.T
            scale = scale.T if scale.dim() == 2 else scale
            point = point.T if point is not None and point.dim() == 2 else point
        values = elements.numpy()
        if storage is None:
            made = self._constant(name, (elements * scale).numpy())
        else:
            codes = self._constant(f"{name}.codes", values.astype(storage.dtype))
            made = self._dequantized(layer, storage, codes, scale, point, name, rows_last)
        if blocked and layer.float_weight.dim() == 4:
            shape = self._constant(f"{name}.shape", np.asarray(layer.float_weight.shape, dtype=np.int64))
            made = self._node("Reshape", [made, shape], f"{name}.shaped")
        self.made[layer.name] = made
        return made

    def _dequantized(
        self,
        layer: OnnxLayer,
        storage: Storage,
        codes: str,
        scale: Tensor,
        point: Tensor | None,
        name: str,
        rows_last: bool,
    ) -> str:
        assert layer.weight is not None
        if isinstance(layer.weight.format, BlockFormat):
            factors = self._constant(f"{name}.scale", scale.numpy())
            size = layer.weight.format.block_size
            return self._node("DequantizeLinear", [codes, factors], name, axis=0 if rows_last else 1, block_size=size)
        if not storage.dequantized:
            values = self._node("Cast", [codes], f"{name}.cast", to=TensorProto.FLOAT)
            factors = self._constant(f"{name}.scale", scale.numpy())
            return self._node("Mul", [values, factors], name)
        if isinstance(layer.weight.element, FloatFormat):
            # ONNX Runtime takes two float8 operands of a product for integers: the scales stand apart.
            one = self._constant(f"{DOMAIN}.one", np.float32(1))
            values = self._node("DequantizeLinear", [codes, one], f"{name}.values")
            return self._node("Mul", [values, self._constant(f"{name}.scale", scale.numpy())], name)
        channel = next((axis for axis, size in enumerate(scale.shape) if size > 1), None)
        flat = () if channel is None else (-1,)
        inputs = [codes, self._constant(f"{name}.scale", scale.numpy().reshape(flat))]
        if point is not None:
            inputs.append(self._constant(f"{name}.zero_point", point.numpy().reshape(flat).astype(storage.dtype)))
        return self._node("DequantizeLinear", inputs, name, **({} if channel is None else {"axis": channel}))

    def _settle_convolutions(self) -> None:
        """Where a convolution's bias goes: ONNX Runtime rounds it to steps of input scale x weight scale.

        So it stays apart, in float. With `fold`, and in 8 bits where these steps are fine, a batch norm behind becomes
        part of scales and bias instead, and convolution and activation are one integer operation.
        """
        values = {tensor.name: numpy_helper.to_array(tensor) for tensor in self.graph.initializer}
        readers: dict[str, list[NodeProto]] = {}
        for node in self.graph.node:
            for source in node.input:
                readers.setdefault(source, []).append(node)
        weights = {n.output[0]: layer_of(n) for n in self.graph.node if n.domain == DOMAIN and n.op_type == "Weight"}
        calls = Counter(weights.values())
        kept = {output.name for output in self.graph.output}
        nodes: list[NodeProto] = []
        gone: set[str] = set()
        for node in self.graph.node:
            if node.output[0] in gone:
                continue
            nodes.append(node)
            if node.op_type != "Conv" or node.input[1] not in weights:
                continue
            layer = self.layers[weights[node.input[1]]]
            follow = readers.get(node.output[0], [])
            bias = values.get(node.input[2]) if len(node.input) > 2 else np.zeros(1, np.float32)
            if not (self.fold and layer.is_int8):
                if len(node.input) > 2 and bias is not None:
                    nodes.append(self._apart(node, layer, bias))
                continue
            norm = follow[0] if len(follow) == 1 and node.output[0] not in kept and calls[layer.name] == 1 else None
            if norm is None or norm.op_type != "BatchNormalization" or bias is None or layer.weight is None:
                continue
            if any(part not in values for part in norm.input[1:]) or layer.weight.zero_point is not None:
                continue
            factor, offset = norm_of(norm, [values[part].astype(np.float64) for part in norm.input[1:]])
            self.layers[layer.name] = replace(layer, weight=scaled(layer.weight, torch.from_numpy(factor)))
            del node.input[2:]
            node.input.append(self._constant(f"{layer.name}.bias", (bias * factor + offset).astype(np.float32)))
            node.output[0] = norm.output[0]
            gone.add(norm.output[0])
        del self.graph.node[:]
        self.graph.node.extend(nodes)

    def _apart(self, conv: NodeProto, layer: OnnxLayer, bias: np.ndarray) -> NodeProto:
        """The addition that takes over a convolution's bias."""
        output = conv.output[0]
        del conv.input[2:]
        conv.output[0] = f"{output}/product"
        added = self._constant(f"{layer.name}.bias", bias.reshape(1, -1, 1, 1))
        return helper.make_node("Add", [conv.output[0], added], [output], name=f"{output}/bias")

    def _drop_identities(self) -> None:
        """Every Identity made above, by giving its readers the name of its source."""
        outputs = {output.name for output in self.graph.output}
        names = {
            n.output[0]: n.input[0] for n in self.graph.node if n.op_type == "Identity" and n.output[0] not in outputs
        }
        for node in self.graph.node:
            for place, source in enumerate(node.input):
                while source in names:
                    source = names[source]
                node.input[place] = source
        rest = [n for n in self.graph.node if not (n.op_type == "Identity" and n.output[0] in names)]
        del self.graph.node[:]
        self.graph.node.extend(rest)

    def _drop_unused(self) -> None:
        """Initializers that nothing reads any more, and the shapes noted for tensors that are gone."""
        used = {source for node in self.graph.node for source in node.input} | {o.name for o in self.graph.output}
        kept = [tensor for tensor in self.graph.initializer if tensor.name in used]
        del self.graph.initializer[:]
        self.graph.initializer.extend(kept)
        del self.graph.value_info[:]
        for part in (self.proto, self.graph, *self.graph.node, *self.graph.input, *self.graph.output):
            del part.metadata_props[:]  # where in the source each node came from: as large as the weights


def layer_of(node: NodeProto) -> str:
    """The layer that a placeholder stands for."""
    name: bytes = helper.get_node_attr_value(node, "layer")
    return name.decode()


def norm_of(node: NodeProto, parts: list[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """A batch norm as y = factor * x + offset; parts: gamma, beta, mean, variance."""
    gamma, beta, mean, variance = parts
    epsilon = next((attribute.f for attribute in node.attribute if attribute.name == "epsilon"), 1e-5)
    factor = gamma / np.sqrt(variance + epsilon)
    return factor, beta - mean * factor


def scaled(weight: RoundedWeight, factor: Tensor) -> RoundedWeight:
    """The weight of a convolution times `factor` (channels,), its elements unchanged but for signs."""
    shape = (-1, *(1,) * (weight.elements.dim() - 1))
    gone = factor == 0
    elements = weight.elements * torch.where(gone, 0, factor.sign()).view(shape).to(weight.elements)
    # A scale of 0 is none: such a channel is 0 by its elements.
    size = torch.where(gone, 1, factor.abs()).view(shape)
    return replace(weight, elements=elements, scale=(weight.scale.double() * size).float())


def set_opset(proto: onnx.ModelProto) -> None:
    """Only ONNX's own operators, at `OPSET`, are left."""
    del proto.opset_import[:]
    proto.opset_import.append(helper.make_opsetid("", OPSET))
    proto.ir_version = helper.find_min_ir_version_for(list(proto.opset_import))
    del proto.functions[:]
