"""One process works in a folder at a time: two would write over each other's checkpoints, histories and records."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from quant.errors import UserError


class FolderInUse(UserError):
    """Another process works in the folder."""


@contextmanager
def exclusive_lock(folder: Path, what: str, flag: str, timeout: float = 0) -> Iterator[None]:
    """Holds `folder`, making it where there is none; the lock goes with the process, however that ends.

    Args:
        what: is at work there, as the error says it: 'launch', 'run'.
        flag: that names another folder.
        timeout: seconds to wait for one that is about to end.

    Raises FolderInUse where another process holds it, OSError where the folder cannot be made.
    """
    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / ".lock", timeout=timeout)
    try:
        lock.acquire()
    except Timeout:
        raise FolderInUse(f"{folder}: another {what} is at work there; wait for it, or choose another {flag}") from None
    try:
        yield
    finally:
        lock.release()
