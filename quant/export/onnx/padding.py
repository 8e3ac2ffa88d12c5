"""Zero padding before convolutions becomes their own: a step less, and nothing between one convolution and the next."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import onnx
from onnx import NodeProto, TensorProto, helper, numpy_helper

from quant.export.onnx.layers import OnnxLayer
from quant.export.onnx.nodes import DOMAIN, layer_of


def fold_padding(graph: onnx.GraphProto, layers: Mapping[str, OnnxLayer]) -> None:
    """Let convolutions read what was padded with zeros, and pad it themselves.

    A Pad that something else reads too stays for that.

    Args:
        graph: A traced model with placeholders; changed in place.
        layers: How each layer is stored, by name.
    """
    values = {tensor.name: tensor for tensor in graph.initializer}
    readers: dict[str, list[NodeProto]] = {}
    for node in graph.node:
        for source in dict.fromkeys(node.input):
            readers.setdefault(source, []).append(node)
    for pad in graph.node:
        added = spatial_zeros(pad, values)
        if added is None:
            continue
        for node in readers.get(pad.output[0], ()):
            rounded = node.domain == DOMAIN and node.op_type == "Input" and _keeps_zero(layers[layer_of(node)])
            convolutions = readers.get(node.output[0], []) if rounded else [node]
            if all(conv.op_type == "Conv" and _explicit(conv) for conv in convolutions):
                node.input[0] = pad.input[0]
                for conv in convolutions:
                    _pad_more(conv, added)


def spatial_zeros(node: NodeProto, values: Mapping[str, TensorProto]) -> list[int] | None:
    """Return how many zeros a Pad puts around images, begins first, as Conv has it; None for other nodes and padding.

    Args:
        node: The node.
        values: Constants by name.
    """
    if not pads_with_zero(node, values) or node.input[1] not in values:
        return None
    amounts = numpy_helper.to_array(values[node.input[1]]).reshape(2, -1)
    if (len(node.input) > 3 and node.input[3]) or amounts.shape[1] < 3 or amounts[:, :2].any() or (amounts < 0).any():
        return None
    return [int(amount) for amount in amounts[:, 2:].ravel()]


def pads_with_zero(node: NodeProto, values: Mapping[str, TensorProto]) -> bool:
    """Whether a node pads with zeros.

    Args:
        node: The node.
        values: Constants by name.
    """
    if node.op_type != "Pad" or any(a.name == "mode" and a.s != b"constant" for a in node.attribute):
        return False
    if len(node.input) < 3 or not node.input[2]:
        return True
    return node.input[2] in values and not numpy_helper.to_array(values[node.input[2]]).any()


def _keeps_zero(layer: OnnxLayer) -> bool:
    """Whether a layer rounds an input of 0 to 0, so that it may be padded before or afterwards."""
    return layer.range is None or (layer.range.offset is None and layer.range.low <= 0 <= layer.range.high)


def _explicit(conv: NodeProto) -> bool:
    """Whether a convolution says how many zeros it puts at each end."""
    return all(attribute.s in (b"", b"NOTSET") for attribute in conv.attribute if attribute.name == "auto_pad")


def _pad_more(conv: NodeProto, added: list[int]) -> None:
    """Add zeros to those that a convolution puts around its input."""
    own = next((attribute for attribute in conv.attribute if attribute.name == "pads"), None)
    if own is None:
        conv.attribute.append(helper.make_attribute("pads", added))
    else:
        own.ints[:] = np.add(own.ints, added).tolist()
