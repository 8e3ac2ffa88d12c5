"""The search beside the trainer: what is decided, what decides it, and how good it is."""
