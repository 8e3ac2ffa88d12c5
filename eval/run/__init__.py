"""One run: its plan, its trainer, its record."""
