"""What accuracy-aware tuning improves among the models that it accepts."""

from __future__ import annotations

import math
from dataclasses import dataclass

from quant.errors import UserError

GREATER_IS_BETTER = {"performance": True, "modelsize": False}
"""objective -> whether more of it is better: performance means speed"""


@dataclass(frozen=True)
class Objective:
    """A quality of a quantized model beside its metrics.

    Speed is judged by bit operations [GBOPs], since emulated rounding says nothing about the time of a deployed model;
    size by the memory of the weights [MiB].
    """

    name: str
    """'performance' (speed) or 'modelsize'"""
    greater_is_better: bool | None = None
    """None: True for performance, False for modelsize"""
    weight_ratio: float | None = None
    """share among several objectives: given for all of them or for none, which then count alike"""

    def __post_init__(self) -> None:
        if self.name not in GREATER_IS_BETTER:
            raise UserError(f"unknown objective {self.name!r}; choices: {', '.join(GREATER_IS_BETTER)}")
        if self.weight_ratio is not None and not 0 < self.weight_ratio < math.inf:
            raise UserError(f"objective {self.name}: weight_ratio must be positive, got {self.weight_ratio}")

    @property
    def sign(self) -> int:
        """1 where the objective is met by a lower cost, -1 where by a higher one."""
        usual = GREATER_IS_BETTER[self.name]
        return 1 if self.greater_is_better in (None, usual) else -1


performance = Objective("performance", greater_is_better=True)
modelsize = Objective("modelsize", greater_is_better=False)
