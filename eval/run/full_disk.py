"""Detection of errors that are caused by a full disk."""

from __future__ import annotations

import errno
from collections.abc import Iterator

_ERRORS = (errno.ENOSPC, errno.EDQUOT)
_MESSAGES = ("No space left on device", "Disk quota exceeded")
"""Messages of libraries that do not raise OSError, such as safetensors and HDF5."""


def is_full_disk(error: BaseException) -> bool:
    """Whether an error, or one in its chain of causes, means that the disk is full."""
    return any(
        (isinstance(one, OSError) and one.errno in _ERRORS) or any(word in str(one) for word in _MESSAGES)
        for one in _chain(error)
    )


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__
