"""Export to ONNX with QuantizeLinear and DequantizeLinear."""
