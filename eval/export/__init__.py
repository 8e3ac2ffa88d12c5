"""A finished run as a model for deployment: `python -m eval.export RUN_DIR --format packed`."""
