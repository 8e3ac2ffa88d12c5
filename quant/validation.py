"""Choices of settings, without torch: flags are checked against them before it is imported."""

from __future__ import annotations

from typing import Any, Literal, get_args, get_origin, get_type_hints

OBSERVER_NAMES = (
    *("minmax", "percentile", "mse", "entropy", "avg_minmax", "avg_quantile"),
    *("mse_fast", "avg_mse_fast", "lsq_plus", "avg_prune_minmax", "mse_grid", "mse_histogram"),
    "weighted_mse",
)
"""Range estimators, implemented in `quant.quantizers.observers.OBSERVERS`."""
WEIGHTS_ONLY = ("weighted_mse",)
"""Those that weigh a weight's errors by the layer's inputs, and suit no activations."""
HIGH_PRECISION_OPS = ("gelu", "softmax", "layernorm")
"""Operations that can run in float between quantized inputs and outputs, see `quant.transforms.placement`."""


def check_choices(config: Any) -> None:
    """Check the fields of a dataclass whose type is a Literal.

    Args:
        config: An instance of a dataclass.

    Raises:
        ValueError: For a field that holds none of its type's values; the message names the field and the choices.
    """
    for name, hint in get_type_hints(type(config)).items():
        parts = [hint] if get_origin(hint) is Literal else get_args(hint)
        if not parts or any(get_origin(part) is not Literal for part in parts):
            continue
        choices = [word for part in parts for word in get_args(part)]
        if getattr(config, name) not in choices:
            raise ValueError(f"{name} must be one of {', '.join(choices)}, got {getattr(config, name)!r}")
