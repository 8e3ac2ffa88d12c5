"""Folders of finished runs, made in milliseconds from two that real runs wrote: for the report's tests and benchmark.

A float run and a search on handwritten digits, of seconds each, are made at the first call. Every other folder is one
of them with other values: no key and no file is written that a run did not write, so that a report which can no longer
read what runs write fails its tests.
"""

from __future__ import annotations

import atexit
import copy
import json
import random
import shutil
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import yaml

FLAGS = (
    "--task digits --model convnet --from_scratch --cost_type compute --device cpu --seed 0 --save_strategy no"
    " --report_to none --max_train_samples 320 --max_steps 30 --quiet"
)
KINDS = {"float": "--method float", "search": "--search --search_space 2,4,8 --target_bits 4 --settle_fraction 0.3"}
OF_A_SEARCH_ALONE = "contest"
"""what the competitors' records lack"""
STEPS = 120


@cache
def real_run(kind: str) -> Path:
    """The folder of a real run of KINDS; it is removed when this process ends."""
    from eval.config.parser import parse
    from eval.eval_run import run

    root = tempfile.mkdtemp(prefix=f"{kind}-run-")
    atexit.register(shutil.rmtree, root, ignore_errors=True)
    config = parse([*FLAGS.split(), *KINDS[kind].split(), "--output_root_dir", root])
    record = run(config)
    assert record["status"] == "finished", record["reason"]
    return config.run_folder


@cache
def _written(kind: str) -> tuple[dict[str, Any], dict[str, Any], list[dict[str, Any]]]:
    """Record, settings and history of a real run."""
    folder = real_run(kind)
    history = [json.loads(line) for line in (folder / "history.jsonl").read_text().splitlines()]
    return (
        json.loads((folder / "result.json").read_text()),
        yaml.safe_load((folder / "config.yaml").read_text()),
        history,
    )


def record_of(method: str, seed: int, bits: tuple[int, ...], target: float | None, **changes: Any) -> dict[str, Any]:
    """A real record whose assignment over `bits` is drawn at random, and whose cost and accuracy follow from it."""
    draw = random.Random(f"{method} {seed} {bits} {target}")
    real, _, _ = _written("search" if len(bits) > 1 else "float")
    chosen = {layer["name"]: draw.choice(bits) for layer in real["layers"]}
    names = {layer: "float" if b == 16 else f"int{b}" for layer, b in chosen.items()}
    compute = sum(layer["macs"] * chosen[layer["name"]] ** 2 for layer in real["layers"]) / 1e9
    memory = sum(layer["params"] * chosen[layer["name"]] for layer in real["layers"]) / 8 / 2**20
    accuracy = 0.97 - 0.5 / 2 ** (sum(chosen.values()) / len(chosen)) - draw.uniform(0, 0.01)
    (split,) = real["metrics"]
    values = {
        "method": method,
        "seed": seed,
        "run_id": f"convnet-{method}-{min(bits)}-{target}-s{seed}",
        "cost_target": target,
        "cost": compute,
        "costs": changed(real["costs"], memory=memory, compute=compute, total=memory),
        "metrics": {split: changed(real["metrics"][split], accuracy=accuracy, loss=1 - accuracy)},
        "assignment": {layer: [name, name] for layer, name in names.items()},
        "search_space": [f"int{b}" for b in bits] if len(bits) > 1 else None,
        "wall_seconds": 20.0 + seed,
    }
    if "assignment" in changes and real["decisions"] is not None:
        changes = {"decisions": {layer: [layer] for layer in changes["assignment"]}} | changes
    record = changed(changed(real, **values), **changes)
    if method != "search":
        record.pop(OF_A_SEARCH_ALONE, None)
    return record


def changed(real: dict[str, Any], **values: Any) -> dict[str, Any]:
    """A copy of what a run wrote, with other values. Raises KeyError for a key that it did not write."""
    if unknown := values.keys() - real.keys():
        raise KeyError(f"no run writes {min(unknown)}")
    return copy.deepcopy(real) | values


def history_of(record: dict[str, Any], steps: int = STEPS) -> str:
    """A real search's history.jsonl with other values: of a search that becomes surer over its steps."""
    draw = random.Random(record["run_id"])
    choices = len(record["search_space"])
    choice_of = {name: place for place, name in enumerate(record["search_space"])}.get
    _, _, history = _written("search")
    real = {phase: [line for line in history if line["phase"] == phase] for phase in ("delay", "search")}
    lines = []
    for step in range(steps):
        share = step / steps
        draws = [
            [record["cost"] * 2 ** (draw.gauss(0, 0.8) * (1 - share)), 0.4 + 0.5 * share + draw.gauss(0, 0.03)]
            for _ in range(2)
        ]
        best = (1 - share) / choices + share
        rest = (1 - best) / (choices - 1)
        places = [choice_of(weight) for weight, _ in record["assignment"].values()]
        values = {
            "step": step,
            "loss": 2.3 - 2 * share + draw.gauss(0, 0.1),
            "quality": draws[0][1],
            "cost": draws[0][0],
            "draws": draws,
            "reward": 0.3 + 0.6 * share + draw.gauss(0, 0.03),
            "entropy": (1 - share) * len(places),
            "probabilities": [[best if c == place else rest for c in range(choices)] for place in places],
        }
        # Every tenth line tells the probabilities besides.
        of_phase = real["delay" if share < 0.25 else "search"]
        alike = [line for line in of_phase if ("probabilities" in line) == (step % 10 == 0)]
        line = alike[step % len(alike)]
        lines.append(json.dumps(line | {name: value for name, value in values.items() if name in line}))
    return "\n".join(lines) + "\n"


def write_run(
    root: Path,
    method: str = "search",
    seed: int = 0,
    bits: tuple[int, ...] = (2, 4, 8),
    target: float | None = None,
    *,
    settings: dict[str, Any] | None = None,
    folder: str | None = None,
    **changes: Any,
) -> Path:
    """A run's folder below `root`; `settings` go into its config.yaml, `changes` into its record."""
    record = record_of(method, seed, bits, target, **changes)
    record["costs"][record["cost_type"]] = record["cost"]
    path = root / record["task"] / "default" / (folder or record["run_id"])
    path.mkdir(parents=True)
    _, real, _ = _written("search" if len(bits) > 1 else "float")
    config = real | {"task": record["task"], "model": record["model"], "seed": seed, **(settings or {})}
    (path / "config.yaml").write_text(yaml.safe_dump(config))
    if record["search_space"]:
        (path / "history.jsonl").write_text(history_of(record))
    (path / "result.json").write_text(json.dumps(record))
    return path
