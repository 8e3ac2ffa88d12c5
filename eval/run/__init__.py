"""A single run: its plan, its trainer and its record."""
