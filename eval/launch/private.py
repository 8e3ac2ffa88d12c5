"""Keeps Ray private on a shared machine: its network address, its temporary files and its access token."""

from __future__ import annotations

import os
import secrets
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout

LOOPBACK = {"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0"}
"""Environment that binds Ray to 127.0.0.1, as on macOS and Windows, so that no other machine can connect."""
PREFIX = "mpq-ray-"
INNER = "ray"
"""Sub-folder for Ray, which makes its folder accessible to all users; ours around it stays closed."""
REMOVAL_ATTEMPTS = 20
"""Attempts, 0.1 s apart, at removing a folder that ending processes may still write to."""


@contextmanager
def own_folder() -> Iterator[str | None]:
    """Create a temporary folder for Ray's logs and sockets that no other user can read.

    Also removes the folders of launches that were killed.

    Yields:
        The folder, which is removed on exit; None if RAY_TMPDIR names a folder, whose content is kept.
    """
    if "RAY_TMPDIR" in os.environ:
        yield None
        return
    above = Path("/tmp") if os.access("/tmp", os.W_OK) else Path(tempfile.gettempdir())  # sockets need short paths
    _remove_leftovers(above)
    folder = Path(tempfile.mkdtemp(prefix=PREFIX, dir=above))
    lock = FileLock(_lock_of(folder))
    try:
        with lock:
            yield str(folder / INNER)
    finally:
        _remove(folder)


def keep_token_private() -> None:
    """Make Ray's token file readable by its owner only.

    Whoever knows the token can run code through Ray's dashboard, and Ray itself creates the file readable by all.
    """
    if "RAY_AUTH_TOKEN" in os.environ or os.environ.get("RAY_AUTH_MODE") == "disabled":
        return
    path = Path(os.environ.get("RAY_AUTH_TOKEN_PATH", Path.home() / ".ray" / "auth_token")).expanduser()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with suppress(FileExistsError), open(path, "x", opener=_for_the_owner) as file:
            file.write(secrets.token_hex(32))
        if path.stat().st_uid == os.getuid():
            path.chmod(0o600)
    except OSError as error:  # not fatal: Ray may be able to read the token, or reports the problem itself
        print(f"{path}: {error.strerror}")


def _for_the_owner(path: str, flags: int) -> int:
    return os.open(path, flags, 0o600)


def _remove_leftovers(above: Path) -> None:
    """Remove the folders of launches that have ended: the lock of a process is released when it ends."""
    for folder in above.glob(f"{PREFIX}*"):
        if not _lock_of(folder).is_file() or folder.stat().st_uid != os.getuid():
            continue
        with suppress(Timeout, OSError), FileLock(_lock_of(folder), timeout=0):
            _remove(folder)


def _lock_of(folder: Path) -> Path:
    return folder / ".lock"


def _remove(folder: Path) -> None:
    """Remove a folder, its lock file last, so that the next launch finds what could not be removed now."""
    for _ in range(REMOVAL_ATTEMPTS):
        shutil.rmtree(folder / INNER, ignore_errors=True)
        if not (folder / INNER).exists():
            shutil.rmtree(folder, ignore_errors=True)
            return
        time.sleep(0.1)
