"""Export quantized models: packed checkpoint, ONNX with QuantizeLinear/DequantizeLinear, torchao, compressed-tensors.

Each format is in a module of its own.
"""

from quant.export.layer_report import LayerVerdict
from quant.export.packed import packed_sizes, read_packed, restore, write_packed

__all__ = ["LayerVerdict", "packed_sizes", "read_packed", "restore", "write_packed"]
