"""ONNX with QuantizeLinear and DequantizeLinear."""
