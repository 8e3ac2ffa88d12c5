"""Replace the placeholders of a traced model by nodes of ONNX."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import torch
from onnx import NodeProto, TensorProto, helper, numpy_helper
from torch import Tensor

from quant.export.onnx.layers import INT8, OnnxLayer, Storage
from quant.export.onnx.mix import join_groups
from quant.export.onnx.simplify import drop_unread
from quant.export.weights import RoundedWeight
from quant.formats import BlockFormat, FloatFormat, GroupFormat, IntFormat, mx_element
from quant.kernels.groups import spread

DOMAIN = "mpq"
"""Domain of the placeholders."""
UNSIGNED = {4: ml_dtypes.uint4, 8: np.uint8, 16: np.uint16}
"""Bits -> type of an input's integer codes."""


class Replacement:
    """Replaces the placeholders of a traced model, in place.

    Args:
        proto: The traced model.
        layers: How each layer is stored, by name.
        integers: Whether convolutions will be computed in integers, see `integer_ops`.
    """

    def __init__(self, proto: onnx.ModelProto, layers: Mapping[str, OnnxLayer], integers: bool) -> None:
        self.integers = integers
        self.proto = proto
        self.graph = proto.graph
        self.layers = dict(layers)
        self.ranks = {value.name: len(value.type.tensor_type.shape.dim) for value in self.graph.value_info}
        self.made: dict[str, str] = {}
        """Layer -> name of its weight's tensor, which all calls of the layer share."""
        self.new_nodes: list[NodeProto] = []

    def run(self) -> None:
        """Replace all placeholders."""
        self._settle_convolutions()
        self._settle_products()
        looked_up = self._looked_up()
        for node in list(self.graph.node):
            if node.op_type == "Gather" and node.input[0] in looked_up:
                grouped = isinstance(looked_up[node.input[0]].formats[0], GroupFormat)
                (self._rows_in_groups if grouped else self._rows)(looked_up[node.input[0]], node)
                continue
            if node.domain != DOMAIN:
                self.new_nodes.append(node)
                continue
            if node.output[0] in looked_up:
                continue
            layer = self.layers[layer_of(node)]
            source = self._weight(layer) if node.op_type == "Weight" else self._input(layer, node)
            # The placeholder's output keeps its name.
            self.new_nodes.append(helper.make_node("Identity", [source], list(node.output)))
        replace_nodes(self.graph, self.new_nodes)
        self._drop_identities()
        self._keep_weights()
        self._spell_out_bounds()
        drop_unread(self.graph)
        self._drop_unused()

    def _looked_up(self) -> dict[str, OnnxLayer]:
        """Return the tables of integers whose rows alone are read: name of the placeholder's tensor -> layer."""
        readers: dict[str, list[NodeProto]] = {}
        for node in self.graph.node:
            for source in node.input:
                readers.setdefault(source, []).append(node)
        found = {}
        for node in self.graph.node:
            if node.domain != DOMAIN or node.op_type != "Weight":
                continue
            layer, name = self.layers[layer_of(node)], node.output[0]
            rows = all(n.op_type == "Gather" and n.input[0] == name and axis_of(n) == 0 for n in readers.get(name, ()))
            if layer.table and rows and self._has_rows_of_integers(layer, readers.get(name, ())):
                found[name] = layer
        return found

    def _has_rows_of_integers(self, layer: OnnxLayer, reading: Sequence[NodeProto]) -> bool:
        """Whether the rows of a table are integers, or whole groups of them that look-ups can be shaped for."""
        if layer.weight is None or not isinstance(layer.weight.format, GroupFormat):
            return layer.weight is not None and isinstance(layer.weight.format, IntFormat)
        whole = layer.weight.elements.shape[1] % layer.weight.format.size == 0
        return whole and all(node.output[0] in self.ranks for node in reading)

    def _rows(self, layer: OnnxLayer, node: NodeProto) -> None:
        """Replace the look-up in a table by one in its codes, so that only the rows that are read are unpacked."""
        weight, storage, name, output = layer.weight, layer.weight_storage, f"{layer.name}.weight", node.output[0]
        assert weight is not None and storage is not None
        stored = f"{layer.owner or layer.name}.weight"
        points = None if weight.zero_point is None else weight.zero_point
        elements = weight.elements if points is None else weight.elements + points
        codes = self._constant(f"{stored}.codes", elements.numpy().astype(storage.dtype))

        def rows(numbers: str, kind: str) -> str:
            return self._node("Gather", [numbers, node.input[1]], f"{output}/{kind}", axis=0)

        if storage.bits < 8:  # ONNX Runtime folds this Cast when it loads the model: it looks bytes up
            codes = self._node("Cast", [codes], f"{output}/bytes", to=TensorProto.INT8)
        values = self._node("Cast", [rows(codes, "codes")], f"{output}/values", to=TensorProto.FLOAT)
        if points is not None:
            offset = self._constant(f"{name}.zero_point", points.numpy().astype(storage.dtype))
            offset = self._node("Cast", [offset], f"{output}/zero_points", to=TensorProto.FLOAT)
            values = self._node(
                "Sub", [values, rows(offset, "zero_point") if points.dim() > 1 else offset], f"{output}/moved"
            )
        scale = self._constant(f"{name}.scale", weight.scale.numpy())
        self._node("Mul", [values, rows(scale, "scale") if weight.scale.dim() > 1 else scale], output)

    def _rows_in_groups(self, layer: OnnxLayer, node: NodeProto) -> None:
        """Do as `_rows` for a table whose rows are groups: look up (groups, values) and join the groups."""
        weight = layer.weight
        assert weight is not None and isinstance(weight.format, GroupFormat)
        apart = replace(
            weight,
            format=weight.format.element,
            elements=weight.elements.unflatten(1, (-1, weight.format.size)),
            scale=weight.scale.unsqueeze(2),
            zero_point=None if weight.zero_point is None else weight.zero_point.unsqueeze(2),
        )
        output = node.output[0]
        inner = helper.make_node("Gather", list(node.input), [f"{output}/groups"])
        self._rows(replace(layer, weight=apart, owner=""), inner)
        shape = self._constant(f"{output}/shape", np.asarray([*[0] * (self.ranks[output] - 1), -1], np.int64))
        self._node("Reshape", [inner.output[0], shape], output)

    def _constant(self, name: str, value: Any) -> str:
        if name not in {tensor.name for tensor in self.graph.initializer}:
            self.graph.initializer.append(numpy_helper.from_array(np.asarray(value, order="C"), name))
        return name

    def _node(self, kind: str, inputs: list[str], output: str, **attributes: Any) -> str:
        self.new_nodes.append(helper.make_node(kind, inputs, [output], name=output, **attributes))
        return output

    def _input(self, layer: OnnxLayer, node: NodeProto) -> str:
        """Add nodes that round a layer's input; return the name of the rounded tensor."""
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
        if storage is not None:
            make = self._integers if isinstance(range.format, IntFormat) else self._minifloats
            x = make(layer, storage, x, scale, start)
        return x if range.offset is None else self._node("Add", [x, offset], f"{start}/back")

    def _minifloats(self, layer: OnnxLayer, storage: Storage, x: str, scale: str, start: str) -> str:
        """Add nodes that round an input to a minifloat with a type of its own."""
        # No zero point: ONNX Runtime would take a zero point of 0 for the smallest code, and drop a Relu before it.
        to = helper.np_dtype_to_tensor_dtype(np.dtype(storage.dtype))
        codes = self._node("QuantizeLinear", [x, scale], f"{start}/codes", output_dtype=to)
        return self._node("DequantizeLinear", [codes, scale], f"{start}/rounded")

    def _integers(self, layer: OnnxLayer, storage: Storage, x: str, scale: str, start: str) -> str:
        """Add nodes that round an input to integers."""
        range, bits = layer.range, storage.bits
        assert range is not None
        if range.low == -range.high and bits == 8:
            return self._symmetric(layer, x, scale, start)
        # The same codes, shifted to unsigned: processors multiply unsigned inputs with signed weights. The smallest one
        # becomes 0, so that rounding to a narrower range stops there by itself, and a Relu before it can be dropped.
        dtype, zero_point = UNSIGNED[bits], int(-range.low)
        narrower = range.high - range.low + 1 < 2**bits
        if narrower and bits == 8 and not (layer.is_product or self.integers):  # engines join it with a convolution
            ends = np.asarray([range.low, range.high], np.float32) * np.float32(range.scale)
            x, narrower = self._clip(x, f"{layer.name}.input", ends, f"{start}/clip"), False
        point = self._constant(f"{layer.name}.input.zero_point", np.asarray(zero_point).astype(dtype))
        codes = self._node("QuantizeLinear", [x, scale, point], f"{start}/codes")
        if layer.in_integers and layer.is_product and bits < 8:
            codes, bits = self._node("Cast", [codes], f"{start}/codes8", to=TensorProto.UINT8), 8
            point = self._constant(f"{layer.name}.input.zero_point8", np.asarray(zero_point).astype(np.uint8))
        if narrower and bits == 8:  # engines fuse the rounding with the operation before it
            bounds = np.asarray([range.low + zero_point, range.high + zero_point]).astype(np.uint8)
            codes = self._clip(codes, f"{layer.name}.input", bounds, f"{start}/clip")
        rounded = self._node("DequantizeLinear", [codes, scale, point], f"{start}/rounded")
        if narrower and bits != 8:  # Clip does not support 4-bit codes
            ends = np.asarray([range.low, range.high], np.float32) * np.float32(range.scale)
            rounded = self._clip(rounded, f"{layer.name}.input", ends, f"{start}/clip")
        return rounded

    def _symmetric(self, layer: OnnxLayer, x: str, scale: str, start: str) -> str:
        """Add nodes that round an input to int8 with the zero point 0, as TensorRT wants it.

        What is beyond the grid, which leaves out the lowest code, is clipped before the rounding: TensorRT fuses a
        QuantizeLinear with the DequantizeLinear right behind it.
        """
        range = layer.range
        assert range is not None
        ends = np.asarray([range.low, range.high], np.float32) * np.float32(range.scale)
        point = self._constant(f"{layer.name}.input.zero_point", np.asarray(0, np.int8))
        x = self._clip(x, f"{layer.name}.input", ends, f"{start}/clip")
        codes = self._node("QuantizeLinear", [x, scale, point], f"{start}/codes")
        return self._node("DequantizeLinear", [codes, scale, point], f"{start}/rounded")

    def _clip(self, x: str, name: str, bounds: np.ndarray, output: str) -> str:
        ends = [self._constant(f"{name}.{end}", value) for end, value in zip(("low", "high"), bounds, strict=True)]
        return self._node("Clip", [x, *ends], output)

    def _emulated(self, layer: OnnxLayer, x: str, start: str) -> str:
        """Add float operations that round to a minifloat, as `quant.kernels.emulation` does."""
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
        """Add nodes that compute a layer's weight from its codes; return the name of the weight's tensor."""
        if layer.name in self.made:
            return self.made[layer.name]
        weight, storage, name = layer.weight, layer.weight_storage, f"{layer.name}.weight"
        stored = f"{layer.owner or layer.name}.weight"
        if weight is None:
            plain = layer.float_weight.T if layer.transposed else layer.float_weight
            return self._constant(stored, plain.float().numpy())
        blocked = weight.in_block is not None
        elements, scale = weight.elements, weight.scale
        if isinstance(weight.format, BlockFormat):
            factor = mx_element(weight.format)[1] * (1 if weight.tensor_scale is None else weight.tensor_scale)
            scale = scale * factor
        point = None if weight.zero_point is None else weight.zero_point
        if point is not None and storage is not None:
            elements = elements + spread(point, weight.in_block, elements.shape[-1])
        # The layout that the operation reads: (in, out) for a matrix product, else the weight's own.
        rows_last = layer.transposed or (blocked and layer.is_product)
        if rows_last:
            elements = elements.T
            scale = scale.T if scale.dim() == 2 else scale
            point = point.T if point is not None and point.dim() == 2 else point
        if storage is None:
            made = self._constant(stored, (elements * scale).numpy())
        else:
            codes = self._codes(layer, storage, elements, f"{stored}.codes")
            if layer.in_integers and (layer.is_product or self.integers):
                if storage.bits < 8:  # ONNX Runtime folds this Cast when it loads the model: it multiplies bytes alone
                    codes, storage = self._node("Cast", [codes], f"{name}.codes8", to=TensorProto.INT8), INT8
                made = self._dequantized(storage, codes, scale, point, name)
            elif layer.unpacked_in_products:
                inputs = [codes, self._constant(f"{name}.scale", scale.numpy())]
                if point is not None:
                    inputs.append(self._constant(f"{name}.zero_point", point.numpy().astype(storage.dtype)))
                made = self._node("DequantizeLinear", inputs, name, axis=0, block_size=weight.in_block)
            else:
                made = self._unpacked(layer, storage, codes, scale, point, 0 if rows_last else 1)
        self.made[layer.name] = made
        return made

    def _codes(self, layer: OnnxLayer, storage: Storage, codes: Tensor, name: str) -> str:
        """Store the codes of a weight; return the name of the tensor that holds them."""
        if len(set(layer.group_storages)) < 2:
            return self._constant(name, codes.numpy().astype(storage.dtype))
        assert layer.weight is not None
        axis = 1 - layer.weight.channels if layer.transposed else layer.weight.channels
        return join_groups(codes, axis, layer.weight.groups, layer.group_storages, name, self._constant, self._node)

    def _dequantized(self, storage: Storage, codes: str, scale: Tensor, point: Tensor | None, name: str) -> str:
        """Add the DequantizeLinear of an operation that ONNX Runtime runs in integers."""
        channel = next((axis for axis, size in enumerate(scale.shape) if size > 1), None)
        flat, axis = ((), {}) if channel is None else ((-1,), {"axis": channel})
        points = []
        if point is not None:
            zero_points = point.numpy().reshape(flat).astype(storage.dtype)
            points.append(self._constant(f"{name}.zero_point", zero_points))
        factors = self._constant(f"{name}.scale", scale.numpy().reshape(flat))
        return self._node("DequantizeLinear", [codes, factors, *points], name, **axis)

    def _unpacked(
        self, layer: OnnxLayer, storage: Storage, codes: str, scale: Tensor, point: Tensor | None, axis: int
    ) -> str:
        """Add nodes that ONNX Runtime computes once, when it loads the model.

        It would run a DequantizeLinear at each call, and join it with what reads the weight.

        Args:
            layer: The layer, which computes in float.
            storage: The type of the codes.
            codes: Name of the codes.
            scale: Scales as the file holds them.
            point: Zero points, with the scales' shape.
            axis: The axis of the codes that blocks lie on.
        """
        assert layer.weight is not None
        name, size = f"{layer.name}.weight", layer.weight.in_block
        width = layer.weight.elements.shape[-1]

        def spread_out(numbers: str) -> str:
            if size is None or width <= size:
                return numbers
            blocks = self._constant(f"{DOMAIN}.blocks_of_{size}_in_{width}", np.arange(width) // size)
            return self._node("Gather", [numbers, blocks], f"{numbers}/spread", axis=axis)

        values = self._node("Cast", [codes], f"{name}.cast", to=TensorProto.FLOAT)
        if point is not None:
            stored = self._constant(f"{name}.zero_point", point.numpy().astype(storage.dtype))
            zero_points = self._node("Cast", [stored], f"{name}.zero_point.cast", to=TensorProto.FLOAT)
            values = self._node("Sub", [values, spread_out(zero_points)], f"{name}.moved")
        values = self._node("Mul", [values, spread_out(self._constant(f"{name}.scale", scale.numpy()))], name)
        if size is None or layer.is_product:
            return values
        sizes = self._constant(f"{name}.shape", np.asarray(layer.float_weight.shape, np.int64))
        return self._node("Reshape", [values, sizes], f"{name}.shaped")

    def _settle_convolutions(self) -> None:
        """Move the biases of convolutions to float additions: ONNX Runtime rounds them to input scale x weight scale.

        With `integers`, biases stay, and a batch norm that follows is folded into scales and bias, so that convolution
        and activation can become a single integer operation.
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
            if not (self.integers and layer.in_integers):
                if len(node.input) > 2 and bias is not None:
                    nodes.append(self._apart(node, layer, bias))
                continue
            norm = follow[0] if len(follow) == 1 and node.output[0] not in kept and calls[layer.name] == 1 else None
            if norm is None or norm.op_type != "BatchNormalization" or bias is None or layer.weight is None:
                continue
            if any(part not in values for part in norm.input[1:]) or layer.weight.zero_point is not None:
                continue
            factor, offset = norm_of(norm, [values[part].astype(np.float64) for part in norm.input[1:]])
            self.layers[layer.name] = replace(layer, weight=scaled(layer.weight, torch.from_numpy(factor)), owner="")
            del node.input[2:]
            node.input.append(self._constant(f"{layer.name}.bias", (bias * factor + offset).astype(np.float32)))
            node.output[0] = norm.output[0]
            gone.add(norm.output[0])
        replace_nodes(self.graph, nodes)

    def _apart(self, conv: NodeProto, layer: OnnxLayer, bias: np.ndarray) -> NodeProto:
        """Remove a convolution's bias; return the Add node that replaces it."""
        output = conv.output[0]
        del conv.input[2:]
        conv.output[0] = f"{output}/product"
        added = self._constant(f"{layer.name}.bias", bias.reshape(-1, *(1,) * (layer.float_weight.dim() - 2)))
        return helper.make_node("Add", [conv.output[0], added], [output], name=f"{output}/bias")

    def _settle_products(self) -> None:
        """Replace the addition of a bias after a matrix product by the subtraction of its negative, which is exact.

        ONNX Runtime fuses product and addition, and then rounds the bias, and a float weight, to integers if the input
        is rounded. It does not fuse products of more than two axes, whose additions it can fuse with other operations.
        """
        values = {tensor.name: tensor for tensor in self.graph.initializer}
        rounded = {
            n.output[0]
            for n in self.graph.node
            if n.domain == DOMAIN and n.op_type == "Input" and self.layers[layer_of(n)].input_storage is not None
        }
        products: set[str] = set()
        for node in self.graph.node:
            if node.op_type == "MatMul" and node.input[0] in rounded and self.ranks.get(node.output[0], 2) == 2:
                products.add(node.output[0])
            bias = next((source for source in node.input if source in values), None)
            if node.op_type != "Add" or bias is None or products.isdisjoint(node.input):
                continue
            product = next(source for source in node.input if source in products)
            negative = self._constant(f"{bias}.negative", -numpy_helper.to_array(values[bias]))
            node.op_type, node.input[:] = "Sub", [product, negative]

    def _drop_identities(self) -> None:
        """Remove the Identity nodes: their readers read the source."""
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
        replace_nodes(self.graph, rest)

    def _keep_weights(self) -> None:
        """Put a Max that changes nothing between a convolution with float weights and the rounding of its output.

        ONNX Runtime would round the weights of a convolution between a DequantizeLinear and a QuantizeLinear to 8 bits,
        with a scale of its own. It looks through what it joins with the convolution, and through Relu and Clip.
        """
        made_by = {output: node for node in self.graph.node for output in node.output}
        values = {tensor.name for tensor in self.graph.initializer}
        joined = ("BatchNormalization", "Add", "Sub", "Mul", "Div", "Relu", "Clip")
        nodes: list[NodeProto] = []
        for node in self.graph.node:
            source = made_by.get(node.input[0]) if node.op_type == "QuantizeLinear" else None
            while source is not None and source.op_type in joined:
                source = made_by.get(next((name for name in source.input if name not in values), ""))
            if source is not None and source.op_type == "Conv" and not self._in_integers(source, made_by):
                kept = f"{node.output[0]}/kept"
                lowest = self._constant(f"{DOMAIN}.lowest", np.finfo(np.float32).min)
                nodes.append(helper.make_node("Max", [node.input[0], lowest], [kept], name=kept))
                node.input[0] = kept
            nodes.append(node)
        replace_nodes(self.graph, nodes)

    def _in_integers(self, conv: NodeProto, made_by: Mapping[str, NodeProto]) -> bool:
        sources = [made_by.get(name) for name in conv.input[:2]]
        return all(source is not None and source.op_type == "DequantizeLinear" for source in sources)

    def _spell_out_bounds(self) -> None:
        """Replace Relu and Clip before 4-bit codes by Max and Min.

        ONNX Runtime fuses them with the rounding: it then loses a Relu whose zero is not the smallest code, and fails
        to load a Clip.
        """
        points = {
            tensor.name: int(numpy_helper.to_array(tensor))
            for tensor in self.graph.initializer
            if tensor.data_type == TensorProto.UINT4 and tensor.name.endswith(".input.zero_point")
        }
        rounded: dict[str, int] = {}
        for node in self.graph.node:
            if node.op_type == "QuantizeLinear" and len(node.input) > 2 and node.input[2] in points:
                rounded[node.input[0]] = max(rounded.get(node.input[0], 0), points[node.input[2]])
        nodes: list[NodeProto] = []
        for node in self.graph.node:
            point = rounded.get(node.output[0])
            if point is None or not (node.op_type == "Clip" or (node.op_type == "Relu" and point > 0)):
                nodes.append(node)
                continue
            bounds = [*node.input[1:]] if node.op_type == "Clip" else [self._constant(f"{DOMAIN}.0", np.float32(0))]
            source, ends = node.input[0], [end for end in zip(("Max", "Min"), bounds, strict=False) if end[1]]
            for kind, bound in ends:
                output = node.output[0] if kind == ends[-1][0] else f"{node.output[0]}/bounded"
                nodes.append(helper.make_node(kind, [source, bound], [output], name=output))
                source = output
        replace_nodes(self.graph, nodes)

    def _drop_unused(self) -> None:
        """Remove unused initializers, shapes of tensors that no longer exist, and metadata."""
        used = {source for node in self.graph.node for source in node.input} | {o.name for o in self.graph.output}
        kept = [tensor for tensor in self.graph.initializer if tensor.name in used]
        del self.graph.initializer[:]
        self.graph.initializer.extend(kept)
        del self.graph.value_info[:]
        for part in (self.proto, self.graph, *self.graph.node, *self.graph.input, *self.graph.output):
            del part.metadata_props[:]  # source locations, which can be as large as the weights


def replace_nodes(graph: onnx.GraphProto, nodes: Sequence[NodeProto]) -> None:
    """Set the nodes of a graph, which may be among its present ones."""
    kept = list(nodes)
    del graph.node[:]
    graph.node.extend(kept)


def axis_of(node: NodeProto) -> int:
    """Return the axis of a node, 0 if it names none."""
    return next((attribute.i for attribute in node.attribute if attribute.name == "axis"), 0)


def layer_of(node: NodeProto) -> str:
    """Return the name of a placeholder's layer."""
    name: bytes = helper.get_node_attr_value(node, "layer")
    return name.decode()


def norm_of(node: NodeProto, parts: list[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Return (factor, offset) of a batch norm as y = factor * x + offset.

    Args:
        node: The BatchNormalization.
        parts: Gamma, beta, mean and variance, float64 (channels,) each.
    """
    gamma, beta, mean, variance = parts
    epsilon = next((attribute.f for attribute in node.attribute if attribute.name == "epsilon"), 1e-5)
    factor = gamma / np.sqrt(variance + epsilon)
    return factor, beta - mean * factor


def scaled(weight: RoundedWeight, factor: Tensor) -> RoundedWeight:
    """Multiply the scales of a convolution's weight, so that elements change at most their sign.

    Args:
        weight: The rounded weight.
        factor: float64 (channels,).
    """
    shape = (-1, *(1,) * (weight.elements.dim() - 1))
    gone = factor == 0
    elements = weight.elements * torch.where(gone, 0, factor.sign()).view(shape).to(weight.elements)
    # A scale must not be 0: such a channel gets elements of 0 instead.
    size = torch.where(gone, 1, factor.abs()).view(shape)
    return replace(weight, elements=elements, scale=(weight.scale.double() * size).float())
