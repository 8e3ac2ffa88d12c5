"""Settings whose type is one of a few words: which these are, and that no other is taken."""

from __future__ import annotations

from typing import Any, Literal, get_args, get_origin, get_type_hints


def check_choices(config: Any) -> None:
    """Raises ValueError, naming field and choices, for a field of a dataclass that holds none of its type's words."""
    for name, hint in get_type_hints(type(config)).items():
        parts = [hint] if get_origin(hint) is Literal else get_args(hint)
        if not parts or any(get_origin(part) is not Literal for part in parts):
            continue
        choices = [word for part in parts for word in get_args(part)]
        if getattr(config, name) not in choices:
            raise ValueError(f"{name} must be one of {', '.join(choices)}, got {getattr(config, name)!r}")
