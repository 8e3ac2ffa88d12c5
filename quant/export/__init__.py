"""Quantized models for others to run: a packed checkpoint, ONNX with QuantizeLinear/DequantizeLinear, torchao,
compressed-tensors. Each is in a module of its own, this is where to find them."""

from quant.export.layer_report import LayerVerdict
from quant.export.packed import packed_sizes, read_packed, restore, write_packed

__all__ = ["LayerVerdict", "packed_sizes", "read_packed", "restore", "write_packed"]
