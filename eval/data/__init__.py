"""Data of tasks: reads files, prepares batches for a model, and computes metrics."""
