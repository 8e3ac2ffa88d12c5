"""What a run's record says beside its metrics: settings, layers, costs, versions; and the lines that tell of it."""

from __future__ import annotations

import json
import platform
import shutil
import subprocess
from collections.abc import Mapping
from dataclasses import replace
from importlib.metadata import Distribution, distributions, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from eval.config.run_config import RunConfig
from eval.run.limits import limits_of
from eval.run.outcome import choice_line, cost_line, export_lines
from eval.run.plan import Plan, budget, search_space
from eval.run.schema import SCHEMA_VERSION, loss_rise
from eval.run.trainer import teacher_share
from quant.formats import Format

RISEN = "the loss ended far above where it started, so training harmed the model (lower --learning_rate):"
if TYPE_CHECKING:  # wrong flags must not wait for torch
    from quant.quant_module import Reach

PACKAGES = ("torch", "transformers", "datasets", "numpy")
DISTRIBUTION = "mpq-search"
ROOT = Path(__file__).resolve().parents[2]


def describe(plan: Plan) -> dict[str, Any]:
    """The part of the record that is known before training."""
    from quant.analysis.float_share import float_share

    config = plan.config
    return {
        "schema_version": SCHEMA_VERSION,
        "status": "finished",
        "reason": None,
        "task": config.task_name,
        "model": config.model_name,
        "method": config.method,
        "seed": config.seed,
        "run_id": config.run_name,
        "cost_type": config.cost_type,
        "cost_target": budget(plan),
        "metric": plan.data.metric,
        "classes": list(plan.data.label_names),
        "search_space": [f.name for f in config.search_formats] if config.chooses else None,
        "decisions": {d.name: list(d.layers) for d in search_space(plan).decisions} if config.chooses else None,
        "distill": teacher_share(plan),
        "float_share": float_share(plan.bundle.model, plan.layers).share,
        "layers": [{"name": p.name, "macs": p.macs, "params": p.params} for p in plan.profiles],
        "versions": versions(),
        "commit": commit(),
        "device": device_name(config),
        "notes": [*plan.data.notes, *plan.bundle.notes, *plan.prepared.notes, *layer_notes(plan)],
    }


def costs_of(
    plan: Plan, assignment: dict[str, tuple[Format, Format]], reach: Mapping[str, Reach] | None = None
) -> dict[str, Any]:
    """Cost of the assignment, and the range that assignments of the search space have.

    reach: of the layers that calibration did not reach.
    """
    from cost.cost import COSTS, UNITS, overhead_memory, unsearched_memory
    from cost.profile import tied_in
    from policy.space import build_space

    config = plan.config
    cost_type: Any = config.cost_type
    costs = {name: cost(plan.profiles, assignment) for name, cost in COSTS.items()}
    overhead = overhead_memory(plan.profiles, assignment, config.per_channel)
    unsearched = unsearched_memory(plan.bundle.model, plan.layers)
    activations = config.weight_only_search, config.separate_activations
    space = build_space(plan.layers, config.search_formats, "layer", *activations, tied_in(plan.profiles))
    space = replace(space, reach=reach or {})
    return {
        "cost": costs[cost_type],
        "cost_unit": UNITS[cost_type],
        "cost_range": list(space.cost_range(plan.profiles, cost_type)),
        "limits": [
            {"name": limit.name, "unit": limit.unit, "limit": limit.value, "value": limit.total(assignment)}
            for limit in (limits_of(config, plan.profiles) if config.chooses else ())
        ],
        "costs": {
            **costs,
            "overhead": overhead,
            "unsearched": unsearched,
            "total": costs["memory"] + overhead + unsearched,
        },
    }


def layer_notes(plan: Plan) -> list[str]:
    """What a reader of the cost must know: matrices that it leaves out, layers that were never called."""
    from quant.analysis.float_share import float_share

    outside = float_share(plan.bundle.model, plan.layers)
    notes = [f"outside the cost: {outside}"] if outside.left else []
    if idle := [p.name for p in plan.profiles if not p.calls]:
        notes.append(f"{len(idle)} layers are never called and cost no compute: {', '.join(idle[:3])}")
    return notes


def commit() -> str | None:
    """The revision of this code: of its checkout, or the one that it was installed from; None where neither tells."""
    if (ROOT / ".git").exists() and shutil.which("git"):
        asked = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=False)
        return asked.stdout.strip() or None
    ours = installed()
    source = None if ours is None else ours.read_text("direct_url.json")
    found = json.loads(source or "{}").get("vcs_info", {}).get("commit_id")
    return None if found is None else str(found)


def installed() -> Distribution | None:
    """This code as an installed distribution; None in a checkout, also where another copy is installed besides."""
    found = next(iter(distributions(name=DISTRIBUTION)), None)
    return found if found is not None and Path(str(found.locate_file(""))).resolve() == ROOT else None


def versions() -> dict[str, str]:
    """Of Python, of what decides results, and of this code where it is installed."""
    ours = installed()
    told = {"python": platform.python_version(), **{name: version(name) for name in PACKAGES}}
    return told | ({} if ours is None else {DISTRIBUTION: ours.version})


def device_name(config: RunConfig) -> str:
    """'cuda: its name', or 'cpu: threads'."""
    import torch

    if config.device != "cpu" and torch.cuda.is_available():
        return f"cuda: {torch.cuda.get_device_name()}"
    return f"cpu: {torch.get_num_threads()} threads"


def outside_cost(record: Mapping[str, Any]) -> str:
    """What a cost leaves out, to be put behind it; nothing where that is nothing, or a record is too old to know."""
    share = record.get("float_share") or 0.0
    return f"; outside it, in float: {100 * share:.3g} % of the weights in matrices" if share else ""


def outcome(record: Mapping[str, Any], folder: Path | None = None) -> list[str]:
    """What a finished run has reached, in lines: metrics, choice, cost, and whether what was asked for was kept.

    With its `folder` also where it can run, and how to export it.
    """
    lines = [
        f"{split}: " + "  ".join(f"{name} {value:.5g}" for name, value in metrics.items())
        for split, metrics in record["metrics"].items()
    ]
    contest = record.get("contest") or {}
    lines += [choice_line(record) or "", f"{cost_line(record)}{outside_cost(record)}"]
    for limit in record["limits"]:
        lines.append(f"{limit['name']}: {limit['value']:.6g} {limit['unit']} (limit {limit['limit']:.6g})")
    if "max_drop" in contest:
        kept = "within" if contest["within_drop"] else "NOT within"
        quality, of_float, drop = contest["held_out_quality"], contest["float_quality"], contest["max_drop"]
        lines.append(f"held-out quality: {quality:.5f} when chosen, float {of_float:.5f}: {kept} {drop:g}")
    if risen := loss_rise(record):
        lines.append(f"{RISEN} {risen}")
    if folder is not None:
        lines.append(export_lines(record, folder) or "")
    return [line for line in lines if line]
