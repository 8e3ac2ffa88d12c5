"""Suggestions for misspelled names, appended to error messages."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from pathlib import Path


def did_you_mean(name: str, known: Iterable[str], count: int = 1) -> str:
    """Return "; did you mean A?" with up to `count` of the closest known names, or "" if none is close."""
    close = difflib.get_close_matches(name, list(known), n=count)
    return f"; did you mean {', '.join(close)}?" if close else ""


def local_folders() -> list[str]:
    """Return the names of the folders in the working directory, except hidden ones."""
    return sorted(path.name for path in Path().iterdir() if path.is_dir() and not path.name.startswith("."))
