"""Accuracy beside other libraries at the exact cost of each: the same start, data, steps, optimizer and teacher.

    python -m benchmarks.peer_accuracy --shared ../shared [--rows resnet20-3] [--peers "NNCF, uniform"] [--seeds 0]

Rows and our own methods are those of `benchmarks.quality`. A peer (`benchmarks.peer_models`) quantizes the float model
with its own quantizers, and our loop trains it: the same batches, optimizer, teacher, and batch norms recalibrated at
the end. Its bits are charged by our cost functions. What has its result is not run again, and `--finished` tells of
what is there. Each peer needs its package: nvidia-modelopt and brevitas (the extra `bench`), or nncf, which no extra
holds. A peer without its package is left out, by name. NNCF compiles its quantizers once: set
NNCF_EXTENSION_LOAD_TIMEOUT=0 where that takes longer than a minute.
"""

from __future__ import annotations

import argparse
import copy
import json
import shlex
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from datetime import date
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from statistics import mean
from typing import TYPE_CHECKING, Any

from benchmarks.peer_models import PEERS, Bits, Start
from benchmarks.quality import ROOT, Row, Runs, common_flags, interval, points_ahead, rows, runs_of, score
from cost.units import UNITS
from eval.config.parser import parse

if TYPE_CHECKING:
    from torch import nn

    from eval.config.run_config import RunConfig
    from eval.run.plan import Plan
    from trainer.reinforce_trainer import ReinforceTrainer

RECORD = "peer.json"
OURS = ("measured", "search")


def flags_of(name: str, peer: str, seed: int, shared: Path, output: Path) -> list[str]:
    """Flags of a peer's run: ours in float, with the teacher of a run that quantizes."""
    row = rows()[name]
    slug = peer.lower().replace(",", "").replace(" ", "-")
    return [*common_flags(name, row, shared, output), "--bits", "0", "--seed", str(seed), "--run_id", f"{slug}-s{seed}"]


def start_of(plan: Plan, trainer: ReinforceTrainer, row: Row, asked: RunConfig) -> Start:
    """What a peer gets: the float model, our calibration batches, and what a method that chooses is `asked` for."""
    from cost.cost import cost_of_bits
    from trainer.search.config import uniform_cost

    cost_type: Any = plan.config.cost_type
    return Start(
        trainer.model,
        list(trainer.calibration.batches()),
        plan.layers,
        uniform_bits(row),
        [int(format.name.removeprefix("int")) for format in asked.search_formats],
        lambda bits: cost_of_bits(plan.profiles, [bits[profile.name] for profile in plan.profiles], cost_type),
        uniform_cost(plan.profiles, asked.target_list[0], cost_type, weight_only=False),
    )


def uniform_bits(row: Row) -> int:
    """Bits of the peers that give every layer the same: those of the row's first uniform run."""
    return int(row.uniform[0].removeprefix("int"))


def use_model(trainer: ReinforceTrainer, model: nn.Module) -> None:
    """Let a trainer train a peer's model, which may be another object than ours."""
    trainer.model = trainer.model_wrapped = model
    trainer.calibration.model = model


def train(name: str, peer: str, seed: int, shared: Path, output: Path) -> None:
    """Train a peer's model as a run of ours is trained, and write its record and its answers."""
    from eval.run.plan import make_plan
    from eval.run.trainer import evaluate, make_trainer

    started = time.monotonic()
    config = parse([*flags_of(name, peer, seed, shared, output), "--quiet"])
    plan = make_plan(config)
    trainer, _, _ = make_trainer(plan)
    floating = replace(plan, bundle=replace(plan.bundle, model=copy.deepcopy(plan.bundle.model)))
    row = rows()[name]
    asked = parse([*common_flags(name, row, shared, output), *shlex.split(row.budget), "--method", "measured"])
    model, bits = PEERS[peer].quantize(start_of(plan, trainer, row, asked))
    use_model(trainer, model)
    trainer.train()
    answers: dict[str, dict[str, list[Any]]] = {}
    metrics = evaluate(trainer, plan, answers)
    record = {
        "peer": peer,
        "package": f"{PEERS[peer].package} {version(PEERS[peer].package)}",
        "seed": seed,
        "metric": plan.data.metric,
        "metrics": metrics,
        **costs(floating, bits),
        "wall_seconds": round(time.monotonic() - started, 1),
    }
    (config.run_folder / "predictions.json").write_text(json.dumps(answers))
    (config.run_folder / RECORD).write_text(json.dumps(record, indent=1))


def costs(plan: Plan, bits: Bits) -> dict[str, Any]:
    """A peer's costs as our records hold them, and its assignment.

    Args:
        plan: Plan with the float model.
        bits: Layer -> bits of its weights and of its inputs.
    """
    from cost.cost import assignment_to_json
    from eval.run.record import costs_of
    from quant.formats import IntFormat

    assignment: Any = {layer: tuple(IntFormat(one) for one in own) for layer, own in bits.items()}
    charged = costs_of(plan, assignment)
    kept = {key: charged[key] for key in ("cost", "cost_unit", "costs")}
    layers = [{"name": profile.name, "params": profile.params} for profile in plan.profiles]
    return {**kept, "layers": layers, "assignment": assignment_to_json(assignment)}


