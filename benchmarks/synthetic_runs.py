"""Run folders as finished runs leave them, made up in milliseconds: for the report's tests and its benchmark."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import yaml

LAYERS = [
    "model.stem",
    *(f"model.stages.{s}.blocks.{b}.conv{c}" for s in range(3) for b in range(2) for c in (1, 2)),
    "model.head",
]


def record_of(method: str, seed: int, bits: tuple[int, ...], target: float | None, **changes: Any) -> dict[str, Any]:
    """A result record whose cost and accuracy follow from a random assignment over `bits`."""
    draw = random.Random(f"{method} {seed} {bits} {target}")
    chosen = [draw.choice(bits) for _ in LAYERS]
    names = ["float" if b == 16 else f"int{b}" for b in chosen]
    macs = [40_000 + 9_000 * i for i in range(len(LAYERS))]
    compute = sum(m * b * b for m, b in zip(macs, chosen, strict=True)) / 1e9
    memory = sum(m / 40 * b for m, b in zip(macs, chosen, strict=True)) / 8 / 2**20
    accuracy = 0.97 - 0.5 / 2 ** (sum(chosen) / len(chosen)) - draw.uniform(0, 0.01)
    return {
        "schema_version": 1,
        "status": "finished",
        "reason": None,
        "task": "digits",
        "model": "convnet",
        "method": method,
        "seed": seed,
        "run_id": f"convnet-{method}-{min(bits)}-{target}-s{seed}",
        "cost_type": "compute",
        "cost_target": target,
        "cost": compute,
        "cost_range": [0.01, 0.2],
        "cost_unit": "GBOPs",
        "costs": {"memory": memory, "compute": compute, "overhead": 0.0, "unsearched": 0.0, "total": memory},
        "metrics": {"validation": {"accuracy": accuracy, "loss": 1 - accuracy, "n": 360}},
        "metric": "accuracy",
        "float_metrics": None,
        "assignment": {layer: [name, name] for layer, name in zip(LAYERS, names, strict=True)},
        "search_space": [f"int{b}" for b in bits] if len(bits) > 1 else None,
        "layers": [{"name": n, "macs": m, "params": m // 40} for n, m in zip(LAYERS, macs, strict=True)],
        "steps": 200,
        "wall_seconds": 20.0 + seed,
        "versions": {"torch": "2.15.0"},
        "commit": "0" * 40,
        "device": "cpu",
        "notes": [],
        **changes,
    }


def history_of(record: dict[str, Any], steps: int = 120) -> str:
    """history.jsonl of a search that becomes surer over its steps."""
    draw = random.Random(record["run_id"])
    choices, lines = len(record["search_space"]), []
    choice_of = {name: place for place, name in enumerate(record["search_space"])}.get
    for step in range(steps):
        share = step / steps
        draws = [
            [record["cost"] * 2 ** (draw.gauss(0, 0.8) * (1 - share)), 0.4 + 0.5 * share + draw.gauss(0, 0.03)]
            for _ in range(2)
        ]
        line = {
            "step": step,
            "phase": "delay" if share < 0.25 else "search",
            "loss": 2.3 - 2 * share + draw.gauss(0, 0.1),
            "quality": draws[0][1],
            "cost": draws[0][0],
            "draws": draws,
            "reward": 0.3 + 0.6 * share + draw.gauss(0, 0.03),
            "entropy": (1 - share) * len(LAYERS),
        }
        if step % 10 == 0:
            best = (1 - share) / choices + share
            rest = (1 - best) / (choices - 1)
            places = [choice_of(weight) for weight, _ in record["assignment"].values()]
            line["probabilities"] = [[best if c == place else rest for c in range(choices)] for place in places]
        lines.append(json.dumps(line))
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
    config = {"task": record["task"], "model": record["model"], "seed": seed, "exp_name": "default", **(settings or {})}
    (path / "config.yaml").write_text(yaml.safe_dump(config))
    if record["search_space"]:
        (path / "history.jsonl").write_text(history_of(record))
    (path / "result.json").write_text(json.dumps(record))
    return path
