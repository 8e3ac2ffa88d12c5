"""The end of a run in a few lines: what was chosen and why, what it costs, where it can run. From its record alone."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from eval.commands import command

FLOAT_BITS = 16
"""what a weight in float is charged"""
COUNTED = f"cost: of the searched layers alone, a weight in float at {FLOAT_BITS} bits"
FILE = f"file: the whole model, with scales and embeddings; what stays in float counts {FLOAT_BITS} bits a number"
"""what tables and pictures say of their numbers"""
HARMS = {"divergence": "distance from the float model's answers", "loss": "loss"}
"""`contest.judged_by` -> what was compared, on held-out data"""


def file_sizes(record: Mapping[str, Any]) -> tuple[float, float] | None:
    """MiB of the whole model, searched layers, scales and all else: as it is now, and in float at 16 bits a weight.

    None for a record that does not know.
    """
    costs = record["costs"]
    if "total" not in costs or "unsearched" not in costs:
        return None
    searched = sum(layer["params"] for layer in record["layers"]) * FLOAT_BITS / 8 / 2**20
    return costs["total"], searched + costs["unsearched"]


def choice_line(record: Mapping[str, Any]) -> str | None:
    """Who won, among how many, and by how much; None where nothing was chosen."""
    if record["search_space"] is None:
        return None
    contest = record.get("contest")
    if record["method"] != "search":
        return f"chosen: by {record['method']}, before training"
    if not contest:
        return "chosen: the policy's most probable assignment within the budget"
    harm, winner = contest["held_out_harm"], contest["winner"]
    others = {name: value for name, value in contest["candidates"].items() if name != winner}
    line = f"chosen: {winner}, of {contest['compared']} assignments compared; "
    line += f"held-out {HARMS[contest['judged_by']]} {harm:.4g}"
    if not others:
        return line
    name, nearest = min(others.items(), key=lambda other: other[1])
    if nearest >= harm:
        return f"{line}, {nearest - harm:.2g} less than {name}'s"
    return f"{line}, {harm - nearest:.2g} more than {name}'s, a lead that did not last on other examples or in cost"


def cost_line(record: Mapping[str, Any]) -> str:
    """The cost against the budget, and the whole file against float's."""
    contest = record.get("contest") or {}
    found = record["cost_target"] is None or "max_drop" in contest  # then the target is what was found, not asked for
    target = "" if found else f" (target {record['cost_target']:.6g})"
    line = f"cost: {record['cost']:.6g} {record['cost_unit']}{target} in {len(record['layers'])} layers"
    if sizes := file_sizes(record):
        line += f"; the whole file {sizes[0]:.4g} MiB, {sizes[0] / sizes[1]:.0%} of float's {sizes[1]:.4g}"
        line += f" (numbers in float at {FLOAT_BITS} bits)"
    return line


def export_lines(record: Mapping[str, Any], folder: Path) -> str | None:
    """Which exports hold the formats as chosen, which do not, and the command; None where nothing is quantized."""
    reach = record.get("exports")
    if not reach:
        return None
    whole = [name for name, why in reach.items() if why is None]
    rest = [f"{name}: {why}" for name, why in reach.items() if why is not None]
    best = "onnx" if "onnx" in whole else next(iter(whole), None)
    line = f"runs as chosen in: {', '.join(whole) or 'no export'}"
    line += f"; in part or not: {'; '.join(rest)}" if rest else ""
    return line if best is None else f"{line}\nexport: {command('mpq-export', folder, '--format', best)}"
