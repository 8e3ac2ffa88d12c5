"""What Ray opens and leaves on a machine that others use too: its ports, its files, its token."""

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
"""environment in which Ray's address is 127.0.0.1, as it always is on macOS and Windows: no other machine reaches it"""
PREFIX = "mpq-ray-"
INNER = "ray"
"""Ray opens the folder that it is given to everybody: it gets one within ours"""
REMOVAL_ATTEMPTS = 20
"""tenths of a second in which processes that are ending may still write"""


@contextmanager
def own_folder() -> Iterator[str | None]:
    """A folder for Ray's logs and sockets that nobody else can look into, and that goes at the end.

    What launches left that were killed goes as well. None where RAY_TMPDIR names a folder: what is in that stays.
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
    """Ray's token opens its dashboard and runs code: its file is for its owner alone. Ray makes it readable by all."""
    if "RAY_AUTH_TOKEN" in os.environ or os.environ.get("RAY_AUTH_MODE") == "disabled":
        return
    path = Path(os.environ.get("RAY_AUTH_TOKEN_PATH", Path.home() / ".ray" / "auth_token")).expanduser()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with suppress(FileExistsError), open(path, "x", opener=_for_the_owner) as file:
            file.write(secrets.token_hex(32))
        if path.stat().st_uid == os.getuid():
            path.chmod(0o600)
    except OSError as error:  # Ray may still be able to read it, or says itself what is wrong
        print(f"{path}: {error.strerror}")


def _for_the_owner(path: str, flags: int) -> int:
    return os.open(path, flags, 0o600)


def _remove_leftovers(above: Path) -> None:
    """The folders of launches that are no more: a lock goes with its process."""
    for folder in above.glob(f"{PREFIX}*"):
        if not _lock_of(folder).is_file() or folder.stat().st_uid != os.getuid():
            continue
        with suppress(Timeout, OSError), FileLock(_lock_of(folder), timeout=0):
            _remove(folder)


def _lock_of(folder: Path) -> Path:
    return folder / ".lock"


def _remove(folder: Path) -> None:
    """The lock goes last: what could not be removed is found by the next launch."""
    for _ in range(REMOVAL_ATTEMPTS):
        shutil.rmtree(folder / INNER, ignore_errors=True)
        if not (folder / INNER).exists():
            shutil.rmtree(folder, ignore_errors=True)
            return
        time.sleep(0.1)
