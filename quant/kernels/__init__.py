"""Rounding, and products of rounded values: eager, compiled, in C++ and with oneDNN."""
