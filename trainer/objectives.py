"""What accuracy-aware tuning improves among the models that it accepts."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Objective:
    """A cost of a quantized model: 'performance' or 'modelsize'."""

    name: str
    greater_is_better: bool = False
    weight_ratio: float | None = None
    """share among several objectives: given for all of them or for none, which then count alike"""


performance = Objective("performance")
"""bit operations [GBOPs]: emulated rounding says nothing about the time of a deployed model, these do"""
modelsize = Objective("modelsize")
"""memory of the weights [MiB]"""
