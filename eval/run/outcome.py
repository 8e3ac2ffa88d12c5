"""Summary lines of a run, from its record: the selected assignment, its cost, and the exports that support it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from eval.commands import command
from quant.engines.table import ENGINES

FLOAT_BITS = 16
"""Bits that the cost charges for a weight in float."""
COUNTED = {
    "searched": f"cost: of the searched layers alone, a weight in float at {FLOAT_BITS} bits",
    "file": f"cost under --cost_scope file: memory of the whole file, a number in float at {FLOAT_BITS} bits",
}
"""`cost_scope` of a record -> what its cost counts."""
FILE = f"file: the whole model, with scales and embeddings; what stays in float counts {FLOAT_BITS} bits a number"
"""Caption of tables and figures."""
MOST_OBSTACLES = 3
"""Lines at the end of a run about what stands in the way of engines; the record has the rest."""
CRITERIA = {"divergence": "distance from the float model's answers", "loss": "loss"}
"""`contest.judged_by` of a record -> name of the degradation that was compared on held-out data."""


def scope_of(record: Mapping[str, Any]) -> str:
    """Return the `cost_scope` of a record; older ones count the searched layers."""
    return str(record.get("cost_scope", "searched"))


def captions(scopes: Iterable[str]) -> list[str]:
    """Return what the costs of a table count, for the scopes of its runs, and what its file sizes count."""
    given = set(scopes)
    return [*(COUNTED[scope] for scope in COUNTED if scope in given), FILE]


def counted_part(cost_type: str, scope: str) -> str:
    """Return the part of the model that a cost is of, for titles: 'of the searched layers' or 'of the whole file'."""
    return "of the whole file" if (cost_type, scope) == ("memory", "file") else "of the searched layers"


def cost_title(record: Mapping[str, Any]) -> str:
    """Return the title of an axis of a run's costs."""
    part = counted_part(record["cost_type"], scope_of(record))
    return f"{record['cost_type']} cost {part} [{record['cost_unit']}]"


def file_sizes(record: Mapping[str, Any]) -> tuple[float, float] | None:
    """Return the size in MiB of the whole model as quantized, and in float with 16 bits per weight.

    The whole model includes scales and layers that were not searched. None if the record is too old to hold the sizes.
    """
    costs = record["costs"]
    if "total" not in costs or "unsearched" not in costs:
        return None
    searched = sum(layer["params"] for layer in record["layers"] if "kind" not in layer) * FLOAT_BITS / 8 / 2**20
    return costs["total"], searched + costs["unsearched"]


def choice_line(record: Mapping[str, Any]) -> str | None:
    """Return a line about the selected assignment and its lead over others; None if the run searched nothing."""
    if record["search_space"] is None:
        return None
    contest = record.get("contest")
    if record["method"] != "search":
        return f"chosen: by {record['method']}, before training"
    if not contest:
        return "chosen: the policy's most probable assignment within the budget"
    degradation, winner = contest["held_out_harm"], contest["winner"]
    others = {name: value for name, value in contest["candidates"].items() if name != winner}
    line = f"chosen: {winner}, of {contest['compared']} assignments compared; "
    line += f"held-out {CRITERIA[contest['judged_by']]} {degradation:.4g}"
    if not others:
        return line
    name, nearest = min(others.items(), key=lambda other: other[1])
    if nearest >= degradation:
        return f"{line}, {nearest - degradation:.2g} less than {name}'s"
    return (
        f"{line}, {degradation - nearest:.2g} more than {name}'s, a lead that did not last on other examples or in cost"
    )


def cost_line(record: Mapping[str, Any]) -> str:
    """Return a line with the cost and its target, and the size of the whole file relative to float."""
    contest = record.get("contest") or {}
    # With --max_drop, the recorded target is a result of the search, not a request of the user.
    no_target = record["cost_target"] is None or "max_drop" in contest
    target = "" if no_target else f" (target {record['cost_target']:.6g})"
    whole = counted_part(record["cost_type"], scope_of(record)) == "of the whole file"
    charged = any(layer.get("kind") == "kv_cache" for layer in record["layers"])
    scope = " of the whole file" * whole + (" with the cache" if charged and record["cost_type"] == "memory" else "")
    own = f"{record['cost']:.6g} {record['cost_unit']}{scope}{target}"
    line = f"cost: {own} in {len(record['layers'])} layers"
    sizes = file_sizes(record)
    if sizes and whole and not charged:
        return f"{line}; {record['cost'] / sizes[1]:.0%} of float's {sizes[1]:.4g} MiB"
    if sizes:
        line += f"; the whole file {sizes[0]:.4g} MiB, {sizes[0] / sizes[1]:.0%} of float's {sizes[1]:.4g}"
        line += f" (numbers in float at {FLOAT_BITS} bits)"
    return line


def cache_lines(record: Mapping[str, Any]) -> list[str]:
    """Return a line about the cache of keys and values; none if it is in float."""
    if "kv_cache" not in record:
        return []
    cache, per_token = record["kv_cache"], record["kv_cache_bytes_per_token"]
    formats = Counter(cache["formats"].values())
    told = ", ".join(name if len(formats) == 1 else f"{count} {name}" for name, count in formats.most_common())
    share = cache["memory"] / cache["float_memory"]
    return [
        f"cache of keys and values: {told}; {per_token:.6g} bytes a token, {cache['memory']:.4g} MiB for "
        f"{cache['tokens']} tokens, {share:.0%} of float's"
    ]


def architecture_lines(record: Mapping[str, Any]) -> list[str]:
    """Return a line about the chosen architecture of a record; none for a run that searched formats alone."""
    chosen = record.get("architecture")
    if not chosen:
        return []
    parts = [f"{name.rsplit(' ', 1)[0]} {choice}" for name, choice in chosen.items()]
    return [f"architecture: {', '.join(parts)}"]


def export_lines(record: Mapping[str, Any], folder: Path) -> str | None:
    """Return lines about where a run's result runs, what stands in the way, and the command; None for a float run."""
    reach = record.get("exports")
    if not reach:
        return None
    complete = [name for name, why in reach.items() if why is None]
    engines = record.get("engines") or {}
    running = [name for name, found in engines.items() if found["as_chosen"]]
    lines = [
        f"runs as chosen in: {', '.join(running) or 'no engine'}; files that hold it: {', '.join(complete) or 'none'}"
    ]
    lines += _obstacles(engines if record.get("engine") is None else {record["engine"]: engines[record["engine"]]})
    best = "onnx" if "onnx" in complete else next(iter(complete), None)
    if len({ENGINES[name].export for name in running}) > 1:
        best = "auto"
    if record.get("engine") in running:
        lines.append(f"export: {command('mpq-export', folder, '--engine', record['engine'])}")
    elif best is not None:
        lines.append(f"export: {command('mpq-export', folder, '--format', best)}")
    return "\n".join(lines)


def _obstacles(engines: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Return a line for each reason why engines do not run a result as chosen, with the engines that it is of."""
    by_reason: dict[str, list[str]] = {}
    for name, found in engines.items():
        if not found["as_chosen"]:
            by_reason.setdefault(found["obstacle"], []).append(name)
    lines = [f"in the way of {', '.join(names)}: {reason}" for reason, names in by_reason.items()]
    more = [name for names in [*by_reason.values()][MOST_OBSTACLES:] for name in names]
    return lines[:MOST_OBSTACLES] + ([f"for {', '.join(more)}, see engines in result.json"] if more else [])
