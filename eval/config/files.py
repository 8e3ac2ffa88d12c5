"""Checks of local folders, output files and optional packages, with one-line errors."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path

from eval.commands import python
from quant.errors import UserError


def is_path(text: str) -> bool:
    """Return whether a model or task names a local folder: the folder exists, or the text looks like a path."""
    return text.startswith(("/", "./", "../", "~")) or (os.sep in text and Path(text).is_dir()) or Path(text).is_dir()


@contextmanager
def writing(flag: str, path: Path) -> Iterator[None]:
    """Turn write errors inside the context (disk full, no permission) into a UserError that names `flag` and `path`."""
    from safetensors import SafetensorError

    try:
        yield
    except (OSError, SafetensorError) as error:
        raise UserError(f"--{flag} {path}: cannot be written: {error}") from None


def require(*packages: str) -> None:
    """Raise UserError with the pip command if one of these optional packages is not installed."""
    if missing := [name for name in packages if find_spec(name) is None]:
        raise UserError(f"{missing[0]} is not installed: {python()} -m pip install {' '.join(missing)}")
