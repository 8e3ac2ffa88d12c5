"""Parts of the record of a run: settings, layers, costs and versions; and a text summary of a record."""

from __future__ import annotations

import json
import platform
import shutil
import subprocess
from collections.abc import Mapping
from dataclasses import asdict, replace
from importlib.metadata import Distribution, distributions, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from eval.config.run_config import RunConfig
from eval.run.architecture import described
from eval.run.limits import limits_of
from eval.run.outcome import (
    architecture_lines,
    cache_lines,
    choice_line,
    cost_line,
    counted_part,
    export_lines,
    scope_of,
)
from eval.run.plan import Plan, budget, inputs_of, search_space, space_of
from eval.run.schema import BUDGETS, SCHEMA_VERSION, loss_rise
from eval.run.stopwatch import stopwatch_line
from eval.run.trainer import teacher_share
from quant.formats import FLOAT, Format

LOSS_ROSE = "the loss ended far above where it started, so training harmed the model (lower --learning_rate):"
if TYPE_CHECKING:  # importing torch takes seconds; flags are checked without it
    from cost.profile import LayerProfile
    from quant.quant_module import Reach

PACKAGES = ("torch", "transformers", "datasets", "numpy")
DISTRIBUTION = "mpq-search"
ROOT = Path(__file__).resolve().parents[2]


def describe(plan: Plan) -> dict[str, Any]:
    """Return the part of the record that is known before training."""
    from eval.modeling.inputs import to_json
    from quant.analysis.float_share import float_share

    config = plan.config
    return {
        "schema_version": SCHEMA_VERSION,
        "status": "finished",
        "reason": None,
        "task": config.task_name,
        "model": config.model_name,
        "method": config.method,
        **({} if config.engine is None else {"engine": config.engine}),
        "seed": config.seed,
        "run_id": config.run_name,
        "cost_type": config.cost_type,
        "cost_scope": config.cost_scope,
        "cost_target": budget(plan),
        BUDGETS: list(config.target_list) if len(config.target_list) > 1 else None,
        "metric": plan.data.metric,
        "classes": list(plan.data.label_names),
        "inputs": to_json(inputs_of(plan)),
        "search_space": [f.name for f in config.search_formats] if config.chooses else None,
        "decisions": {d.name: list(d.layers) for d in search_space(plan).decisions} if config.chooses else None,
        **({} if config.channel_groups == 1 else {"channel_groups": plan.channel_groups}),
        **({} if plan.architecture is None else {"architecture_space": described(plan.architecture)}),
        "distill": teacher_share(plan),
        "float_share": float_share(plan.bundle.model, plan.layers).share,
        "layers": [layer_entry(profile) for profile in plan.profiles],
        "versions": versions(),
        "commit": commit(),
        "device": device_name(config),
        "notes": [*plan.data.notes, *plan.bundle.notes, *plan.prepared.notes, *layer_notes(plan)],
    }


def searched_architecture(whole: Plan, small: Plan, architecture: Mapping[str, str]) -> dict[str, Any]:
    """Return the entries of the record on a search of architecture: its choices, its range of costs, what is left.

    Args:
        whole: Plan of the elastic model.
        small: Plan of the chosen one.
        architecture: Decision -> its choice.
    """
    joint = space_of(whole, "layer").cost_range(whole.profiles, whole.config.cost_type)  # type: ignore[arg-type]
    return {
        "architecture": architecture,
        "cost_range": list(joint),
        "layers": [layer_entry(profile) for profile in small.profiles],
        "whole_layers": [layer_entry(profile) for profile in whole.profiles],
    }


def layer_entry(profile: LayerProfile) -> dict[str, Any]:
    """Return a layer's entry of the record: its size, and its share of the file if the cost counts that."""
    entry: dict[str, Any] = {"name": profile.name, "macs": profile.macs, "params": profile.params}
    if profile.kind == "kv_cache":
        entry["kind"] = profile.kind
    return entry if profile.file is None else {**entry, "file": asdict(profile.file)}


def costs_of(
    plan: Plan, assignment: dict[str, tuple[Format, Format]], reach: Mapping[str, Reach] | None = None
) -> dict[str, Any]:
    """Return the cost entries of the record: the costs of the assignment and the range of the search space.

    Args:
        plan: Plan of the run.
        assignment: Layer name -> (weight format, activation format).
        reach: Layer name -> what calibration found out about the layer, see `quant.quant_module.Reach`.
    """
    from cost.cost import COSTS, overhead_memory, unsearched_memory
    from cost.units import UNITS

    config = plan.config
    cost_type: Any = config.cost_type
    weights = [replace(profile, file=None) for profile in plan.profiles]
    costs = {name: cost(weights, assignment) for name, cost in COSTS.items()}
    stored = [profile for profile in plan.profiles if profile.kind != "kv_cache"]  # a file holds no keys and values
    in_file = {profile.name: assignment[profile.name] for profile in stored}
    overhead = overhead_memory(stored, in_file, config.per_channel)
    unsearched = unsearched_memory(plan.bundle.model, plan.layers)
    total = COSTS["memory"]([replace(profile, file=None) for profile in stored], in_file) + overhead + unsearched
    if config.cost_scope == "file":  # which also counts buffers, and zero points of weights
        total = COSTS["memory"](stored, in_file)
    space = space_of(plan, "layer")
    space = replace(space, reach={**space.reach, **(reach or {})})
    return {
        "cost": COSTS[cost_type](plan.profiles, assignment),
        "cost_unit": UNITS[cost_type],
        "cost_range": list(space.cost_range(plan.profiles, cost_type)),
        "limits": [
            {"name": limit.name, "unit": limit.unit, "limit": limit.value, "value": limit.total(assignment)}
            for limit in (limits_of(config, plan.profiles, plan.whole_profiles) if config.chooses else ())
        ],
        "costs": {
            **costs,
            "overhead": overhead,
            "unsearched": unsearched,
            "total": total,
        },
    }


