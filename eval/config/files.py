"""Paths that flags name: which texts are paths, and errors of writing as one line that names the flag."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path

from eval.commands import python
from quant.errors import UserError


def is_path(text: str) -> bool:
    """Whether a model or task is meant as a local folder: it exists, or is written like one."""
    return text.startswith(("/", "./", "../", "~")) or (os.sep in text and Path(text).is_dir()) or Path(text).is_dir()


@contextmanager
def writing(flag: str, path: Path) -> Iterator[None]:
    """Within, what the file system refuses (a full disk, a folder that others own) is an error that names `path`."""
    from safetensors import SafetensorError

    try:
        yield
    except (OSError, SafetensorError) as error:
        raise UserError(f"--{flag} {path}: cannot be written: {error}") from None


def require(*packages: str) -> None:
    """Raises UserError if one of these extras is not installed."""
    if missing := [name for name in packages if find_spec(name) is None]:
        raise UserError(f"{missing[0]} is not installed: {python()} -m pip install {' '.join(missing)}")
