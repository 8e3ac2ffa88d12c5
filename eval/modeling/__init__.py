"""Builds models by name, folder or Hub id, with or without their weights."""
