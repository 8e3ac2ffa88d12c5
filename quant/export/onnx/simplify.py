"""Remove operations of a traced model that do nothing, and join those that do one thing in two steps.

ONNX Runtime computes convolutions with the channels innermost, and puts a transposition around each operation that it
does not know in that order. Every operation less also saves the time that starting one takes.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection
from typing import Any

import ml_dtypes
import numpy as np
import onnx
from onnx import NodeProto, TensorProto, helper, numpy_helper

HALVES: tuple[tuple[Any, int], ...] = (
    (np.float16, TensorProto.FLOAT16),
    (ml_dtypes.bfloat16, TensorProto.BFLOAT16),
)
HALVED_FROM = 256
"""Smallest number of values that are stored in 16 bits: the conversion takes some bytes too."""


def simplify(graph: onnx.GraphProto) -> None:
    """Drop padding by nothing, and join slices along different axes. Changes the graph in place.

    Args:
        graph: A traced model.
    """
    values = {tensor.name: tensor for tensor in graph.initializer}
    uses = Counter(source for node in graph.node for source in node.input)
    uses.update(output.name for output in graph.output)
    made_by: dict[str, NodeProto] = {}
    for node in graph.node:
        if node.op_type == "Pad" and node.input[1] in values and not numpy_helper.to_array(values[node.input[1]]).any():
            node.op_type, node.input[:] = "Identity", node.input[:1]
            del node.attribute[:]
        earlier = made_by.get(node.input[0]) if node.input else None
        if node.op_type == "Slice" and earlier is not None and uses[node.input[0]] == 1:
            _join(graph, earlier, node, values)
        if node.op_type == "Slice":
            made_by[node.output[0]] = node
    drop_unread(graph)


def drop_unread(graph: onnx.GraphProto) -> None:
    """Remove the operations whose outputs nothing reads: ONNX Runtime would run some of them."""
    read = {output.name for output in graph.output}
    kept: list[NodeProto] = []
    for node in reversed(graph.node):
        if not read.isdisjoint(node.output):
            read.update(node.input)
            kept.append(node)
    kept.reverse()
    del graph.node[:]
    graph.node.extend(kept)


def _join(graph: onnx.GraphProto, first: NodeProto, second: NodeProto, values: dict[str, onnx.TensorProto]) -> None:
    """Let the second Slice do what the first does too, unless both cut the same axis or an axis is not known."""
    if any(len(node.input) != 5 or any(name not in values for name in node.input[1:]) for node in (first, second)):
        return
    ends = [[numpy_helper.to_array(values[name]) for name in node.input[1:]] for node in (first, second)]
    axes = np.concatenate([ends[0][2], ends[1][2]])
    if len(set(axes.tolist())) < len(axes) or (axes < 0).any():
        return
    names = [f"{second.output[0]}/{part}" for part in ("starts", "ends", "axes", "steps")]
    for name, *parts in zip(names, *ends, strict=True):
        values[name] = numpy_helper.from_array(np.concatenate(parts), name)
        graph.initializer.append(values[name])
    second.input[:] = [first.input[0], *names]


def store_in_half(graph: onnx.GraphProto, always: Collection[str] = ()) -> None:
    """Store constants in 16 bits whose values 16 bits hold exactly, and let the graph convert them.

    ONNX Runtime folds the conversions when it loads the model.

    Args:
        graph: The graph; changed in place.
        always: Names of constants that are stored so however few values they have.
    """
    nodes: list[NodeProto] = []
    for tensor in list(graph.initializer):
        few = np.prod(tensor.dims) < HALVED_FROM and tensor.name not in always
        if tensor.data_type != TensorProto.FLOAT or few:
            continue
        values, name = numpy_helper.to_array(tensor), tensor.name
        with np.errstate(over="ignore"):
            fits = next(
                ((d, to) for d, to in HALVES if np.array_equal(values.astype(d).astype(np.float32), values)), None
            )
        if fits is None:
            continue
        tensor.CopyFrom(numpy_helper.from_array(values.astype(fits[0]), f"{name}.half"))
        nodes.append(helper.make_node("Cast", [tensor.name], [name], name=name, to=TensorProto.FLOAT))
    kept = [*nodes, *graph.node]
    del graph.node[:]
    graph.node.extend(kept)
