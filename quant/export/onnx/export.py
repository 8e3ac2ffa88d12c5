"""Export to ONNX with QuantizeLinear and DequantizeLinear.

torch.onnx.export traces the model with two placeholders per layer, one that rounds its input and one for its weight,
which are then replaced by nodes of ONNX. Types: int4, int8, int16, float8e4m3fn and float8e5m2 of opset 21. A format
without a type of its own is stored in the smallest type that holds all its values, so values do not change.
"""

from __future__ import annotations

import contextlib
import copy
import io
import logging
import re
import warnings
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import onnx
import torch
from onnx import helper, numpy_helper
from torch import Tensor, nn

from quant.analysis.tied import stored_with
from quant.convert import in_float
from quant.errors import UserError
from quant.export.layer_report import LayerVerdict, left_in_float
from quant.export.onnx.bounds import fold_bounds, join_bounds
from quant.export.onnx.integer_ops import round_outputs
from quant.export.onnx.layers import OnnxLayer
from quant.export.onnx.nodes import DOMAIN, Replacement, layer_of
from quant.export.onnx.padding import fold_padding
from quant.export.onnx.simplify import simplify, store_in_half
from quant.export.weights import never_called, static_range
from quant.formats import BlockFormat, GroupFormat
from quant.kernels.emulation import emulate
from quant.module_utils import OfOrderedInputs, evaluating
from quant.quant_embedding import QuantEmbedding
from quant.quant_experts import ExpertLinear
from quant.quant_linear import QuantConv1D, QuantLinear
from quant.quant_module import QuantModule
from quant.transforms.computed_weights import norm_hook, weight_of

OPSET = 21
"""The first opset with int4 and with block scales in DequantizeLinear."""
LARGEST_FILE = 2**31 - 1
"""Limit of a protobuf message, in bytes; larger models would need external data files."""
OUTPUT = "logits"
"""Name of the output of a model that returns a tensor."""
CACHES = ("past_key_values", "past_buckets_states", "cache_params")
"""Keys of outputs that hold what the next call needs."""
HALF = (torch.float16, torch.bfloat16)
PRIVATE = "public."
"""Prefix of inputs' and outputs' names during tracing, so that no node takes the same name."""
HOOKS = ("_forward_pre_hooks", "_forward_pre_hooks_with_kwargs", "_forward_hooks", "_forward_hooks_with_kwargs")


def export_onnx(
    path: Path,
    model: nn.Module,
    modules: Mapping[str, QuantModule],
    inputs: Mapping[str, Tensor],
    examples: Sequence[Mapping[str, Tensor]] = (),
) -> dict[str, LayerVerdict]:
    """Write a model in its current formats.

    The file takes the inputs by name and returns every tensor of the model's output by name: `logits` for a single one,
    the keys of a mapping, `output_0` and so on of a tuple. All floats are float32, even if the model computes in half
    precision. Layers that the model never calls are left out.

    Args:
        path: The file to write.
        model: The quantized model.
        modules: Its quantized layers, by name.
        inputs: Example inputs of the model, by name, with one or more rows. The first axis is the batch; it and the
            last axis of integer tensors (token ids, masks) may have other sizes when the file is run.
        examples: Batches of such inputs. If given, the outputs of integer convolutions are also rounded to 8 bits, with
            the ranges of these batches, and ONNX Runtime computes them in integers. That is faster, but biases and
            shortcuts are rounded too, and logits differ by more than float rounding.

    Returns:
        How each layer is stored, by name.

    Raises:
        UserError: For experts, ranges that exist only at run time, operations that ONNX lacks, and models that ONNX's
            checker rejects.
    """
    return write_onnx(path, trace(model, modules, inputs), modules, examples)


