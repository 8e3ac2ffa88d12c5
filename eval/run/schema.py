"""What a run's `result.json` holds: the one place that says so, for the run that writes it and all that read it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

SCHEMA_VERSION = 1
"""rises when a key that readers need changes its name or its meaning"""
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
"""keys of a finished record that every reader may count on -> the types of their values"""
LOSS_RISE = "loss_rise"
"""key of a finished record whose loss ended far above where it started -> [start, end]; others have none"""


def loss_rise(record: Mapping[str, Any]) -> str | None:
    """How such a loss reads: '2.3 to 4e+06'."""
    if LOSS_RISE not in record:
        return None
    start, end = record[LOSS_RISE]
    return f"{start:.3g} to {end:.3g}"
