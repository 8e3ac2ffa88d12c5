"""Files that are there as a whole or not at all."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any


def write_json(path: Path, value: Any) -> None:
    """JSON, written to a temporary name and renamed; NaN and infinity are refused, they are not JSON."""
    text = json.dumps(value, indent=1, allow_nan=False)
    write_atomically(path, lambda temporary: Path(temporary).write_text(text + "\n"))


def write_atomically(path: Path, write: Callable[[str], Any]) -> None:
    """Call `write(temporary path)` and rename: a reader sees the old file or the whole new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        write(str(temporary))
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
