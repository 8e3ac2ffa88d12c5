"""How far the seeds of one fixed assignment lie apart: what every difference of accuracies is read against.

    python -m benchmarks.noise --shared ../shared [--rows resnet20-3,fashion-3] [--seeds 0,1,2,3,4]

The assignment is the one that `measured` chooses at the row's budget with seed 0. Each seed trains it anew from the
row's float weights (`benchmarks.quality`): the seed orders and augments the batches, and chooses the examples for
calibration. What has its result is not run again.
"""

from __future__ import annotations

import argparse
import json
import math
import shlex
import sys
from datetime import date
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from benchmarks.quality import ROOT, common_flags, rows, run, score, train_fixed
from eval.config.parser import parse

RECORD = "noise.json"
METHOD = "--method measured"


def trained(name: str, seed: int, shared: Path, output: Path) -> dict[str, Any]:
    """Train the row's assignment with a seed, unless that is done; return the record."""
    from cost.cost import assignment_from_json
    from eval.run.plan import make_plan

    row = rows()[name]
    common = [*common_flags(name, row, shared, output), *shlex.split(f"{METHOD} {row.budget}")]
    chosen, _ = run([*common, "--seed", "0"], "measured-s0")
    config = parse([*common, "--quiet", "--seed", str(seed), "--run_id", f"fixed-s{seed}"])
    path = config.run_folder / RECORD
    if not path.exists():
        print(f"$ {name}, the fixed assignment, seed {seed}", file=sys.stderr, flush=True)
        kept = {key: chosen[key] for key in ("metric", "cost", "cost_unit")}
        metrics = train_fixed(make_plan(config), assignment_from_json(chosen["assignment"]))
        path.write_text(json.dumps(kept | {"metrics": metrics}, indent=1))
    record: dict[str, Any] = json.loads(path.read_text())
    return record


def line(name: str, records: list[dict[str, Any]]) -> str:
    """A row's line of Markdown, in points of accuracy."""
    values = [score(record) for record in records]
    spread = stdev(values)
    examples = next(iter(records[0]["metrics"].values()))["n"]
    sampling = 100 * math.sqrt(mean(values) / 100 * (1 - mean(values) / 100) / examples)
    shown = " / ".join(f"{value:.2f}" for value in values)
    cost = f"{records[0]['cost']:.4g} {records[0]['cost_unit']}"
    ends = f"{min(values):.2f} to {max(values):.2f}"
    told = f"{spread:.2f} | {ends} | {1.96 * spread * math.sqrt(2 / 3):.2f} | {sampling:.2f}"
    return f"| {name} | {cost} | {shown} | {mean(values):.2f} | {told} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shared", type=Path, required=True, help="folder with data/ and models/")
    parser.add_argument("--rows", default="resnet20-3,fashion-3", help="comma list of rows of quality")
    parser.add_argument("--seeds", default="0,1,2,3,4", help="at least two")
    parser.add_argument("--output_root_dir", type=Path, default=ROOT / "output" / "quality")
    arguments = parser.parse_args()
    shared, output = arguments.shared.resolve(), arguments.output_root_dir.resolve()
    names, seeds = arguments.rows.split(","), [int(seed) for seed in arguments.seeds.split(",")]
    if unknown := [name for name in names if name not in rows()]:
        parser.error(f"--rows: unknown {unknown[0]}; choices: {', '.join(rows())}")
    if len(seeds) < 2:
        parser.error(f"--seeds {arguments.seeds}: one seed has no spread; give at least two")
    lines = [
        "| row | cost | seeds [%] | mean [%] | standard deviation [points] | from, to [%] "
        "| two means of three seeds differ by chance by up to (95 %) | standard error of the examples |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name in names:
        lines.append(line(name, [trained(name, seed, shared, output) for seed in seeds]))
    print("\n".join([*lines, "", str(date.today())]))


if __name__ == "__main__":
    main()
