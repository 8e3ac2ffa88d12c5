"""Flags, YAML files and their checks."""
