"""Launching many runs as Ray Tune trials."""
