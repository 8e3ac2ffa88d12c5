"""Finished runs as tables, pictures and one page."""
