"""Export of a finished run for deployment: `python -m eval.export RUN_DIR --format packed`."""
