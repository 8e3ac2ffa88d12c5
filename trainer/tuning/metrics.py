"""Metric: a measure of the evaluation that tuning has to keep, and how much of it may be lost."""

from __future__ import annotations

import math
from dataclasses import dataclass

from quant.errors import UserError


@dataclass(frozen=True)
class Metric:
    """A metric of the evaluation with its accepted loss."""

    name: str
    """Key in the results of the evaluation, such as 'eval_f1'."""
    greater_is_better: bool = True
    is_relative: bool = True
    """Whether `criterion` is relative to the float model's value."""
    criterion: float = 0.01
    """Accepted: value >= base - criterion * |base|, or base - criterion if absolute; mirrored if lower is better."""
    weight_ratio: float | None = None
    """Weight among several metrics, given for all or for none (equal weights). It ranks models that are not accepted;
    every metric has to meet its own criterion, whatever the others gain."""

    def __post_init__(self) -> None:
        if not 0 <= self.criterion < math.inf:
            raise UserError(f"metric {self.name}: criterion must lie in [0, inf), got {self.criterion}")
        if self.weight_ratio is not None and not 0 < self.weight_ratio < math.inf:
            raise UserError(f"metric {self.name}: weight_ratio must be positive, got {self.weight_ratio}")

    def drop(self, value: float, base: float) -> float:
        """Return how much worse than the float model a value is; negative if it is better."""
        return base - value if self.greater_is_better else value - base

    def allowed(self, base: float) -> float:
        """Return the largest accepted drop."""
        return self.criterion * abs(base) if self.is_relative else self.criterion

    def excess(self, value: float, base: float) -> float:
        """Return the drop beyond the accepted one: 0 at the bound despite rounding, infinite for a missing value."""
        drop, allowed = self.drop(value, base), self.allowed(base)
        if math.isnan(drop):
            return math.inf
        return 0.0 if math.isclose(drop, allowed, rel_tol=1e-12) else drop - allowed