def cache_costs(plan: Plan) -> dict[str, Any]:
    """Return the entries of the record on the cache of keys and values; empty without --quantize_kv_cache.

    Scales (16 bits a token and head) and zero points are counted.
    """
    from quant.transforms.kv_cache import caches_of

    if not plan.caches:
        return {}
    formats = {name: cache.formats[0] for name, cache in caches_of(plan.bundle.model).items()}
    per_token = sum(attention.bits(formats[attention.name]) for attention in plan.caches) / 8
    of_float = sum(attention.bits(FLOAT) for attention in plan.caches) / 8
    tokens = plan.config.cache_tokens
    return {
        "kv_cache_bytes_per_token": per_token,
        "kv_cache": {
            "formats": {name: format.name for name, format in formats.items()},
            "tokens": tokens,
            "memory": per_token * tokens / 2**20,
            "float_memory": of_float * tokens / 2**20,
        },
    }


def layer_notes(plan: Plan) -> list[str]:
    """Return notes on the cost: matrices that it excludes, and layers that are never called."""
    from quant.analysis.float_share import float_share

    outside = float_share(plan.bundle.model, plan.layers)
    where = "in float" if plan.config.cost_scope == "file" else "outside the cost"
    notes = [f"{where}: {outside}"] if outside.left else []
    divided = plan.channel_groups
    whole = [name for name in plan.layers if name not in divided] if plan.config.channel_groups > 1 else []
    if whole:
        notes.append(
            f"{len(whole)} layers keep one format for all output channels (embeddings, experts, shared weights, few "
            f"channels): {', '.join(whole[:3])}"
        )
    if idle := [p.name for p in plan.profiles if not p.calls]:
        notes.append(f"{len(idle)} layers are never called and cost no compute: {', '.join(idle[:3])}")
    return notes


def commit() -> str | None:
    """Return the commit of the checkout, or of the source of the installation; None if neither is known."""
    if (ROOT / ".git").exists() and shutil.which("git"):
        git = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=False)
        return git.stdout.strip() or None
    distribution = installed()
    source = None if distribution is None else distribution.read_text("direct_url.json")
    revision = json.loads(source or "{}").get("vcs_info", {}).get("commit_id")
    return None if revision is None else str(revision)


def installed() -> Distribution | None:
    """Return the distribution that this file belongs to; None for a checkout, even if another copy is installed."""
    found = next(iter(distributions(name=DISTRIBUTION)), None)
    return found if found is not None and Path(str(found.locate_file(""))).resolve() == ROOT else None


def versions() -> dict[str, str]:
    """Return the versions of Python, of the packages that affect results, and of this project if it is installed."""
    distribution = installed()
    own = {} if distribution is None else {DISTRIBUTION: distribution.version}
    return {"python": platform.python_version(), **{name: version(name) for name in PACKAGES}} | own


def device_name(config: RunConfig) -> str:
    """Describe the device: 'cuda: NVIDIA H100', or 'cpu: 8 threads'."""
    import torch

    if config.device != "cpu" and torch.cuda.is_available():
        return f"cuda: {torch.cuda.get_device_name()}"
    return f"cpu: {torch.get_num_threads()} threads"


def outside_cost(record: Mapping[str, Any]) -> str:
    """Return a suffix for the cost about weights that it excludes; empty if there are none or the record is too old."""
    share = record.get("float_share") or 0.0
    if share and counted_part(record["cost_type"], scope_of(record)) == "of the whole file":
        return f"; in float: {100 * share:.3g} % of the weights in matrices"
    return f"; outside it, in float: {100 * share:.3g} % of the weights in matrices" if share else ""


def outcome(record: Mapping[str, Any], folder: Path | None = None) -> list[str]:
    """Summarize a finished run in lines of text: metrics, selected assignment, cost, limits and quality.

    Args:
        record: The record of the run.
        folder: Folder of the run; adds lines about the available exports.
    """
    lines = [
        f"{split}: " + "  ".join(f"{name} {value:.5g}" for name, value in metrics.items())
        for split, metrics in record["metrics"].items()
    ]
    contest = record.get("contest") or {}
    lines += [choice_line(record) or "", f"{cost_line(record)}{outside_cost(record)}"]
    lines += architecture_lines(record)
    lines += cache_lines(record)
    for limit in record["limits"]:
        lines.append(f"{limit['name']}: {limit['value']:.6g} {limit['unit']} (limit {limit['limit']:.6g})")
    lines.append(stopwatch_line(record) or "")
    if "max_drop" in contest:
        kept = "within" if contest["within_drop"] else "NOT within"
        quality, of_float, drop = contest["held_out_quality"], contest["float_quality"], contest["max_drop"]
        lines.append(f"held-out quality: {quality:.5f} when chosen, float {of_float:.5f}: {kept} {drop:g}")
    if risen := loss_rise(record):
        lines.append(f"{LOSS_ROSE} {risen}")
    if folder is not None:
        lines.append(export_lines(record, folder) or "")
    return [line for line in lines if line]
