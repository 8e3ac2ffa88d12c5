"""Bounds of roundings to 8 bits: Relu and Clip move behind the rounding, in codes, or into its grid.

ONNX Runtime computes a convolution in integers only if its rounding follows directly, or behind a Relu or Clip that the
grid makes superfluous. Rounding keeps the order of values, so rounded bounds on rounded values are the same.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

import numpy as np
import onnx
from onnx import NodeProto, TensorProto, helper, numpy_helper

from quant.export.onnx.integer_ops import constant, of_bytes, readers_of, redirect
from quant.export.onnx.nodes import replace_nodes

LAST = 255
"""Largest code of 8 bits."""


def fold_bounds(graph: onnx.GraphProto) -> None:
    """Move the bounds of each Relu and Clip that a single rounding to uint8 reads into or behind that rounding.

    Args:
        graph: The graph; changed in place.
    """
    values = {tensor.name: tensor for tensor in graph.initializer}
    types = {name: tensor.data_type for name, tensor in values.items()}
    finished = {output.name for output in graph.output}
    gone: set[str] = set()
    for node in list(graph.node):
        ends = bounds_of(node, values)
        follow = readers_of(graph).get(node.output[0], [])
        if ends is None or len(follow) != 1 or node.output[0] in finished:
            continue
        rounding = follow[0]
        if rounding.op_type == "QuantizeLinear" and of_bytes(rounding, types) and rounding.output[0] not in finished:
            rounding.input[0] = node.input[0]
            gone.add(node.output[0])
            _bound(graph, rounding, *(code_of(end, rounding, values) for end in ends))
    replace_nodes(graph, [node for node in graph.node if node.output[0] not in gone])


def join_bounds(graph: onnx.GraphProto) -> None:
    """Let a Clip do what a Relu or Clip right before it does too, if nothing else reads that one.

    Args:
        graph: The graph; changed in place.
    """
    values = {tensor.name: tensor for tensor in graph.initializer}
    made_by = {output: node for node in graph.node for output in node.output}
    uses = Counter(source for node in graph.node for source in node.input)
    uses.update(output.name for output in graph.output)
    gone: set[str] = set()
    for node in graph.node:
        first = made_by.get(node.input[0]) if node.op_type == "Clip" else None
        if first is None or uses[node.input[0]] > 1:
            continue
        inner, outer = bounds_of(first, values), bounds_of(node, values)
        if inner is not None and outer is not None:
            name, (low, high) = node.output[0], (np.asarray(end, np.float32) for end in outer)
            ends = np.clip(np.asarray(inner, np.float32), low, high)
            node.input[:] = [first.input[0], *(constant(graph, f"{name}/{n}", ends[n]) for n in range(2))]
            values |= {tensor.name: tensor for tensor in graph.initializer[-2:]}
            gone.add(first.output[0])
    replace_nodes(graph, [node for node in graph.node if node.output[0] not in gone])


def bounds_of(node: NodeProto, values: Mapping[str, TensorProto]) -> tuple[float, float] | None:
    """Return what a Relu or a Clip with constant ends bounds its input by; None for other nodes.

    Args:
        node: The node.
        values: Constants by name.
    """
    if node.op_type == "Relu":
        return 0.0, np.inf
    if node.op_type != "Clip" or any(name and name not in values for name in node.input[1:]):
        return None
    if any(name and values[name].data_type != TensorProto.FLOAT for name in node.input[1:]):
        return None
    names = [*node.input[1:], "", ""][:2]
    low, high = (float(numpy_helper.to_array(values[name])) if name else None for name in names)
    return -np.inf if low is None else low, np.inf if high is None else high


def code_of(value: float, rounding: NodeProto, values: Mapping[str, TensorProto]) -> int:
    """Return the code that a QuantizeLinear to uint8 gives a value.

    Args:
        value: The value; may be infinite.
        rounding: The node.
        values: Constants by name.
    """
    scale, point = (numpy_helper.to_array(values[name]) for name in rounding.input[1:3])
    return int(np.clip(np.round(np.float32(value) / scale) + np.float32(point), 0, LAST))


def _bound(graph: onnx.GraphProto, rounding: NodeProto, low: int, high: int) -> None:
    """Bound the codes of a rounding, by the Clip behind it if there is one."""
    values = {tensor.name: tensor for tensor in graph.initializer}
    codes = rounding.output[0]
    readers = readers_of(graph)[codes]
    if len(readers) == 1 and readers[0].op_type == "Clip":
        inner = [int(numpy_helper.to_array(values[name])) for name in readers[0].input[1:]]
        low, high = max(low, inner[0]), min(high, inner[1])
        readers[0].input[1:] = _ends(graph, f"{codes}/bounded", low, high)
    elif (low, high) != (0, LAST):
        bounded = f"{codes}/bounded"
        redirect(readers, codes, bounded)
        clip = helper.make_node("Clip", [codes, *_ends(graph, bounded, low, high)], [bounded], name=bounded)
        place = next(index for index, node in enumerate(graph.node) if codes in node.output) + 1
        replace_nodes(graph, [*graph.node[:place], clip, *graph.node[place:]])


def _ends(graph: onnx.GraphProto, name: str, low: int, high: int) -> list[str]:
    """Add the ends of a Clip of codes to the constants; return their names."""
    ends = {f"{name}/low": low, f"{name}/high": high}
    return [constant(graph, end, np.asarray(code, np.uint8)) for end, code in ends.items()]
