"""Accuracy-aware tuning: which quantization keeps a model as good as it has to be."""