def write_onnx(
    path: Path,
    traced: onnx.ModelProto,
    modules: Mapping[str, QuantModule],
    examples: Sequence[Mapping[str, Tensor]] = (),
) -> dict[str, LayerVerdict]:
    """Write a model that was traced before, maybe in other formats: a trace depends only on block formats of inputs.

    Args:
        path: The file to write.
        traced: What `trace` returned.
        modules: The quantized layers, by name, in the formats to write.
        examples: See `export_onnx`.

    Returns:
        How each layer is stored, by name.

    Raises:
        UserError: See `export_onnx`.
    """
    uncalled = never_called(modules)
    check_uncalled(traced, uncalled)
    layers = {name: OnnxLayer.of(name, m, bool(examples)) for name, m in modules.items() if name not in uncalled}
    layers |= {
        name: replace(layers[name], owner=owner)
        for name, owner in stored_with(modules).items()
        if name in layers and layers[name].transposed == layers[owner].transposed  # a head's, but not a table's
    }
    proto = onnx.ModelProto()
    proto.CopyFrom(traced)
    fold_padding(proto.graph, layers)
    Replacement(proto, layers, bool(examples)).run()
    set_opset(proto)
    join_bounds(proto.graph)
    if examples:
        round_outputs(proto, [_widened(example) for example in examples])
        fold_bounds(proto.graph)
    store_in_half(proto.graph, {f"{name}.weight.scale" for name, layer in layers.items() if layer.scale_bits == 16})
    helper.set_model_props(proto, session_settings(layers.values()))
    if proto.ByteSize() > LARGEST_FILE:
        raise UserError(f"--format onnx: the model takes {proto.ByteSize():,} bytes, a file holds {LARGEST_FILE:,}")
    try:
        onnx.checker.check_model(proto, full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        raise UserError(f"--format onnx: ONNX's checker refuses the model: {str(error).splitlines()[0]}") from None
    Path(path).write_bytes(proto.SerializeToString())
    return {
        name: left_in_float(module) if name in uncalled else layers[name].verdict for name, module in modules.items()
    }


def check_uncalled(traced: onnx.ModelProto, uncalled: Mapping[str, QuantModule]) -> None:
    """Raise UserError for a layer that calibration did not reach although the model calls it."""
    for name in {layer_of(node) for node in traced.graph.node if node.domain == DOMAIN} & uncalled.keys():
        static_range(name, uncalled[name])


def set_opset(proto: onnx.ModelProto) -> None:
    """Declare the opset of a model whose placeholders have been replaced."""
    del proto.opset_import[:]
    proto.opset_import.append(helper.make_opsetid("", OPSET))
    proto.ir_version = helper.find_min_ir_version_for(list(proto.opset_import))
    del proto.functions[:]


def session_settings(layers: Iterable[OnnxLayer]) -> dict[str, str]:
    """Return settings for ONNX Runtime's sessions, which affect exactness but not the file's meaning.

    By default, ONNX Runtime rounds the float inputs of products with weights in groups to 8 bits (accuracy level 4).

    Args:
        layers: The layers of the file.
    """
    grouped = any(layer.weight is not None and layer.unpacked_in_products for layer in layers)
    return {"session.qdq_matmulnbits_accuracy_level": "1"} if grouped else {}


def onnx_sizes(path: Path, layers: Mapping[str, LayerVerdict], tables: Collection[str] = ()) -> dict[str, int]:
    """Return the bytes of an ONNX file by content, with the keys of `packed_sizes`; `header` is the graph.

    Args:
        path: The file.
        layers: What `export_onnx` returned.
        tables: Embeddings among them that the run gave no format: `embeddings` has their bytes.
    """
    sizes = dict.fromkeys(("codes", "block_scales", "scales", "zero_points", "float_weights", "embeddings", "rest"), 0)
    for tensor in onnx.load(path).graph.initializer:
        name = re.sub(r"(\.weight\.codes)\.\d$", r"\1", tensor.name.removesuffix(".half"))  # of a group of channels
        layer, _, part = name.partition(".weight.")
        if layer.removesuffix(".weight") in tables:
            kind = "embeddings"
        elif name.endswith((".weight", ".weight.codes")) and layer.removesuffix(".weight") in layers:
            kind = "float_weights" if layer.endswith(".weight") and not part else "codes"
        elif layer in layers and part == "scale":
            kind = "block_scales" if isinstance(layers[layer].weight, BlockFormat | GroupFormat) else "scales"
        elif name.endswith((".input.scale", ".weight.codes.order")):
            kind = "scales"
        elif name.endswith((".input.zero_point", ".weight.zero_point")):
            kind = "zero_points"
        else:
            kind = "rest"
        sizes[kind] += len(tensor.raw_data) if tensor.HasField("raw_data") else numpy_helper.to_array(tensor).nbytes
    return {**sizes, "header": path.stat().st_size - sum(sizes.values())}


class _Traced(nn.Module):
    """Replaces a layer during tracing, with placeholders for the rounding of its input and for its weight."""

    def __init__(self, name: str, module: QuantModule) -> None:
        super().__init__()
        self.name = name
        self.module = module
        self.weight_shape = weight_of(module).shape  # before tracing, so that its computation is not part of the file
        for hooks in HOOKS:  # migrated layers divide their input or store it for a shortcut; users add hooks
            setattr(self, hooks, copy.copy(getattr(module, hooks)))
        for key, hook in list(self._forward_pre_hooks.items()):
            if hook is norm_hook(module):  # the file holds the computed weight
                del self._forward_pre_hooks[key]

    def __getattr__(self, name: str) -> Any:
        """Return an attribute of the layer: MobileNetV2 reads a convolution's stride, for example."""
        own = self._modules.get("module")
        if name in self._modules or own is None:
            return super().__getattr__(name)
        return getattr(own, name)

    def forward(self, input: Tensor) -> Tensor:  # models may pass it by keyword
        """Return the layer's output for placeholders."""
        module, x = self.module, input
        if isinstance(module, QuantEmbedding):
            return module.compute(x, placeholder("Weight", self.name, self.weight_shape, torch.empty(1)))
        activation = module.input_quantizer
        if isinstance(activation.format, BlockFormat):
            x = emulate(x, activation.format, activation.reduction_dim)
        else:
            x = placeholder("Input", self.name, x.shape, x)
        shape, source = self.weight_shape, input.new_empty(1)
        if isinstance(module, QuantLinear | QuantConv1D):
            # A plain product with the weight as (in, out), the pattern that engines fuse with quantized operands.
            x = x @ placeholder("Weight", self.name, shape if isinstance(module, QuantConv1D) else shape[::-1], source)
            return x if module.bias is None else x + module.bias
        return module.compute(x, placeholder("Weight", self.name, shape, source))


def placeholder(kind: str, layer: str, shape: Any, x: Tensor) -> Tensor:
    """Insert a node of our own domain, to be replaced after tracing.

    Args:
        kind: 'Input' or 'Weight'.
        layer: Name of the layer.
        shape: Shape of the result.
        x: Input of the node.

    Returns:
        float32 of that shape.
    """
    symbolic = torch.onnx.ops.symbolic
    return symbolic(f"{DOMAIN}::{kind}", (x,), {"layer": layer}, dtype=torch.float32, shape=shape, version=1)


def named_tensors(output: Any, name: str = "") -> dict[str, Tensor]:
    """Return the tensors of a model's output by name: `logits` for a single one, keys, `output_0` for places.

    Caches of keys and values are left out: they are inputs of the next call rather than results.

    Args:
        output: What the model returned: tensors, in mappings, tuples or lists.
        name: Name of the output itself; empty for the whole.
    """
    if isinstance(output, Tensor):
        return {name or OUTPUT: output}
    if isinstance(output, Mapping):
        parts = [(f"{name}.{key}" if name else str(key), part) for key, part in output.items() if key not in CACHES]
    elif isinstance(output, tuple | list):
        parts = [(f"{name}.{place}" if name else f"output_{place}", part) for place, part in enumerate(output)]
    else:
        return {}
    return {key: tensor for own, part in parts for key, tensor in named_tensors(part, own).items()}


class _Traceable(OfOrderedInputs):
    """The model as a function of its inputs, in order, that returns all tensors of its output, in order."""

    def outputs(self, *inputs: Tensor) -> dict[str, Tensor]:
        """Return the output's tensors by name; raise UserError if there are none."""
        output = super().forward(*inputs)
        found = named_tensors(output)
        if not found:
            raise UserError(f"it returns a {type(output).__name__}, in which there are no tensors")
        return {f"{key}_out" if key in self.names else key: tensor for key, tensor in found.items()}

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        """Return the output's tensors."""
        return tuple(self.outputs(*inputs).values())


def trace(model: nn.Module, modules: Mapping[str, QuantModule], inputs: Mapping[str, Tensor]) -> onnx.ModelProto:
    """Trace a model to ONNX with placeholders.

    Args:
        model: The quantized model.
        modules: Its quantized layers, by name.
        inputs: Example inputs, see `export_onnx`.

    Raises:
        UserError: For experts, float64 weights and operations that ONNX lacks.
    """
    if stacked := [name for name, layer in model.named_modules() if isinstance(layer, ExpertLinear)]:
        raise UserError(
            f"--format onnx: {stacked[0]} holds the matrices of many experts, of which each token takes some only when "
            "the model runs; choose --format packed"
        )
    if double := [name for name, weight in model.named_parameters() if weight.dtype == torch.float64]:
        raise UserError(f"--format onnx: {double[0]} is float64, files hold float32: export model.float()")
    names = list(inputs)
    # With a single row, the exporter would specialize on a batch of one.
    rows = [x if x.shape[0] > 1 else x.repeat(2, *(1,) * (x.dim() - 1)) for x in _widened(inputs).values()]
    # AUTO: the model decides whether the last axis of integers can vary; a number of features is fixed.
    last = torch.export.Dim.AUTO
    axes = [{0: "batch", **({x.dim() - 1: last} if x.dim() > 1 and not x.is_floating_point() else {})} for x in rows]
    traced = _Traceable(model, names)
    with evaluating(model), _in_float32(model), in_float(modules), _quiet():
        try:
            outputs = list(traced.outputs(*rows))
        except UserError as error:
            raise UserError(f"--format onnx: {type(model).__name__} cannot be exported: {error}") from None
    with evaluating(model), _in_float32(model), _placeholders(model, modules), _quiet():
        try:
            program: Any = torch.onnx.export(
                traced,
                tuple(rows),
                input_names=[f"{PRIVATE}{name}" for name in names],
                output_names=[f"{PRIVATE}{name}" for name in outputs],
                opset_version=OPSET,
                dynamic_shapes=(tuple(axes),),
                dynamo=True,
                verbose=False,
            )
            proto: onnx.ModelProto = program.model_proto  # a property that converts all tensors at each access
        except torch.onnx.errors.OnnxExporterError as error:
            cause: BaseException = error
            while cause.__cause__ is not None:
                cause = cause.__cause__
            reason = " ".join(str(cause).split())[:300]
            raise UserError(f"--format onnx: {type(model).__name__} cannot be exported: {reason}") from None
    rename_values(proto.graph)
    simplify(proto.graph)
    return proto


def rename_values(graph: onnx.GraphProto) -> None:
    """Remove `PRIVATE` from the names of inputs and outputs; rename inner tensors with the same names."""
    public = {value.name.removeprefix(PRIVATE) for value in (*graph.input, *graph.output)}

    def renamed(name: str) -> str:
        return f"{name}.inside" if name in public else name.removeprefix(PRIVATE)

    for value in (*graph.input, *graph.output, *graph.value_info, *graph.initializer):
        value.name = renamed(value.name)
    for node in graph.node:
        node.input[:] = [renamed(name) for name in node.input]
        node.output[:] = [renamed(name) for name in node.output]


def _widened(inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Convert half-precision inputs to float32."""
    return {name: x.float() if x.dtype in HALF else x for name, x in inputs.items()}


@contextlib.contextmanager
def _in_float32(model: nn.Module) -> Iterator[None]:
    """Within, half-precision tensors of a model are float32, which is exact; restores them on exit.

    Scales are always float32, so nodes would otherwise have operands of different types.
    """
    halves = [(x, x.data) for x in (*model.parameters(), *model.buffers()) if x.dtype in HALF]
    for tensor, data in halves:
        tensor.data = data.float()
    try:
        yield
    finally:
        for tensor, data in halves:
            tensor.data = data


@contextlib.contextmanager
def _placeholders(model: nn.Module, modules: Mapping[str, QuantModule]) -> Iterator[None]:
    """Within, the quantized layers of a model are replaced by placeholders."""
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
    """Suppress the exporter's progress on stdout and through loggers; failures are exceptions."""
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()), torch.no_grad():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(logging.NOTSET)
