"""Pareto fronts of cost and quality, and the hypervolume that the front of each series dominates."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TypeAlias

from eval.report.records import Group, lower_is_better
from eval.run.outcome import counted_part, scope_of

Point: TypeAlias = tuple[float, float]
"""(cost, quality)"""


@dataclass(frozen=True)
class Panel:
    """The runs that share one plot: one task, model and cost type."""

    task: str
    model: str
    metric: str
    cost_type: str
    cost_unit: str
    scope: str
    """`cost_scope` of its runs."""
    groups: tuple[Group, ...]
    left_out: int
    """Number of runs without a cost of this type."""

    @property
    def cost_title(self) -> str:
        """Title of the axis of costs."""
        return f"{self.cost_type} cost {counted_part(self.cost_type, self.scope)} [{self.cost_unit}]"

    @property
    def lower_is_better(self) -> bool:
        """Whether a lower value of the metric is better."""
        return lower_is_better(self.metric)

    @cached_property
    def log_cost(self) -> bool:
        """Whether costs span a factor of 8 or more, which calls for a logarithmic axis."""
        costs = [cost for points in self.points.values() for cost, _ in points]
        return min(costs) > 0 and max(costs) / min(costs) >= 8

    @cached_property
    def points(self) -> dict[str, list[Point]]:
        """Series -> mean cost and quality of each of its groups."""
        points: dict[str, list[Point]] = {}
        for group in self.groups:
            mean = (group.cost(self.cost_type)[0], group.quality[0])
            points.setdefault(group.series, []).append(mean)
        return dict(sorted(points.items()))

    def hypervolume(self, series: str) -> float | None:
        """Share that `series` dominates of the bounding box of all runs, on the axes as drawn."""
        every = [self._oriented(point) for points in self.points.values() for point in points]
        return hypervolume([self._oriented(point) for point in self.points[series]], every)

    def front(self, series: str) -> list[Point]:
        """Points of `series` that none of its other points dominates, by rising cost."""
        return [point for point, _ in pareto_front([(p, self._oriented(p)) for p in self.points[series]])]

    def _oriented(self, point: Point) -> Point:
        """Point on the axes as drawn, with the quality negated if lower is better."""
        cost, quality = point
        return math.log(cost) if self.log_cost else cost, -quality if self.lower_is_better else quality


def panels(groups: Sequence[Group]) -> list[Panel]:
    """One panel per task, model, cost type and scope with a target; if there are no targets, per cost type."""
    found = []
    for task, model, metric in dict.fromkeys(tuple(g.record[k] for k in ("task", "model", "metric")) for g in groups):
        own = [g for g in groups if (g.record["task"], g.record["model"], g.record["metric"]) == (task, model, metric)]
        aimed = [g for g in own if g.record["cost_target"] is not None] or own
        kinds = ((g.record["cost_type"], g.record["cost_unit"], scope_of(g.record)) for g in aimed)
        for cost_type, unit, scope in dict.fromkeys(kinds):
            of_scope = [group for group in own if scope_of(group.record) == scope]
            shown = tuple(group for group in of_scope if group.has_cost(cost_type))
            left_out = sum(len(group.runs) for group in of_scope) - sum(len(group.runs) for group in shown)
            found.append(Panel(task, model, metric, cost_type, unit, scope, shown, left_out))
    return found


def pareto_front(points: Sequence[tuple[Point, Point]]) -> list[tuple[Point, Point]]:
    """Select the non-dominated pairs (less cost, more quality), by rising cost.

    Args:
        points: Pairs of any point and its (cost, quality), of which the latter is compared.
    """
    front: list[tuple[Point, Point]] = []
    for pair in sorted(points, key=lambda pair: (pair[1][0], -pair[1][1])):
        if not front or pair[1][1] > front[-1][1][1]:
            front.append(pair)
    return front


def hypervolume(points: Sequence[Point], box: Sequence[Point]) -> float | None:
    """Share that `points` dominate of the bounding box of `box`; None if the box has no area."""
    low, high = min(cost for cost, _ in box), max(cost for cost, _ in box)
    worst, best = min(quality for _, quality in box), max(quality for _, quality in box)
    if low == high or worst == best:
        return None
    front = [point for point, _ in pareto_front([(p, p) for p in points])]
    ends = [*(cost for cost, _ in front[1:]), high]
    area = sum((end - cost) * (quality - worst) for (cost, quality), end in zip(front, ends, strict=True))
    return area / ((high - low) * (best - worst))
