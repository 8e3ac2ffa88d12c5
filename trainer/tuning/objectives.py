"""Objective: the cost that tuning improves among accepted models."""

from __future__ import annotations

import math
from dataclasses import dataclass

from quant.errors import UserError

GREATER_IS_BETTER = {"performance": True, "modelsize": False}
"""Objective -> whether more of it is better; 'performance' means speed."""


@dataclass(frozen=True)
class Objective:
    """An objective besides the metrics.

    Speed is measured in bit operations [GBOPs], because the time of emulated rounding does not predict that of a
    deployed model; size in memory of the weights [MiB].
    """

    name: str
    """'performance' (speed) or 'modelsize'."""
    greater_is_better: bool | None = None
    """None: True for performance, False for modelsize."""
    weight_ratio: float | None = None
    """Weight among several objectives, given for all or for none (equal weights)."""

    def __post_init__(self) -> None:
        if self.name not in GREATER_IS_BETTER:
            raise UserError(f"unknown objective {self.name!r}; choices: {', '.join(GREATER_IS_BETTER)}")
        if self.weight_ratio is not None and not 0 < self.weight_ratio < math.inf:
            raise UserError(f"objective {self.name}: weight_ratio must be positive, got {self.weight_ratio}")

    @property
    def sign(self) -> int:
        """1 if a lower cost is better, -1 if a higher one is."""
        usual = GREATER_IS_BETTER[self.name]
        return 1 if self.greater_is_better in (None, usual) else -1


performance = Objective("performance", greater_is_better=True)
modelsize = Objective("modelsize", greater_is_better=False)
