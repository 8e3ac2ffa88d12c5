"""What accuracy-aware tuning may not lose: a metric of the evaluation and how far it may fall."""

from __future__ import annotations

import math
from dataclasses import dataclass

from quant.errors import UserError


@dataclass(frozen=True)
class Metric:
    """A number that the evaluation returns, and the loss that is still accepted."""

    name: str
    """as the evaluation calls it: 'eval_f1'"""
    greater_is_better: bool = True
    is_relative: bool = True
    """whether `criterion` is a share of the float model's value"""
    criterion: float = 0.01
    """accepted: value >= base - criterion * |base|, or base - criterion; mirrored where lower is better"""
    weight_ratio: float | None = None
    """share among several metrics: given for all of them or for none, which then count alike. It ranks models that
    are not accepted; each metric keeps its own criterion, whatever the others gain"""

    def __post_init__(self) -> None:
        if not 0 <= self.criterion < math.inf:
            raise UserError(f"metric {self.name}: criterion must lie in [0, inf), got {self.criterion}")
        if self.weight_ratio is not None and not 0 < self.weight_ratio < math.inf:
            raise UserError(f"metric {self.name}: weight_ratio must be positive, got {self.weight_ratio}")

    def drop(self, value: float, base: float) -> float:
        """How much worse than the float model; negative where better."""
        return base - value if self.greater_is_better else value - base

    def allowed(self, base: float) -> float:
        """The drop that is still accepted."""
        return self.criterion * abs(base) if self.is_relative else self.criterion

    def excess(self, value: float, base: float) -> float:
        """The drop beyond what is accepted: 0 at the bound, whatever was rounded; infinite where there is no value."""
        drop, allowed = self.drop(value, base), self.allowed(base)
        if math.isnan(drop):
            return math.inf
        return 0.0 if math.isclose(drop, allowed, rel_tol=1e-12) else drop - allowed
