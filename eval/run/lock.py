"""Folder locks: two processes in one folder would overwrite each other's checkpoints, histories and records."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from quant.errors import UserError


class FolderInUse(UserError):
    """Another process holds the lock of the folder."""


@contextmanager
def exclusive_lock(folder: Path, what: str, flag: str, timeout: float = 0) -> Iterator[None]:
    """Lock `folder` while the block runs. The operating system releases the lock if the process is killed.

    Args:
        folder: Folder to lock; created if missing.
        what: Kind of process, named in the error ('launch' or 'run').
        flag: Flag that selects another folder, named in the error.
        timeout: Seconds to wait for the lock.

    Raises:
        FolderInUse: Another process holds the lock.
        OSError: The folder cannot be created.
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
