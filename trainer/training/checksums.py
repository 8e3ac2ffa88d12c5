"""Integrity of checkpoints: each holds the checksums of its files, written last. Imports no torch, for fast checks."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from trainer.training.atomic import write_json

CHECKSUMS = "checksums.json"
INTERRUPTED = "its saving was interrupted"
DAMAGED = "damaged-"
"""Prefix of the folder name of a damaged checkpoint that was set aside."""
_NAME = re.compile(r"checkpoint-(\d+)")


def numbered(folder: Path) -> list[Path]:
    """Return the checkpoints in a folder, intact or not, newest first; other entries are ignored."""
    steps = {path: int(match[1]) for path in folder.glob("checkpoint-*") if (match := _NAME.fullmatch(path.name))}
    return sorted(steps, key=lambda path: steps[path], reverse=True)


@contextmanager
def sealed(folder: Path) -> Iterator[None]:
    """Write checksums once the block has written a checkpoint into `folder`; remove the folder after an error."""
    write_json(folder / CHECKSUMS, {})  # a process killed before the end leaves an interrupted checkpoint
    try:
        yield
        write_json(folder / CHECKSUMS, _checksums(folder))
    except Exception:
        shutil.rmtree(folder, ignore_errors=True)  # a partial checkpoint wastes space on a full disk
        raise


def flaw(folder: Path) -> str | None:
    """Return why a checkpoint cannot be resumed, `INTERRUPTED` among others; None if it is intact."""
    if not folder.is_dir():
        return "it is no folder"
    if not any(folder.iterdir()):
        return INTERRUPTED
    try:
        recorded = json.loads((folder / CHECKSUMS).read_bytes())
    except FileNotFoundError:
        return f"it has no {CHECKSUMS}"
    except (ValueError, OSError) as error:
        return f"{CHECKSUMS}: {error}"
    if not isinstance(recorded, dict):
        return f"{CHECKSUMS} holds no names of files"
    if not recorded:
        return INTERRUPTED
    for name, checksum in recorded.items():
        file = folder / name
        if not file.is_file():
            return f"{name} is missing"
        if _checksum(file) != checksum:
            return f"{name} is not what was written"
    return None


def set_aside(folder: Path) -> None:
    """Remove an interrupted checkpoint, or rename a damaged one."""
    if folder.is_dir() and flaw(folder) == INTERRUPTED:
        shutil.rmtree(folder)
        return
    place = folder.with_name(f"{DAMAGED}{folder.name}")
    if place.is_dir():
        shutil.rmtree(place)
    folder.replace(place)


def forget_older(folder: Path, kept: int, best: str | None = None) -> None:
    """Remove all checkpoints of a folder except the `kept` newest and the `best` one."""
    for path in numbered(folder)[kept:]:
        if best is None or path != Path(best):
            shutil.rmtree(path, ignore_errors=True)


def _checksums(folder: Path) -> dict[str, str]:
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != CHECKSUMS)
    return {str(path.relative_to(folder)): _checksum(path) for path in files}


def _checksum(file: Path) -> str:
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()
