"""A full disk: which errors mean it, whoever raises them."""

from __future__ import annotations

import errno
from collections.abc import Iterator

_ERRORS = (errno.ENOSPC, errno.EDQUOT)
_WORDS = ("No space left on device", "Disk quota exceeded")
"""as libraries in other languages (safetensors, HDF5) pass it on"""


def is_full_disk(error: BaseException) -> bool:
    """Whether an error, or one that it came from, is that nothing more can be written."""
    return any(
        (isinstance(one, OSError) and one.errno in _ERRORS) or any(word in str(one) for word in _WORDS)
        for one in _chain(error)
    )


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__
