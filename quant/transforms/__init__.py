"""Changes to a float model before it is quantized, and what is quantized around its layers."""
