"""Round the outputs of convolutions to 8 bits, so that ONNX Runtime computes them, and what combines them, in integers.

Its integer convolution can only write 8-bit outputs; a convolution with a float output is computed in float, and so are
the operations in between. The ranges are measured on calibration examples. A tensor that an 8-bit layer reads uses that
layer's grid instead of a second one.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import onnx
from onnx import NodeProto, TensorProto, helper, numpy_helper
from torch import Tensor

from quant.export.onnx.nodes import replace_nodes
from quant.export.onnx.padding import pads_with_zero
from quant.export.onnx.simplify import drop_unread

UINT8 = TensorProto.UINT8
JOINING = ("Add", "Mul", "Concat", "MaxPool", "AveragePool", "GlobalAveragePool")
"""Operations that ONNX Runtime computes on 8 bits if all their inputs have 8 bits."""
MOVING = ("Pad", "Slice")
"""Operations that only move values, or add zeros."""
SAMPLED = 2**15
"""Number of values of a tensor in each batch that its range is chosen by."""
SHARES = tuple(share / 20 for share in range(20, 5, -1))
"""Shares of a tensor's range that are tried."""
ACTIVATIONS = ("Relu", "Clip")
"""Operations that become the bounds of the rounding behind them."""


def round_outputs(proto: onnx.ModelProto, examples: Sequence[Mapping[str, Tensor]]) -> int:
    """Round the outputs of convolutions, and of operations that combine them.

    Args:
        proto: A model with quantized convolutions; changed in place.
        examples: Batches of the model's inputs, by name, to measure ranges on.

    Returns:
        The number of tensors rounded.
    """
    graph = proto.graph
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
    drop_unread(graph)
    return len(outputs)


def move_codes(graph: onnx.GraphProto) -> None:
    """Let Slice and zero Pad operate on 8-bit codes instead of their values."""
    made_by = {output: node for node in graph.node for output in node.output}
    values = {tensor.name: tensor for tensor in graph.initializer}
    types = {name: tensor.data_type for name, tensor in values.items()}
    nodes: list[NodeProto] = []
    for node in graph.node:
        nodes.append(node)
        source = made_by.get(node.input[0]) if node.input else None
        if not (node.op_type == "Slice" or pads_with_zero(node, values)) or source is None:
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
    """Whether a QuantizeLinear or DequantizeLinear has 8-bit codes.

    Args:
        node: The node.
        types: Constant -> its type.
    """
    return len(node.input) > 2 and types.get(node.input[2]) == UINT8


def pad_with(node: NodeProto, value: str) -> None:
    """Set the constant that a Pad node pads with, by name."""
    node.input[:] = [*node.input[:2], value, *node.input[3:]]


def tensors_to_round(graph: onnx.GraphProto) -> list[str]:
    """Return outputs of convolutions and of operations that combine them, after activations, in execution order."""
    readers = readers_of(graph)
    constants = {tensor.name for tensor in graph.initializer}
    codes = {output for node in graph.node if node.op_type == "DequantizeLinear" for output in node.output}
    rounded: dict[str, None] = {}
    moved: dict[str, None] = {}
    """These, and outputs of operations that only move them."""
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
    """Return tensor -> the nodes that read it."""
    readers: dict[str, list[NodeProto]] = {}
    for node in graph.node:
        for name in dict.fromkeys(node.input):
            readers.setdefault(name, []).append(node)
    return readers


def only_grid(graph: onnx.GraphProto, name: str) -> NodeProto | None:
    """Return the QuantizeLinear to 8 bits that a tensor's only rounding reader uses.

    None if no layer rounds the tensor, several do, or the grid is narrower than 8 bits, so that others that read the
    tensor should not use it.
    """
    readers = readers_of(graph)
    rounding = roundings(graph, name)
    if len(rounding) != 1:
        return None
    types = {tensor.name: tensor.data_type for tensor in graph.initializer}
    whole = all(node.op_type == "DequantizeLinear" for node in readers[rounding[0].output[0]])
    usable = whole or len(readers[name]) == 1
    return rounding[0] if usable and of_bytes(rounding[0], types) else None


def roundings(graph: onnx.GraphProto, name: str) -> list[NodeProto]:
    """Return the QuantizeLinear nodes of the layers that read a tensor."""
    return [node for node in readers_of(graph).get(name, ()) if node.op_type == "QuantizeLinear"]


def coarsest_scale(graph: onnx.GraphProto, name: str) -> float | None:
    """Return the largest scale that layers round a tensor with; None if none does."""
    values = {tensor.name: tensor for tensor in graph.initializer}
    return max((float(numpy_helper.to_array(values[n.input[1]])) for n in roundings(graph, name)), default=None)


