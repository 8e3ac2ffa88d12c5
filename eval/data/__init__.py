"""From files to batches and metrics."""
