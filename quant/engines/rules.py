"""Rules about engines: which pairs of formats one keeps as they are, and in which it keeps the others."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Literal, TypeAlias, get_args

from quant.formats import (
    FLOAT,
    GROUP_SCALE_BITS,
    FloatFormat,
    Format,
    GroupFormat,
    IntFormat,
    MixedFormat,
    parse_format,
    values_per_scale,
)

Kind: TypeAlias = Literal["linear", "conv1d", "conv", "depthwise", "embedding", "experts", "cache"]
"""What a layer is to an engine. conv1d: GPT-2's linear layer, weight (in, out); cache: keys and values."""
KINDS: tuple[Kind, ...] = get_args(Kind)
COMPUTING: tuple[Kind, ...] = tuple(kind for kind in KINDS if kind not in ("embedding", "cache"))
"""Kinds that multiply an input, which has a format as well."""
Pair: TypeAlias = tuple[Format, Format]
"""(weight format, input format)."""
UNQUANTIZED: Pair = (FLOAT, FLOAT)
ANY_GROUP = re.compile(r"(u?)int(\d)gN")
"""Names in the table that stand for groups of any size: int4gN."""


@dataclass(frozen=True)
class Rule:
    """Pairs of formats that an engine keeps as they are: each of `weights` with each of `inputs`."""

    kinds: tuple[Kind, ...]
    weights: tuple[str, ...]
    """Names of formats; int4gN stands for groups of any size."""
    inputs: tuple[str, ...]
    """Names of formats; those of embeddings and caches are not looked at."""
    native: bool
    """Whether the kernels read the stored types. Otherwise the values become float before they are multiplied."""
    source: str
    """Where this is documented, implemented, or what it was tried with."""
    per_token: bool = False
    """Whether integer inputs have a range for each token, found at run time; otherwise fixed ranges."""

    def covers(self, kind: Kind, weight: Format, activation: Format, per_token: bool | None) -> bool:
        """Whether the rule is about these formats.

        Args:
            kind: Kind of the layer.
            weight: Its weight format.
            activation: Its input format.
            per_token: Whether ranges of inputs are found for each token; None: as the rule has it.
        """
        if kind not in self.kinds or not any(_names(name, weight) for name in self.weights):
            return False
        if kind in ("embedding", "cache") or activation == FLOAT:
            return kind in ("embedding", "cache") or FLOAT.name in self.inputs
        return activation.name in self.inputs and per_token in (None, self.per_token)

    def pairs(self, like: Format) -> Iterator[Pair]:
        """Yield the pairs of the rule; groups of any size take the size of `like`, and are left out if it has none."""
        weights = [found for name in self.weights if (found := _format(name, like)) is not None]
        yield from ((weight, parse_format(name)) for weight in weights for name in self.inputs)


