"""What convolutions return, rounded to 8 bits: ONNX Runtime then computes them, and what joins them, in integers.

Its integer convolution writes 8 bits, and nothing else; one whose output goes on in float is computed in float, and so
is what lies between. The ranges are those that calibration examples reach. A tensor that a layer of 8 bits reads takes
that layer's own grid instead of a second one.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import onnx
from onnx import NodeProto, TensorProto, helper, numpy_helper
from torch import Tensor

from quant.export.onnx.nodes import replace_nodes

UINT8 = TensorProto.UINT8
JOINING = ("Add", "Mul", "Concat", "MaxPool", "AveragePool", "GlobalAveragePool")
"""operations that ONNX Runtime computes on 8 bits where all their inputs are"""
MOVING = ("Pad", "Slice")
"""operations that leave values as they are, and zeros beside them"""
ACTIVATIONS = ("Relu", "Clip")
"""operations that become the bounds of the rounding behind them"""


def round_outputs(proto: onnx.ModelProto, examples: Sequence[Mapping[str, Tensor]]) -> int:
    """Round what convolutions return, and what joins it, in place; returns the number of tensors rounded.

    Args:
        proto: with quantized convolutions.
        examples: batches of the model's inputs, by name, that the ranges are found on.
    """
    graph = proto.graph
    round_before_padding(graph)
    outputs = tensors_to_round(graph)
    shared = {name: own for name in outputs if (own := only_grid(graph, name)) is not None}
    bounds = observed(proto, [name for name in outputs if name not in shared], examples)
    for name in outputs:
        if name in shared:
            share(graph, name, shared[name])
        else:
            scale, point = grid_of(*bounds[name], coarsest_scale(graph, name))
            insert(graph, name, [constant(graph, f"{name}/scale", scale), constant(graph, f"{name}/point", point)])
    move_codes(graph)
    return len(outputs)


def round_before_padding(graph: onnx.GraphProto) -> None:
    """Where zeros are put around a tensor and a layer then rounds it to 8 bits, round first: the same, on fewer values.

    The rounding then stands right behind the operation that makes the tensor, and can be joined with it.
    """
    readers = readers_of(graph)
    types = {tensor.name: tensor.data_type for tensor in graph.initializer}
    earlier: dict[str, NodeProto] = {}
    """what a Pad returns now -> the rounding that goes before it"""
    for pad in [node for node in graph.node if pads_with_zero(graph, node)]:
        rounding = readers.get(pad.output[0], [])
        if len(rounding) != 1 or rounding[0].op_type != "QuantizeLinear" or not of_bytes(rounding[0], types):
            continue
        quantize = rounding[0]
        padded, unpadded = quantize.output[0], f"{quantize.output[0]}/unpadded"
        quantize.input[0], quantize.output[0] = pad.input[0], unpadded
        pad.input[0], pad.output[0] = unpadded, padded
        pad_with(pad, quantize.input[2])
        earlier[padded] = quantize
    moved = {quantize.output[0] for quantize in earlier.values()}
    nodes: list[NodeProto] = []
    for node in graph.node:
        if node.output[0] in earlier:
            nodes.append(earlier[node.output[0]])
        if node.output[0] not in moved:
            nodes.append(node)
    replace_nodes(graph, nodes)


def move_codes(graph: onnx.GraphProto) -> None:
    """What only moves values (parts of a tensor, zeros around it) moves codes of 8 bits instead."""
    made_by = {output: node for node in graph.node for output in node.output}
    types = {tensor.name: tensor.data_type for tensor in graph.initializer}
    nodes: list[NodeProto] = []
    for node in graph.node:
        nodes.append(node)
        source = made_by.get(node.input[0]) if node.input else None
        if not (node.op_type == "Slice" or pads_with_zero(graph, node)) or source is None:
            continue
        if source.op_type != "DequantizeLinear" or not of_bytes(source, types):
            continue
        values, codes = node.output[0], f"{node.output[0]}/moved"
        node.input[0], node.output[0] = source.input[0], codes
        if node.op_type == "Pad":
            pad_with(node, source.input[2])
        reading = helper.make_node("DequantizeLinear", [codes, *source.input[1:]], [values], name=values)
        made_by[values] = reading
        nodes.append(reading)
    replace_nodes(graph, nodes)


def of_bytes(node: NodeProto, types: Mapping[str, int]) -> bool:
    """Whether a QuantizeLinear or DequantizeLinear is of codes of 8 bits; `types` are those of constants."""
    return len(node.input) > 2 and types.get(node.input[2]) == UINT8


def pads_with_zero(graph: onnx.GraphProto, node: NodeProto) -> bool:
    """Whether a node puts zeros around a tensor."""
    if node.op_type != "Pad" or any(a.name == "mode" and a.s != b"constant" for a in node.attribute):
        return False
    if len(node.input) < 3 or not node.input[2]:
        return True
    values = {tensor.name: tensor for tensor in graph.initializer}
    return node.input[2] in values and not numpy_helper.to_array(values[node.input[2]]).any()


def pad_with(node: NodeProto, value: str) -> None:
    """Let a Pad put the constant `value` around its input."""
    node.input[:] = [*node.input[:2], value, *node.input[3:]]


def tensors_to_round(graph: onnx.GraphProto) -> list[str]:
    """Outputs of convolutions and of what joins them, behind the activation, in the order they are computed."""
    readers = readers_of(graph)
    constants = {tensor.name for tensor in graph.initializer}
    codes = {output for node in graph.node if node.op_type == "DequantizeLinear" for output in node.output}
    rounded: dict[str, None] = {}
    moved: dict[str, None] = {}
    """these, and what only moves them"""
    for node in graph.node:
        sources = [name for name in node.input if name and name not in constants]
        if node.op_type in MOVING and sources and sources[0] in moved:
            moved[node.output[0]] = None
        joins = node.op_type in JOINING and all(name in moved for name in sources)
        integers = node.op_type == "Conv" and all(name in codes for name in sources)
        if not (joins or integers):
            continue
        name = node.output[0]
        while len(readers.get(name, ())) == 1 and readers[name][0].op_type in ACTIVATIONS:
            name = readers[name][0].output[0]
        rounded[name] = moved[name] = None
    finished = {output.name for output in graph.output}
    return [name for name in rounded if name not in finished]


def readers_of(graph: onnx.GraphProto) -> dict[str, list[NodeProto]]:
    """The nodes that read each tensor."""
    readers: dict[str, list[NodeProto]] = {}
    for node in graph.node:
        for name in dict.fromkeys(node.input):
            readers.setdefault(name, []).append(node)
    return readers


def only_grid(graph: onnx.GraphProto, name: str) -> NodeProto | None:
    """The QuantizeLinear to 8 bits that one layer rounds this tensor with.

    None if no layer does, if several do, or if the layer's grid is narrower than 8 bits: others should not read it.
    """
    readers = readers_of(graph)
    rounding = roundings(graph, name)
    if len(rounding) != 1:
        return None
    types = {tensor.name: tensor.data_type for tensor in graph.initializer}
    whole = all(node.op_type == "DequantizeLinear" for node in readers[rounding[0].output[0]])
    return rounding[0] if whole and of_bytes(rounding[0], types) else None


def roundings(graph: onnx.GraphProto, name: str) -> list[NodeProto]:
    """The nodes that round a tensor to layers' own grids."""
    return [node for node in readers_of(graph).get(name, ()) if node.op_type == "QuantizeLinear"]


