"""The layers of a model: their roles, which of them are quantized, and which must share a format."""
