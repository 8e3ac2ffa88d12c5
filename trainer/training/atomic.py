"""Atomic writing: a file is complete or absent."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any


def write_json(path: Path, value: Any) -> None:
    """Write a value as JSON, atomically. NaN and infinity, which JSON does not have, raise ValueError."""
    text = json.dumps(value, indent=1, allow_nan=False)
    write_atomically(path, lambda temporary: Path(temporary).write_text(text + "\n"))


def write_atomically(path: Path, write: Callable[[str], Any]) -> None:
    """Call `write(temporary path)` and rename, so that readers see the old file or the complete new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        write(str(temporary))
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
