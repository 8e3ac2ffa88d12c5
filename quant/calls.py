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
