"""Schema of `result.json`, shared by the run that writes it and by all readers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

SCHEMA_VERSION = 1
"""Increases when a key that readers need changes its name or its meaning."""
NUMBER = (int, float)
FIELDS: dict[str, tuple[type, ...]] = {
    "task": (str,),
    "model": (str,),
    "method": (str,),
    "seed": (int,),
    "run_id": (str,),
    "cost_type": (str,),
    "cost_target": (*NUMBER, type(None)),
    "cost": NUMBER,
    "cost_unit": (str,),
    "costs": (dict,),
    "metrics": (dict,),
    "metric": (str,),
    "assignment": (dict,),
    "search_space": (list, type(None)),
    "layers": (list,),
    "steps": (int,),
    "wall_seconds": NUMBER,
}
"""Required keys of a finished record -> types of their values."""
BUDGETS = "budgets"
"""Optional key of a record. Value: the bits of all budgets that one training served; None for a single one."""
LOSS_RISE = "loss_rise"
"""Optional key of a finished record whose loss ended far above its start. Value: [start, end]."""


def loss_rise(record: Mapping[str, Any]) -> str | None:
    """Format the rise of the loss: '2.3 to 4e+06'; None if the record has none."""
    if LOSS_RISE not in record:
        return None
    start, end = record[LOSS_RISE]
    return f"{start:.3g} to {end:.3g}"