def peer_runs(name: str, peer: str, seeds: Sequence[int], arguments: argparse.Namespace) -> list[Any] | None:
    """A peer's records and folders, after running what is missing; None if it has no run and may not or cannot run."""
    found = []
    for seed in seeds:
        folder = parse(flags_of(name, peer, seed, arguments.shared, arguments.output_root_dir)).run_folder
        if not (folder / RECORD).exists():
            if arguments.finished or not installed(peer):
                return None
            one = ["--one", name, peer, str(seed)]
            places = ["--shared", str(arguments.shared), "--output_root_dir", str(arguments.output_root_dir)]
            print(f"$ {name}, {peer}, seed {seed}", file=sys.stderr, flush=True)
            command = [sys.executable, "-m", "benchmarks.peer_accuracy", *places, *one]
            subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
        found.append((json.loads((folder / RECORD).read_text()), folder))
    return found


def installed(peer: str) -> bool:
    try:
        version(PEERS[peer].package)
    except PackageNotFoundError:
        return False
    return True


def table(name: str, row: Row, found: Runs, seeds: Sequence[int]) -> list[str]:
    """The row's lines of Markdown, the methods by their mean accuracy."""
    each = " / ".join(map(str, seeds))
    lines = [
        f"\n**{name}**: `{row.budget}`; all runs: `{row.common.format(shared='../shared')}`\n",
        f"| method | {row_unit(found)} | bits a weight | file [MiB] | seeds {each} [%] | mean [%] "
        "| search - method [points] |",
        "|---|---|---|---|---|---|---|",
    ]
    for method, runs in sorted(found.items(), key=lambda one: mean_score(one[1])):
        records = [record for record, _ in runs]
        bits = mean(bits_a_weight(record) for record in records)
        shown = " / ".join(f"{score(record):.2f}" for record in records)
        ahead = "" if "search" not in found or method == "search" else interval([[points_ahead(found, method)]])
        title = f"{method} ({records[0]['package']})" if "package" in records[0] else method
        charged = f"{mean(record['cost'] for record in records):.4g} | {bits:.2f}"
        total = mean(record["costs"]["total"] for record in records)
        lines.append(f"| {title} | {charged} | {total:.4f} | {shown} | {mean_score(runs):.2f} | {ahead} |")
    return lines


def row_unit(found: Runs) -> str:
    units = {record["cost_unit"] for runs in found.values() for record, _ in runs}
    return f"cost [{', '.join(sorted(units)) or UNITS['compute']}]"


def mean_score(runs: Sequence[tuple[dict[str, Any], Path]]) -> float:
    return mean(score(record) for record, _ in runs)


def bits_a_weight(record: Mapping[str, Any]) -> float:
    """Mean bits of the searched layers' weights, without their scales."""
    from cost.cost import MIB_BITS

    return float(record["costs"]["memory"] * MIB_BITS / sum(layer["params"] for layer in record["layers"]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shared", type=Path, required=True, help="folder with data/ and models/")
    parser.add_argument("--rows", default="resnet20-4.1-wide,resnet20-3", help="comma list of rows of quality")
    parser.add_argument("--peers", default=";".join(PEERS), help="list of peers with semicolons between")
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--finished", action="store_true", help="run nothing: tell of what has all its seeds")
    parser.add_argument("--output_root_dir", type=Path, default=ROOT / "output" / "quality")
    parser.add_argument("--one", nargs=3, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    arguments.shared, arguments.output_root_dir = arguments.shared.resolve(), arguments.output_root_dir.resolve()
    if arguments.one:
        name, peer, seed = arguments.one
        train(name, peer, int(seed), arguments.shared, arguments.output_root_dir)
        return
    names, peers = arguments.rows.split(","), arguments.peers.split(";")
    for flag, given, known in (("--rows", names, rows()), ("--peers", peers, PEERS)):
        if unknown := [one for one in given if one not in known]:
            parser.error(f"{flag}: unknown {unknown[0]}; choices: {'; '.join(known)}")
    if floating := [
        name for name in names if not rows()[name].uniform or not rows()[name].uniform[0].startswith("int")
    ]:
        parser.error(f"--rows {floating[0]}: peers are given integers; choose a row with a uniform run in integers")
    compare(names, peers, arguments)


def compare(names: Sequence[str], peers: Sequence[str], arguments: argparse.Namespace) -> None:
    """Run what is missing, and print a table for each row."""
    seeds = [int(seed) for seed in arguments.seeds.split(",")]
    if absent := [peer for peer in peers if not installed(peer)]:
        print(
            f"not installed, left out: {'; '.join(f'{peer} ({PEERS[peer].package})' for peer in absent)}",
            file=sys.stderr,
        )
    for name in names:
        row = rows()[name]
        own = {*OURS, *(f"uniform {format}" for format in row.uniform)}
        places = (arguments.shared, arguments.output_root_dir)
        found = runs_of(name, row, *places, seeds, own, arguments.finished)
        able = [peer for peer in peers if not PEERS[peer].widths or uniform_bits(row) in PEERS[peer].widths]
        found |= {peer: runs for peer in able if (runs := peer_runs(name, peer, seeds, arguments)) is not None}
        print("\n".join(table(name, row, found, seeds)), flush=True)
    print(f"\n{date.today()}")


if __name__ == "__main__":
    main()
