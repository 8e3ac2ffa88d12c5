"""Names of the files that a saved model consists of, for those who look for one without importing torch."""

WEIGHTS = "model.safetensors"
QUANTIZATION = "quantization.json"
