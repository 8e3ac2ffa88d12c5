"""Transformations of a float model before it is quantized, and quantizers around its layers."""
