"""JointSpace: decisions of architecture beside those of formats, and the exact cost of every joint choice."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from cost.cost import COSTS
from cost.profile import LayerProfile, macs_share
from cost.units import CostType
from policy.budget import Limit
from policy.factors import Factor, cost_range
from policy.joint_budget import JointBudget
from policy.space import Decision, SearchSpace
from quant.convert import set_formats
from quant.elastic.net import ElasticNet
from quant.errors import UserError
from quant.formats import Format, GroupFormat, MixedFormat
from quant.quant_module import QuantModule

LayerCost = Callable[[LayerProfile, tuple[Format, Format]], float]
"""(profile of the sized layer, its formats) -> cost."""


@dataclass(frozen=True)
class JointSpace(SearchSpace):
    """A choice is one index per decision: first those of formats, then those of the architecture.

    All have the same number of choices; the last one of a decision with fewer is repeated.
    """

    net: ElasticNet = field(kw_only=True)

    @classmethod
    def of(cls, space: SearchSpace, net: ElasticNet) -> JointSpace:
        """Add the decisions of an elastic model to those of formats.

        Raises:
            UserError: For weights in groups, or groups of channels, which a narrower layer does not share.
        """
        formats = {weight for decision in space.decisions for weight, _ in decision.choices}
        if grouped := [format for format in formats if isinstance(format, GroupFormat | MixedFormat)]:
            raise UserError(f"{grouped[0]}: a search of architecture has no weights in groups, which widths would cut")
        most = max(space.num_choices, *(len(decision.choices) for decision in net.decisions))
        decisions = tuple(
            Decision(d.name, d.layers, (*d.choices, *d.choices[-1:] * (most - len(d.choices)))) for d in space.decisions
        )
        return cls(decisions, space.reach, net=net)

    @property
    def num_decisions(self) -> int:
        """Number of decisions of both kinds."""
        return len(self.decisions) + len(self.net.decisions)

    @property
    def names(self) -> list[str]:
        """Names of the decisions of both kinds."""
        return [*super().names, *(f"{decision.name} {decision.kind}" for decision in self.net.decisions)]

    def structure(self, choice: Sequence[int]) -> list[int]:
        """Return the architecture's part of a choice, one index per decision of the elastic model."""
        own = choice[len(self.decisions) :]
        return [min(int(i), len(d.choices) - 1) for i, d in zip(own, self.net.decisions, strict=True)]

    def assignment(self, choice: Sequence[int]) -> dict[str, tuple[Format, Format]]:
        """Return the formats of every layer that a choice keeps."""
        kept = self.kept(choice)
        formats = super().assignment(choice[: len(self.decisions)])
        return {layer: pair for layer, pair in formats.items() if layer in kept}

    def kept(self, choice: Sequence[int]) -> set[str]:
        """Return the layers that are not in a block that a choice leaves out."""
        gone = tuple(f"{block}." for block in self.net.left_out(self.structure(choice)))
        return {layer for decision in self.decisions for layer in decision.layers if not layer.startswith(gone)}

    def apply(self, modules: Mapping[str, QuantModule], choice: Sequence[int]) -> None:
        """Switch the model to a choice, its sizes and its formats."""
        self.net.set(self.structure(choice))
        set_formats(modules, self.assignment(choice))

    def factors(self, profiles: Sequence[LayerProfile], costs: Sequence[LayerCost]) -> list[Factor]:
        """Return one factor per layer, with a table for each of several costs.

        Args:
            profiles: Profiles of the layers of the whole model.
            costs: Costs of one layer.
        """
        profile = {record.name: record for record in profiles}
        return [
            self._factor(index, decision, profile[layer], costs)
            for index, decision in enumerate(self.decisions)
            for layer in decision.layers
        ]

    def _factor(self, index: int, decision: Decision, profile: LayerProfile, costs: Sequence[LayerCost]) -> Factor:
        name, first = profile.name, len(self.decisions)
        parts = self.net.parts.get(name)
        touching = () if parts is None else parts.decisions
        shape = (self.num_choices,) * (1 + len(touching))
        tables = [np.zeros(shape) for _ in costs]
        whole = [0] * len(self.net.decisions)
        for taken in itertools.product(range(self.num_choices), repeat=len(touching)):
            for structure, position in zip(touching, taken, strict=True):
                whole[structure] = min(position, len(self.net.decisions[structure].choices) - 1)
            sized = profile if parts is None else sized_profile(profile, self.net, whole)
            for table, cost in zip(tables, costs, strict=True):
                for position, pair in enumerate(decision.choices):
                    table[(position, *taken)] = 0.0 if sized is None else cost(sized, self.runs_in(name, pair))
        return Factor((index, *(first + structure for structure in touching)), tuple(tables))

    def budget(
        self, profiles: Sequence[LayerProfile], cost_type: CostType, target: float, limits: Sequence[Limit]
    ) -> JointBudget:
        """Return the limits on the cost of a joint choice.

        Args:
            profiles: Profiles of the layers of the whole model.
            cost_type: The run's own cost.
            target: Limit on it.
            limits: Hard limits. Other costs than memory and compute, such as a measured latency, are known for whole
                layers; a smaller one is charged its share of the multiply-accumulates.
        """
        costs = [layer_cost(cost_type), *(_limit_cost(limit, profiles) for limit in limits)]
        factors = self.factors(profiles, costs)
        values = [target, *(limit.value for limit in limits)]
        return JointBudget.within(factors, values, self.num_decisions, self.num_choices)

    def cost_range(self, profiles: Sequence[LayerProfile], cost_type: CostType) -> tuple[float, float]:
        """Return the lowest and the highest cost of any joint choice; targets between them are feasible."""
        return cost_range(self.factors(profiles, [layer_cost(cost_type)]), 0, self.num_decisions, self.num_choices)


def layer_cost(cost_type: CostType) -> LayerCost:
    """Return the cost of one layer in MiB or GBOPs."""
    return lambda profile, pair: COSTS[cost_type]([profile], {profile.name: pair})


def _limit_cost(limit: Limit, profiles: Sequence[LayerProfile]) -> LayerCost:
    if limit.name in COSTS:
        return layer_cost(limit.name)  # type: ignore[arg-type]
    whole = {profile.name: profile for profile in profiles}
    return lambda sized, pair: limit.of(sized.name, pair) * macs_share(sized, whole[sized.name])


def sized_profile(profile: LayerProfile, net: ElasticNet, structure: Sequence[int]) -> LayerProfile | None:
    """Return the profile of a layer under a choice of architecture; None if its block is left out.

    Output positions are those of the whole model: kernels and padding shrink together.

    Args:
        profile: Profile of the whole layer.
        net: The elastic model.
        structure: One index per decision of the elastic model.
    """
    size = net.size_of(profile.name, structure)
    if size is None:
        return None
    params = net.weights_of(profile.name, size)
    return replace(profile, params=params, macs=params * profile.positions, channels=size.out)
