"""Accuracy-aware tuning: find a quantization that keeps a model's metrics."""
