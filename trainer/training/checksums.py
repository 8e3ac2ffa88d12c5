"""Which checkpoints are whole: each holds the checksums of its files, written last. No torch: looking is cheap."""

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
"""how the name of a checkpoint begins that was set aside"""
_NAME = re.compile(r"checkpoint-(\d+)")


def numbered(folder: Path) -> list[Path]:
    """The checkpoints in `folder`, whole or not, the newest first; what else lies there is not ours."""
    steps = {path: int(match[1]) for path in folder.glob("checkpoint-*") if (match := _NAME.fullmatch(path.name))}
    return sorted(steps, key=lambda path: steps[path], reverse=True)


@contextmanager
def sealed(folder: Path) -> Iterator[None]:
    """What the block writes into `folder` is a checkpoint once it has its checksums; an error leaves none of it."""
    write_json(folder / CHECKSUMS, {})  # from here to the end a killed process leaves an interrupted checkpoint
    try:
        yield
        write_json(folder / CHECKSUMS, _checksums(folder))
    except Exception:
        shutil.rmtree(folder, ignore_errors=True)  # half a checkpoint on a full disk is only in the way
        raise


def flaw(folder: Path) -> str | None:
    """Why the checkpoint in `folder` is not to be gone on from, `INTERRUPTED` for one; None for a whole one."""
    if not folder.is_dir():
        return "it is no folder"
    if not any(folder.iterdir()):
        return INTERRUPTED
    try:
        told = json.loads((folder / CHECKSUMS).read_bytes())
    except FileNotFoundError:
        return f"it has no {CHECKSUMS}"
    except (ValueError, OSError) as error:
        return f"{CHECKSUMS}: {error}"
    if not isinstance(told, dict):
        return f"{CHECKSUMS} holds no names of files"
    if not told:
        return INTERRUPTED
    for name, checksum in told.items():
        file = folder / name
        if not file.is_file():
            return f"{name} is missing"
        if _checksum(file) != checksum:
            return f"{name} is not what was written"
    return None


def set_aside(folder: Path) -> None:
    """Take a checkpoint that has a flaw out of the way: a damaged one is kept under another name."""
    if folder.is_dir() and flaw(folder) == INTERRUPTED:
        shutil.rmtree(folder)
        return
    place = folder.with_name(f"{DAMAGED}{folder.name}")
    if place.is_dir():
        shutil.rmtree(place)
    folder.replace(place)


def forget_older(folder: Path, kept: int, best: str | None = None) -> None:
    """Remove all but the `kept` newest checkpoints of `folder` and the `best` one."""
    for path in numbered(folder)[kept:]:
        if best is None or path != Path(best):
            shutil.rmtree(path, ignore_errors=True)


def _checksums(folder: Path) -> dict[str, str]:
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != CHECKSUMS)
    return {str(path.relative_to(folder)): _checksum(path) for path in files}


def _checksum(file: Path) -> str:
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()
