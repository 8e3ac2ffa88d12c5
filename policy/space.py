"""SearchSpace: decisions, the layers and formats behind them, and the cost of every choice."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray

from cost.cost import COSTS, cost_of_bits
from cost.engine import RunsAs
from cost.profile import LayerProfile
from cost.units import CostType
from quant.convert import Assignment, set_formats
from quant.engines.rules import UNQUANTIZED, Pair
from quant.errors import UserError
from quant.formats import FLOAT, Format, format_pairs
from quant.quant_module import QuantModule, Reach, runs_in

Partition: TypeAlias = Literal["layer", "single"] | Mapping[str, Collection[str]]
"""One decision per layer, one for the whole model, or block name -> names of the layers that share a choice."""


@dataclass(frozen=True)
class Decision:
    """Layers that share one choice."""

    name: str
    layers: tuple[str, ...]
    choices: tuple[tuple[Format, Format], ...]
    """(weight format, activation format) of each choice."""


@dataclass(frozen=True)
class SearchSpace:
    """Independent decisions with the same number of choices each; a choice is one index per decision."""

    decisions: tuple[Decision, ...]
    reach: Mapping[str, Reach] = field(default_factory=dict)
    """Layers that calibration did not reach; they stay in float whatever is chosen."""

    @property
    def num_decisions(self) -> int:
        """Number of decisions."""
        return len(self.decisions)

    @property
    def names(self) -> list[str]:
        """Names of the decisions."""
        return [decision.name for decision in self.decisions]

    @property
    def num_choices(self) -> int:
        """Choices per decision."""
        return len(self.decisions[0].choices)

    def assignment(self, choice: Sequence[int]) -> dict[str, tuple[Format, Format]]:
        """Return the formats of every layer under a choice, one index per decision."""
        return {
            layer: self.runs_in(layer, decision.choices[index])
            for decision, index in zip(self.decisions, choice, strict=True)
            for layer in decision.layers
        }

    def runs_in(self, layer: str, formats: tuple[Format, Format]) -> tuple[Format, Format]:
        """Return the (weight, activation) formats in which a layer runs if `formats` are chosen."""
        return runs_in(self.reach[layer], formats) if layer in self.reach else formats

    def apply(self, modules: Mapping[str, QuantModule], choice: Sequence[int]) -> None:
        """Switch a model's layers to a choice, one index per decision."""
        set_formats(modules, self.assignment(choice))

    def choice(self, assignment: Assignment) -> list[int]:
        """Return the choice of an assignment. Raises ValueError, naming the decision, if it is not in this space."""
        indices = []
        for decision in self.decisions:
            taken = (
                index
                for index, pair in enumerate(decision.choices)
                if all(assignment[layer] == self.runs_in(layer, pair) for layer in decision.layers)
            )
            if (index := next(taken, None)) is None:
                pairs = {assignment[layer] for layer in decision.layers}
                formats = ", ".join(f"{weight}/{activation}" for weight, activation in pairs)
                raise ValueError(f"{decision.name} cannot have {formats}: its layers share one of its choices")
            indices.append(index)
        return indices

    def cost_table(self, profiles: Sequence[LayerProfile], cost_type: CostType) -> NDArray[np.float64]:
        """Return the cost of each choice of each decision in MiB or GBOPs, (decisions, choices).

        Raises KeyError for a layer without a profile.
        """
        profile = {record.name: record for record in profiles}
        return np.array(
            [
                [
                    COSTS[cost_type](
                        [profile[layer] for layer in decision.layers],
                        {layer: self.runs_in(layer, pair) for layer in decision.layers},
                    )
                    for pair in decision.choices
                ]
                for decision in self.decisions
            ]
        )

    def cost_range(self, profiles: Sequence[LayerProfile], cost_type: CostType) -> tuple[float, float]:
        """Return the lowest and the highest cost of any assignment; targets between them are feasible."""
        table = self.cost_table(profiles, cost_type)
        return math.fsum(table.min(1)), math.fsum(table.max(1))


def build_space(
    layer_names: Collection[str],
    formats: Sequence[Format],
    partition: Partition = "layer",
    weight_only: bool = False,
    separate_activations: bool = False,
    tied: Iterable[Sequence[str]] = (),
    tables: Iterable[str] = (),
    caches: Mapping[str, Sequence[Format]] | None = None,
    stores: RunsAs | None = None,
    channel_groups: Mapping[str, int] | None = None,
) -> SearchSpace:
    """Build the space in which each decision takes one of `formats` for weights and activations alike.

    A format of weights only (int4g128) goes with activations in float.

    Args:
        layer_names: names of the searched layers.
        formats: formats to choose from.
        partition: which layers share a decision.
        weight_only: keep activations in float.
        separate_activations: any pair of (weight, activation) formats is a choice, which keeps costs additive.
        tied: groups of layers that share a weight; they share a decision in every partition.
        tables: embeddings among the layers, which take the weight format of a choice alone.
        caches: caches of keys and values among the layers -> formats to choose from, see `quant.quant_cache`; each is a
            decision of its own. Where decisions have different numbers of choices, the last choice is repeated.
        stores: the formats that an engine stores a layer in, see `cost.engine.stores`. They become the choices; of a
            decision's layers, those that the engine stores all of them in.
        channel_groups: layers whose output channels form groups -> how many. Where all layers of a decision have as
            many, mixes of formats are choices, too; activations have one format, that of the first group unless
            `separate_activations`.

    Raises:
        UserError: without layers, if both options are given, and for a partition with an empty block, an unknown
            layer, or a layer in no block or in several.
    """
    if not layer_names:
        raise UserError("there are no layers to search")
    if weight_only and separate_activations:
        raise UserError("weight-only search leaves activations in float: it has no separate activation formats")
    caches = caches or {}
    blocks = merge(_blocks([name for name in layer_names if name not in caches], partition), tied)

    def choices(layers: Iterable[str]) -> tuple[Pair, ...]:
        groups = {(channel_groups or {}).get(layer, 1) for layer in layers}
        return format_pairs(formats, weight_only, separate_activations, groups.pop() if len(groups) == 1 else 1)

    decisions = [Decision(name, tuple(layers), choices(layers)) for name, layers in blocks.items()]
    decisions += [Decision(name, (name,), tuple((own, FLOAT) for own in formats)) for name, formats in caches.items()]
    if stores is not None:
        decisions = [_stored(decision, set(tables), stores) for decision in decisions]
    most = max(len(decision.choices) for decision in decisions)
    return SearchSpace(tuple(_padded(decision, most) for decision in decisions), dict.fromkeys(tables, "looked_up"))


