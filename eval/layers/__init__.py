"""What layers do in their model: which are quantized, and which belong together."""