def observed(
    proto: onnx.ModelProto, names: Iterable[str], examples: Sequence[Mapping[str, Tensor]]
) -> dict[str, tuple[float, float]]:
    """Measure the ranges of tensors with ONNX Runtime, and clip them where that lowers the squared error of rounding.

    Args:
        proto: The model.
        names: The tensors.
        examples: Batches of the model's inputs, by name.

    Returns:
        Tensor -> (smallest, largest value) to keep, extended to include 0.
    """
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
    samples: dict[str, list[np.ndarray]] = {name: [] for name in names}
    generator = np.random.default_rng(0)
    for batch in examples:
        feed = {entry.name: batch[entry.name].numpy() for entry in session.get_inputs()}
        for name, value in zip(names, session.run(names, feed), strict=True):
            low[name], high[name] = min(low[name], float(value.min())), max(high[name], float(value.max()))
            samples[name].append(generator.choice(value.ravel(), SAMPLED))
    return {name: clipped(np.concatenate(samples[name]), low[name], high[name]) for name in names}


def clipped(values: np.ndarray, low: float, high: float) -> tuple[float, float]:
    """Return the share of a range whose grid of 8 bits has the least squared error.

    Args:
        values: A sample of the tensor's values.
        low: Smallest value, at most 0.
        high: Largest value, at least 0.
    """

    def error(share: float) -> float:
        scale, point = (x.astype(np.float32) for x in grid_of(share * low, share * high, None))
        rounded = (np.clip(np.round(values / scale) + point, 0, 255) - point) * scale
        return float(np.square(rounded - values, dtype=np.float64).sum())

    best = min(SHARES, key=error)
    return best * low, best * high


def share(graph: onnx.GraphProto, name: str, own: NodeProto) -> None:
    """Let all readers of a tensor use the rounding of one layer.

    Args:
        graph: The graph; changed in place.
        name: The tensor.
        own: The layer's QuantizeLinear.
    """
    others = [node for node in readers_of(graph)[name] if node.output[0] != own.output[0]]
    if not others:
        return
    rounded = f"{name}/8bit"
    reading = helper.make_node("DequantizeLinear", [own.output[0], *own.input[1:]], [rounded], name=rounded)
    redirect(others, name, rounded)
    put_behind(graph, [node for node in graph.node if node.output[0] != own.output[0]], name, [own, reading])


def insert(graph: onnx.GraphProto, name: str, grid: list[str]) -> None:
    """Round a tensor for all its readers.

    Args:
        graph: The graph; changed in place.
        name: The tensor.
        grid: Names of scale and zero point.
    """
    codes, rounded = f"{name}/codes8bit", f"{name}/8bit"
    redirect(readers_of(graph)[name], name, rounded)
    added = [
        helper.make_node("QuantizeLinear", [name, *grid], [codes], name=codes),
        helper.make_node("DequantizeLinear", [codes, *grid], [rounded], name=rounded),
    ]
    put_behind(graph, list(graph.node), name, added)


def redirect(nodes: Iterable[NodeProto], old: str, new: str) -> None:
    """Let nodes read the tensor `new` in place of `old`."""
    for node in nodes:
        node.input[:] = [new if source == old else source for source in node.input]


def put_behind(graph: onnx.GraphProto, nodes: list[NodeProto], name: str, added: list[NodeProto]) -> None:
    """Set the nodes of a graph, and insert some.

    Args:
        graph: The graph; changed in place.
        nodes: Its nodes.
        name: Output of the node to insert behind.
        added: Nodes to insert.
    """
    place = next(index for index, node in enumerate(nodes) if name in node.output) + 1
    replace_nodes(graph, [*nodes[:place], *added, *nodes[place:]])


def grid_of(low: float, high: float, layers: float | None) -> tuple[np.ndarray, np.ndarray]:
    """Return scale and zero point of a uint8 grid that covers a range.

    If a layer rounds the result again, with a larger step, that step is an odd multiple of ours. Rounding twice then
    equals rounding once, since the midpoint between two of its values is also the midpoint between two of ours.

    Args:
        low: Smallest value, at most 0.
        high: Largest value, at least 0.
        layers: The step of the layer that rounds again; None: there is none.
    """
    scale = max((high - low) / 255, float(np.finfo(np.float32).tiny))
    if layers is not None and layers >= scale:
        ratio = int(layers / scale + 1e-3)  # both may end at the same value, and differ by float rounding
        scale = layers / (ratio if ratio % 2 else ratio - 1)
    return np.asarray(scale, dtype=np.float32), np.asarray(min(255, round(-low / scale)), dtype=np.uint8)


def constant(graph: onnx.GraphProto, name: str, value: Any) -> str:
    """Add an initializer and return its name."""
    graph.initializer.append(numpy_helper.from_array(value, name))
    return name
