"""From the values of one tensor to its range, its rounding and its gradient."""
