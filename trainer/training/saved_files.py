"""File names of a saved model, importable without torch."""

WEIGHTS = "model.safetensors"
QUANTIZATION = "quantization.json"
