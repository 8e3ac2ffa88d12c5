"""From names and folders to models."""