@dataclass(frozen=True)
class Engine:
    """An inference engine, as the export that is made for it uses it."""

    name: str
    """Value of --engine."""
    title: str
    version: str
    """Version that the rules were checked with, or read in."""
    export: str
    """Export format that the engine reads, see `eval.export.formats`."""
    rules: tuple[Rule, ...]
    default_space: str
    """Search space of --engine without --search_space."""
    fuses: bool = False
    """Whether it runs layers that read the same input as one, in one format."""
    symmetric_weights: bool = False
    """Whether integer weights must have no zero point."""
    symmetric_inputs: bool | None = None
    """Whether integer inputs must have no zero point (True), must have one (False), or may have either (None)."""
    takes_factors: bool = False
    """Whether its file has a place for the factors of --smooth_quant and --gamma_migration."""
    whole_groups: bool = True
    """Whether groups must divide the rows of a weight."""
    mixes: bool = False
    """Whether its file can hold output channels of a layer in different formats; their values run as the widest."""
    group_point_bits: int | None = None
    """Bits of the zero point of a group in the file; None: as many as a code has."""

    def rule(self, kind: Kind, pair: Pair, per_token: bool | None = None) -> Rule | None:
        """Return the rule by which a layer of this kind runs in these formats as they are; None if it does not."""
        return next((rule for rule in self.rules if rule.covers(kind, *pair, per_token)), None)

    def keeps(self, kind: Kind, pair: Pair, per_token: bool | None = None, row: int | None = None) -> bool:
        """Whether a layer is stored and run in these formats as they are.

        Args:
            kind: Kind of the layer.
            pair: Its (weight format, input format).
            per_token: Whether ranges of inputs are found for each token; None: as the engine has it.
            row: Values in a row of its weight, along which groups run; None: a multiple of every group.
        """
        if pair == UNQUANTIZED:
            return True
        if isinstance(pair[0], MixedFormat):
            return self.mixes and all(self.keeps(kind, (part, pair[1]), per_token, row) for part in pair[0].parts)
        return self._fits(pair[0], row) and self.rule(kind, pair, per_token) is not None

    def stored_as(self, kind: Kind, pair: Pair, per_token: bool | None = None, row: int | None = None) -> Pair | None:
        """Return the formats that a layer is stored and run in, if `pair` is asked for.

        They hold every value of the pair's formats: int3 is stored as int4. Of several, those with the fewest bits for
        weights, then for inputs. Arguments as for `keeps`.

        Returns:
            The formats; None if the engine has none that hold the values.
        """
        looked_up = kind in ("embedding", "cache")
        pair = (pair[0], FLOAT) if looked_up else pair
        if self.keeps(kind, pair, per_token, row):
            return pair
        found = {
            (weight, FLOAT if looked_up else activation)
            for rule in self.rules
            if kind in rule.kinds
            for weight, activation in rule.pairs(pair[0])
            if weight != FLOAT
            and holds(weight, pair[0])
            and (self.mixes or not isinstance(pair[0], MixedFormat))
            and (looked_up or holds(activation, pair[1]))
            and self.keeps(kind, (weight, activation), per_token, row)
        }
        return min(found, key=lambda stored: (self.weight_bits(stored[0]), stored[1].bits, str(stored)), default=None)

    def stored(self, pairs: Iterable[Pair], kinds: Sequence[Kind] = KINDS, per_token: bool | None = None) -> list[Pair]:
        """Return the different formats that layers of some kinds are stored in, if `pairs` are asked for."""
        found = (self.stored_as(kind, pair, per_token) for pair in pairs for kind in kinds)
        return list(dict.fromkeys(pair for pair in found if pair is not None))

    def weight_bits(self, weight: Format) -> float:
        """Return the bits that a weight takes in the engine's file, with its share of a group's scale."""
        if not isinstance(weight, GroupFormat):
            return weight.bits
        point = weight.width if self.group_point_bits is None else self.group_point_bits
        return weight.width + (GROUP_SCALE_BITS + weight.zero_point * point) / weight.size

    def choices(self, kinds: Sequence[Kind] = KINDS) -> str:
        """Return what the engine runs, for errors: 'int4, int8 (inputs int8, float); e4m3 (inputs e4m3)'."""
        rules = [rule for rule in self.rules if set(kinds) & set(rule.kinds)]
        by_inputs: dict[tuple[str, ...], dict[str, None]] = {}
        for rule in rules:
            inputs = tuple(
                f"{name} per token" if rule.per_token and name != FLOAT.name else name for name in rule.inputs
            )
            by_inputs.setdefault(inputs, {}).update(dict.fromkeys(name for name in rule.weights if name != FLOAT.name))
        return "; ".join(f"{', '.join(weights)} (inputs {', '.join(inputs)})" for inputs, weights in by_inputs.items())

    def _fits(self, weight: Format, row: int | None) -> bool:
        size = values_per_scale(weight)
        return size is None or row is None or not self.whole_groups or row % size == 0


def holds(wide: Format, narrow: Format) -> bool:
    """Whether a format has every value of another one.

    A row with one scale is a row of groups with equal scales; so are groups that smaller groups divide. A mix has the
    values of all its formats.
    """
    if wide in (narrow, FLOAT):
        return True
    if isinstance(narrow, MixedFormat):
        return all(holds(wide, part) for part in narrow.parts)
    if isinstance(wide, GroupFormat):
        if isinstance(narrow, IntFormat):
            return narrow.width <= wide.width
        return (
            isinstance(narrow, GroupFormat)
            and narrow.width <= wide.width
            and narrow.zero_point <= wide.zero_point
            and narrow.size % wide.size == 0
        )
    if isinstance(wide, IntFormat):
        return isinstance(narrow, IntFormat) and narrow.width <= wide.width
    if isinstance(wide, FloatFormat):
        return (
            isinstance(narrow, FloatFormat)
            and narrow.qmax <= wide.qmax
            and narrow.mantissa <= wide.mantissa
            and narrow.smallest_subnormal >= wide.smallest_subnormal
        )
    return False


def _names(name: str, format: Format) -> bool:
    """Whether a name of the table stands for a format."""
    if (match := ANY_GROUP.fullmatch(name)) is None:
        return format.name == name
    return isinstance(format, GroupFormat) and format.name.startswith(f"{match[1]}int{match[2]}g")


@cache
def _format(name: str, like: Format) -> Format | None:
    if (match := ANY_GROUP.fullmatch(name)) is None:
        return parse_format(name)
    return GroupFormat(int(match[2]), like.size, bool(match[1])) if isinstance(like, GroupFormat) else None
