"""Facts about single layers of a run: format, share of the cost, measured sensitivity."""

from __future__ import annotations

import csv
import math
from collections.abc import Mapping
from itertools import groupby
from pathlib import Path
from types import MappingProxyType
from typing import TypeAlias

from eval.report.labels import short_names
from eval.report.records import DamagedFile, Run
from eval.run.outcome import counted_part, scope_of
from eval.run.sensitivities import FILE
from quant.formats import parse_format

MAX_STRETCHES = 14
"""stretches of layers in one format that a hover text lists"""
Sensitivities: TypeAlias = Mapping[str, Mapping[str, tuple[float, float | None]]]
"""column such as 'measured int4' -> decision -> (value, its error where one was estimated)"""
NOT_MEASURED: Sensitivities = MappingProxyType({})


def read_sensitivities(folder: Path) -> Sensitivities:
    """Read the sensitivities that a search, or `python -m eval.sensitivity`, wrote into the folder of a run.

    Returns:
        The measurements; empty where the folder holds none.

    Raises:
        DamagedFile: The file is not such a table.
    """
    path = folder / FILE
    try:
        with path.open(newline="") as file:
            rows = list(csv.DictReader(file, strict=True))
        titles = [
            t for t in (rows[0] if rows else ()) if t and t.split() and t != "decision" and not t.endswith(" error")
        ]
        return {
            title: {row["decision"]: (_finite(row[title]), _error(row.get(f"{title} error"))) for row in rows}
            for title in titles
        }
    except FileNotFoundError:
        return {}
    except OSError as error:
        raise DamagedFile(path, f"not readable: {error.strerror}") from None
    except (csv.Error, UnicodeDecodeError, KeyError, TypeError, ValueError) as error:
        raise DamagedFile(path, f"damaged: {error}") from None


def _finite(text: str) -> float:
    if not math.isfinite(value := float(text)):
        raise ValueError(f"{text} is not finite")
    return value


def _error(text: str | None) -> float | None:
    return _finite(text) if text else None


def cost_shares(run: Run) -> dict[str, float]:
    """Share of each layer in the run's cost: weights x bits for memory, MACs x both bits for compute.

    Layers that the record does not profile are left out; so are all of them if the total is 0.
    """
    costs = {}
    for layer in run.record["layers"]:
        if pair := run.record["assignment"].get(layer["name"]):
            weight, activation = (parse_format(name).bits for name in pair)
            in_memory = run.record["cost_type"] == "memory"
            costs[layer["name"]] = layer["params"] * weight if in_memory else layer["macs"] * weight * activation
    total = sum(costs.values())
    if counted_part(run.record["cost_type"], scope_of(run.record)) == "of the whole file":
        total = run.record["cost"] * 8 * 2**20  # with scales and what no layer holds
    return {name: cost / total for name, cost in costs.items()} if total else {}


def layer_texts(run: Run, sensitivities: Sensitivities) -> dict[str, str]:
    """Hover text of each layer: formats, share of the cost, size and sensitivities, one fact per line."""
    shares = cost_shares(run)
    sizes = {layer["name"]: layer for layer in run.record["layers"]}
    decision_of = {layer: name for name, own in (run.record.get("decisions") or {}).items() for layer in own}
    texts = {}
    for name, (weight, activation) in run.record["assignment"].items():
        lines = [name, run.label, f"weights {weight}, activations {activation}"]
        if name in shares:
            lines.append(f"{shares[name]:.1%} of the {run.record['cost_type']} cost")
        if name in sizes:
            lines.append(f"{sizes[name]['params']:,} weights, {sizes[name]['macs']:,} MACs")
        decision = decision_of.get(name, name)
        for title, values in sensitivities.items():
            if decision in values:
                value, error = values[decision]
                lines.append(f"sensitivity, {title}: {value:.3g}" + ("" if error is None else f" ± {error:.1g}"))
        texts[name] = "\n".join(lines)
    return texts


def formats_by_layer(run: Run) -> list[str]:
    """Formats from input to output, one line for each stretch of layers in the same format; long lists are cut."""
    assignment = run.record["assignment"]
    names = short_names(list(assignment))
    lines = []
    for pair, stretch in groupby(zip(names, assignment.values(), strict=True), key=lambda item: item[1]):
        own = [name for name, _ in stretch]
        layers = own[0] if len(own) == 1 else f"{own[0]} to {own[-1]} ({len(own)})"
        lines.append(f"{layers}: {' / '.join(dict.fromkeys(pair))}")
    if len(lines) > MAX_STRETCHES:
        lines = [*lines[: MAX_STRETCHES - 1], f"… and {len(lines) - MAX_STRETCHES + 1} more stretches"]
    return [*lines, *architecture_by_part(run)]


def architecture_by_part(run: Run) -> list[str]:
    """Chosen widths, kernels and depths, one line for each; long lists are cut. Empty without --architecture_space."""
    chosen: dict[str, str] = run.record.get("architecture") or {}
    lines = [f"{name}: {choice}" for name, choice in chosen.items()]
    if len(lines) > MAX_STRETCHES:
        lines = [*lines[: MAX_STRETCHES - 1], f"… and {len(lines) - MAX_STRETCHES + 1} more"]
    return lines