def coarsest_scale(graph: onnx.GraphProto, name: str) -> float | None:
    """The largest of the steps that layers round this tensor to; None if none does."""
    values = {tensor.name: tensor for tensor in graph.initializer}
    return max((float(numpy_helper.to_array(values[n.input[1]])) for n in roundings(graph, name)), default=None)


def observed(
    proto: onnx.ModelProto, names: Iterable[str], examples: Sequence[Mapping[str, Tensor]]
) -> dict[str, tuple[float, float]]:
    """The least and the largest value of each tensor, over all examples; 0 is always within."""
    import onnxruntime

    names = list(names)
    if not names:
        return {}
    watched = onnx.ModelProto()
    watched.CopyFrom(proto)
    del watched.graph.output[:]
    watched.graph.output.extend(helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in names)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(watched.SerializeToString(), options, providers=["CPUExecutionProvider"])
    low, high = dict.fromkeys(names, 0.0), dict.fromkeys(names, 0.0)
    for batch in examples:
        feed = {entry.name: batch[entry.name].numpy() for entry in session.get_inputs()}
        for name, value in zip(names, session.run(names, feed), strict=True):
            low[name], high[name] = min(low[name], float(value.min())), max(high[name], float(value.max()))
    return {name: (low[name], high[name]) for name in names}


def share(graph: onnx.GraphProto, name: str, own: NodeProto) -> None:
    """Whoever reads tensor `name` reads it as the layer behind `own` does."""
    others = [node for node in readers_of(graph)[name] if node is not own]
    if not others:
        return
    rounded = f"{name}/8bit"
    reading = helper.make_node("DequantizeLinear", [own.output[0], *own.input[1:]], [rounded], name=rounded)
    redirect(others, name, rounded)
    put_behind(graph, [node for node in graph.node if node.output[0] != own.output[0]], name, [own, reading])


def insert(graph: onnx.GraphProto, name: str, grid: list[str]) -> None:
    """Round tensor `name` to `grid` = [scale, zero point] for all its readers."""
    codes, rounded = f"{name}/codes8bit", f"{name}/8bit"
    redirect(readers_of(graph)[name], name, rounded)
    added = [
        helper.make_node("QuantizeLinear", [name, *grid], [codes], name=codes),
        helper.make_node("DequantizeLinear", [codes, *grid], [rounded], name=rounded),
    ]
    put_behind(graph, list(graph.node), name, added)


def redirect(nodes: Iterable[NodeProto], old: str, new: str) -> None:
    for node in nodes:
        node.input[:] = [new if source == old else source for source in node.input]


def put_behind(graph: onnx.GraphProto, nodes: list[NodeProto], name: str, added: list[NodeProto]) -> None:
    """The graph's nodes are `nodes`, with `added` behind the one that makes `name`."""
    place = next(index for index, node in enumerate(nodes) if name in node.output) + 1
    replace_nodes(graph, [*nodes[:place], *added, *nodes[place:]])


def grid_of(low: float, high: float, layers: float | None) -> tuple[np.ndarray, np.ndarray]:
    """(scale, zero point) of at most 256 steps that reach from `low` to `high`, 0 being one of them.

    Where a layer rounds the result again, to steps of `layers`, these hold an odd number of ours: rounding twice is
    then rounding once, since the middle between two of its steps is the middle between two of ours.
    """
    scale = max((high - low) / 255, float(np.finfo(np.float32).tiny))
    if layers is not None and layers >= scale:
        ratio = int(layers / scale)
        scale = layers / (ratio if ratio % 2 else ratio - 1)
    return np.asarray(scale, dtype=np.float32), np.asarray(min(255, round(-low / scale)), dtype=np.uint8)


def constant(graph: onnx.GraphProto, name: str, value: Any) -> str:
    graph.initializer.append(numpy_helper.from_array(value, name))
    return name
