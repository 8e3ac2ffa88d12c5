"""What inference engines store and run: one table, and the rules that read it. Torch is not imported."""
