"""Properties of a whole model: tied weights, the share that stays in float, layers that calibration did not reach."""
