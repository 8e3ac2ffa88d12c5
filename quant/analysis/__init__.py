"""What is true of a model as a whole: tied weights, its share in float, layers that calibration did not reach."""