def _stored(decision: Decision, tables: Collection[str], stores: RunsAs) -> Decision:
    """Return the decision with the choices in which an engine stores its layers; float if there are none.

    Args:
        decision: The decision.
        tables: Embeddings, which take the weight format of a choice alone.
        stores: The formats that the engine stores a layer in.
    """
    first = next((layer for layer in decision.layers if layer not in tables), decision.layers[0])
    found = dict.fromkeys(stored for pair in decision.choices if (stored := stores(first, pair)) is not None)

    def kept(layer: str, pair: Pair) -> bool:
        own = stores(layer, pair)
        return own is not None and own[0] == pair[0] and (layer in tables or own == pair)

    shared = tuple(pair for pair in found if all(kept(layer, pair) for layer in decision.layers))
    return replace(decision, choices=shared or (UNQUANTIZED,))


def _padded(decision: Decision, size: int) -> Decision:
    """Return the decision with `size` choices, the last of its own repeated."""
    missing = size - len(decision.choices)
    return replace(decision, choices=(*decision.choices, *decision.choices[-1:] * missing))


def uniform_cost(
    profiles: Sequence[LayerProfile], bits: float, cost_type: CostType, weight_only: bool = False
) -> float:
    """Return the cost of all layers at `bits` bits: the meaning of `--target_bits`.

    Profiles of `cost.file_scope` give the memory of all numbers of the model at `bits` bits, scales within them.

    Args:
        profiles: profiles of the layers.
        bits: bits of weights and activations; may lie between formats (4.5).
        cost_type: 'memory' (MiB) or 'compute' (GBOPs).
        weight_only: activations are in float.

    Raises:
        ValueError: for bits <= 0.
    """
    if not 0 < bits < math.inf:
        raise ValueError(f"target bits must be positive, got {bits}")
    if cost_type == "memory" and (shares := [profile.file for profile in profiles if profile.file is not None]):
        profiles = [*profiles, replace(profiles[0], params=sum(share.rest for share in shares))]
    return cost_of_bits(profiles, [(bits, FLOAT.bits if weight_only else bits)] * len(profiles), cost_type)


def merge(blocks: Mapping[str, Sequence[str]], groups: Iterable[Iterable[str]]) -> dict[str, list[str]]:
    """Return the finest partition that divides no block and no group.

    A block keeps its name; a merged one is named after its first block plus the number of those that joined it.
    """
    block_of = {layer: name for name, layers in blocks.items() for layer in layers}
    joined = {name: [name] for name in blocks}
    for group in groups:
        heads = list(dict.fromkeys(block_of[layer] for layer in group))
        for other in heads[1:]:
            joined[heads[0]] += joined.pop(other)
        for name in joined[heads[0]] if heads else ():
            block_of.update(dict.fromkeys(blocks[name], heads[0]))
    order = {name: place for place, name in enumerate(blocks)}
    result = {}
    for parts in sorted((sorted(parts, key=order.__getitem__) for parts in joined.values()), key=lambda p: order[p[0]]):
        title = parts[0] if len(parts) == 1 else f"{parts[0]}+{len(parts) - 1}"
        result[title] = [layer for name in parts for layer in blocks[name]]
    return result


def _blocks(layer_names: Sequence[str], partition: Partition) -> dict[str, tuple[str, ...]]:
    """Return decision name -> its layers, checked."""
    if partition == "layer":
        return {name: (name,) for name in layer_names}
    if partition == "single":
        return {"model": tuple(layer_names)}
    if not isinstance(partition, Mapping):
        raise UserError(f"partition {partition!r}: choose from layer, single or a mapping of blocks to layers")
    placed = [layer for layers in partition.values() for layer in layers]
    faults = {
        "blocks without a layer": [name for name, layers in partition.items() if not layers],
        "unknown layers": sorted(set(placed) - set(layer_names)),
        "layers in no block": sorted(set(layer_names) - set(placed)),
        "layers in several blocks": sorted({layer for layer in placed if placed.count(layer) > 1}),
    }
    if found := [f"{fault}: {', '.join(names)}" for fault, names in faults.items() if names]:
        raise UserError(f"block partition has {'; '.join(found)}")
    return {name: tuple(layers) for name, layers in partition.items()}
