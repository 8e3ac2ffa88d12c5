"""What a module is called with: layers read one tensor, by position or by name."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

Arguments = tuple[tuple[Any, ...], dict[str, Any]]
"""of a call: by position, by name"""


def first_tensor(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor | None:
    """What a module reads."""
    return next((value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)), None)


def with_first_tensor(change: Callable[[Tensor], Tensor], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Arguments:
    """The arguments with what the module reads changed."""
    named: dict[Any, Any] = {**dict(enumerate(args)), **kwargs}
    read = next(name for name, value in named.items() if isinstance(value, Tensor))
    named[read] = change(named[read])
    return tuple(named[place] for place in range(len(args))), {name: named[name] for name in kwargs}


def examples_of(batch: Any) -> int:
    """Rows of a batch: of the first tensor with an axis in it, however deep; 0 where there is none."""
    if isinstance(batch, Tensor):
        return len(batch) if batch.dim() else 0
    parts = batch.values() if isinstance(batch, Mapping) else batch if isinstance(batch, list | tuple) else ()
    return next((rows for part in parts if (rows := examples_of(part))), 0)
