"""Hard limits in addition to the target: --max_memory, --max_compute, and --max_latency with measured latencies."""

from __future__ import annotations

import csv
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from eval.config.run_config import RunConfig
from quant.errors import UserError
from quant.formats import Format, parse_format

if TYPE_CHECKING:  # wrong flags must not wait for torch
    from cost.profile import LayerProfile
    from policy.budget import Limit

COLUMNS = ("layer", "weight_format", "activation_format", "ms")
"""Columns of the file that --max_latency names."""
LIMIT_FLAGS = {"memory": "--max_memory", "compute": "--max_compute", "latency": "--latency_target"}
"""Name of a limit -> the flag that sets its value."""


def limits_of(
    config: RunConfig, profiles: Sequence[LayerProfile], whole_profiles: Sequence[LayerProfile] = ()
) -> list[Limit]:
    """Return the limits that the flags set.

    Args:
        config: Flags of the run.
        profiles: Profiles of the layers.
        whole_profiles: If a search of architecture has made layers smaller: their profiles before. The table of
            latencies is of these; a smaller layer is charged its share of the multiply-accumulates.

    Raises:
        UserError: The latency table is not readable or lacks an entry.
    """
    from cost.cost import COSTS
    from cost.profile import macs_share
    from cost.units import UNITS
    from policy.budget import Limit

    limits = []
    by_name = {profile.name: profile for profile in profiles}
    for name, value in (("memory", config.max_memory), ("compute", config.max_compute)):
        if value is not None:
            layer_cost = partial(_layer_cost, COSTS[name], by_name)  # type: ignore[index]
            limits.append(Limit(name, UNITS[name], value, layer_cost))
    if config.max_latency is not None:
        assert config.latency_target is not None
        measured = read_latencies(Path(config.max_latency))
        whole = {profile.name: profile for profile in whole_profiles}

        def latency(layer: str, pair: tuple[Format, Format]) -> float:
            if (layer, *pair) not in measured:
                formats = f"{pair[0]}/{pair[1]}"
                how = "python -m eval.latency measures it in a run over this search space"
                raise UserError(f"--max_latency {config.max_latency}: no line for {layer} in {formats}; {how}")
            share = macs_share(by_name[layer], whole[layer]) if layer in whole else 1.0
            return measured[layer, *pair] * share

        limits.append(Limit("latency", "ms", config.latency_target, latency))
    return limits


def _layer_cost(
    cost: Callable[..., float], profiles: Mapping[str, LayerProfile], layer: str, formats: tuple[Format, Format]
) -> float:
    return cost([profiles[layer]], {layer: formats})


def read_latencies(path: Path) -> dict[tuple[str, Format, Format], float]:
    """Read a CSV file with COLUMNS. Missing entries are not interpolated.

    Returns:
        (layer, weight format, activation format) -> latency in milliseconds.

    Raises:
        UserError: The file is not readable, or a line is invalid; the message names the file and the line.
    """
    flag = f"--max_latency {path}"
    try:
        with path.open(newline="", encoding="utf-8") as file:
            reader = csv.DictReader(file)
            rows = list(reader)
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{flag}: not readable as CSV: {error}") from None
    if missing := [name for name in COLUMNS if name not in (reader.fieldnames or ())]:
        raise UserError(f"{flag}: column {missing[0]} is missing; columns: {', '.join(COLUMNS)}")
    latencies: dict[tuple[str, Format, Format], float] = {}
    for number, row in enumerate(rows, start=2):
        try:
            key = row["layer"], parse_format(row["weight_format"] or ""), parse_format(row["activation_format"] or "")
            value = float(row["ms"])
        except (TypeError, ValueError) as error:
            raise UserError(f"{flag}: line {number}: {error}") from None
        if not 0 <= value < float("inf"):
            raise UserError(f"{flag}: line {number}: ms must be a finite number >= 0, got {row['ms']}")
        if key in latencies:
            raise UserError(f"{flag}: line {number}: {row['layer']} in {key[1]}/{key[2]} stands there twice")
        latencies[key] = value
    return latencies
