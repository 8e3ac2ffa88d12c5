"""Joint search of architecture and formats against formats alone, uniform and random choices.

    python -m benchmarks.joint --shared ../shared [--pairs resnet20] [--budgets 0.25,0.5] [--seeds 0,1,2] [--steps 240]

Budgets are shares of the compute of the whole model at int4. All take the same start, data and steps:

- joint: `--architecture_space`; beside it, its architecture trained alone (`--verify_retrain`);
- formats: the same search with the whole architecture;
- uniform: of each width the widest format that fits, trained; the best of them on the test data, to its advantage;
- random: a random joint choice that uses the budget, trained.

`--alone 0.75:333,1/1/0.75:333` trains architectures of that choice alone instead: the width inside the blocks, of all
stages or of each, and the blocks that each keeps; formats are the best for the budget by what the joint search of the
same seed has measured. What has its result is not run again.
"""

from __future__ import annotations

import argparse
import csv
import json
import shlex
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import date
from functools import cache
from pathlib import Path
from statistics import mean, stdev
from typing import TYPE_CHECKING, Any

import numpy as np

from benchmarks.quality import ROOT, folder_of, run, score, train_fixed
from eval.config.parser import parse

if TYPE_CHECKING:  # torch takes seconds to import
    from quant.elastic.net import StructureDecision

WIDTHS, FORMATS = "0.5,0.625,0.75,1", ("int2", "int4", "int8")
ALWAYS = "--save_strategy no --report_to none --quiet --search --search_space 2,4,8 --cost_type compute"


@dataclass(frozen=True)
class Pair:
    """A model with its data, and its space of architectures."""

    flags: str
    space: str


PAIRS = {
    "resnet20": Pair(
        "--task cifar10 --data_dir {shared}/data/cifar10 --model resnet20 "
        "--model_path {shared}/models/resnet20-cifar10 --train_batch_size 64 --learning_rate 1e-3",
        "--architecture_space resnet --depth_choices 1,2",
    ),
    "digits": Pair(
        "--task digits --model convnet --train_batch_size 64 --learning_rate 3e-3", "--architecture_space resnet"
    ),
    "mobilenetv2": Pair(
        "--task {shared}/data/fashion_mnist --model timm:mobilenetv2_050 --image_size 32 --from_scratch "
        "--train_batch_size 64 --learning_rate 5e-3",
        "--architecture_space mobilenetv2 --kernel_choices 3,5 --depth_choices 1,2",
    ),
}


def flags_of(pair: Pair, share: float, seed: int, arguments: argparse.Namespace) -> list[str]:
    """Return what all methods of a pair have in common."""
    flags = f"{pair.flags.format(shared=arguments.shared)} {ALWAYS} --seed {seed} --max_steps {arguments.steps}"
    folder = f"--output_root_dir {arguments.output_root_dir} --exp_name joint-{arguments.steps}"
    common = tuple(shlex.split(f"{flags} {folder}"))
    return [*common, "--cost_target", str(share * compute_at_int4(common))]


@cache
def compute_at_int4(common: tuple[str, ...]) -> float:
    """Return the compute of the model itself at int4 in GBOPs: a space may give its largest model larger kernels."""
    from eval.run.plan import budget, make_plan

    target = budget(make_plan(parse([*common, "--target_bits", "4", "--run_id", "int4"])))
    assert target is not None
    return target


def trained(flags: list[str], name: str, structure: list[int], formats: list[int]) -> float:
    """Return the test accuracy of a fixed choice of the joint space, trained alone."""
    from eval.run.plan import make_plan, search_space

    config = parse([*flags, "--run_id", name])
    path = config.run_folder / "fixed.json"
    if not path.exists():
        plan = make_plan(config)
        assignment = search_space(plan).assignment([*formats, *structure])
        metrics = next(iter(train_fixed(plan, assignment, structure).values()))
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({"structure": structure, "formats": formats, "accuracy": metrics["accuracy"]}))
    return 100 * float(json.loads(path.read_text())["accuracy"])


def choices(flags: list[str], seed: int) -> Iterator[tuple[str, list[int], list[int]]]:
    """Yield the fixed choices within the budget: name, architecture, formats."""
    from eval.run.plan import budget, make_plan, search_space
    from policy.allocators import random_choice
    from policy.joint_space import JointSpace
    from trainer.search.config import budget_of

    plan = make_plan(parse([*flags, "--run_id", "choices"]))
    space, target = search_space(plan), budget(plan)
    assert plan.architecture is not None and isinstance(space, JointSpace) and target is not None
    within = budget_of(space, plan.profiles, "compute", target, [])
    count, decisions = len(space.decisions), plan.architecture.decisions
    for index, width in enumerate(WIDTHS.split(",")):
        # Kernels are the smallest, as in the model itself: the larger ones would leave less for widths and formats.
        whole = [{"width": index, "kernel": 0}.get(d.kind, len(d.choices) - 1) for d in decisions]
        fitting = [n for n in range(len(FORMATS)) if within.fits([n] * count + whole)]
        if fitting:
            yield f"uniform {width} {FORMATS[fitting[-1]]}", whole, [fitting[-1]] * count
    drawn = random_choice(within, np.random.default_rng(seed))
    yield "random", space.structure(drawn), drawn[:count]


def structure_of(text: str, decisions: Sequence[StructureDecision]) -> list[int]:
    """Return the choice of architecture that `--alone` writes as '1/1/0.75:333'."""
    widths, depths = text.split(":")
    shares = [float(width) for width in widths.split("/")]
    stages = list(dict.fromkeys(decision.name.split(".")[0] for decision in decisions))
    structure = []
    for decision in decisions:
        stage = stages.index(decision.name.split(".")[0])
        whole, share = decision.whole, shares[stage % len(shares)]
        structure.append(
            decision.choices.index(round(whole * share) if decision.kind == "width" else int(depths[stage]))
        )
    return structure


def alone(name: str, share: float, seed: int, arguments: argparse.Namespace) -> dict[str, float]:
    """Return architecture -> test accuracy in %, each of `--alone` with its best formats, trained alone."""
    from eval.run.plan import budget, make_plan, search_space
    from policy.joint_budget import JointBudget
    from trainer.search.config import budget_of
    from trainer.search.joint import best_formats

    key, found = f"{name}-{share:g}-s{seed}", dict[str, float]()
    common = flags_of(PAIRS[name], share, seed, arguments)
    with open(folder_of(common, f"joint-{key}") / "sensitivity.csv") as file:
        rows = {row["decision"]: [float(row[f"measured {f}"]) for f in FORMATS] for row in csv.DictReader(file)}
    for text in arguments.alone.split(","):
        shares = map(float, text.split(":")[0].split("/"))
        widths = ",".join(f"{width:g}" for width in sorted({0.5, 1, *shares}))
        flags = [*common, *shlex.split(f"{PAIRS[name].space} --width_choices {widths}")]
        plan = make_plan(parse([*flags, "--run_id", "alone"]))
        space, target = search_space(plan), budget(plan)
        assert plan.architecture is not None and target is not None
        structure = structure_of(text, plan.architecture.decisions)
        within = budget_of(space, plan.profiles, "compute", target, [])
        assert isinstance(within, JointBudget)
        table = np.array([rows[d.name] + rows[d.name][-1:] * (space.num_choices - 3) for d in space.decisions])
        formats = best_formats(table, within, structure)
        found[text] = trained(flags, f"alone-{text.replace('/', '-').replace(':', '-')}-{key}", structure, formats)
    return found


def scores(name: str, share: float, seed: int, arguments: argparse.Namespace) -> dict[str, float]:
    """Return method -> test accuracy in %, for one budget and seed."""
    pair = PAIRS[name]
    flags = flags_of(pair, share, seed, arguments)
    key = f"{name}-{share:g}-s{seed}"
    space = shlex.split(f"{pair.space} --width_choices {WIDTHS}")
    found: dict[str, float] = {}
    record: dict[str, Any] = run([*flags, *space, "--verify_retrain"], f"joint-{key}")[0]
    found["joint"], found["joint, trained alone"] = score(record), score(record, "retrained")
    found["formats"] = score(run(flags, f"formats-{key}")[0])
    uniform = []
    for method, structure, formats in choices([*flags, *space], seed):
        accuracy = trained([*flags, *space], f"{method.replace(' ', '-')}-{key}", structure, formats)
        if method == "random":
            found["random"] = accuracy
        else:
            uniform.append(accuracy)
    return found | {"uniform": max(uniform)} if uniform else found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shared", type=Path, required=True, help="folder with data/ and models/")
    parser.add_argument("--pairs", default="digits,resnet20,mobilenetv2")
    parser.add_argument("--budgets", default="0.25,0.5,1")
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--steps", type=int, default=240)
    parser.add_argument("--alone", default="", help="architectures to train alone instead: 0.75:333,1/1/0.75:333")
    parser.add_argument("--output_root_dir", type=Path, default=ROOT / "output" / "joint")
    arguments = parser.parse_args()
    arguments.shared, arguments.output_root_dir = arguments.shared.resolve(), arguments.output_root_dir.resolve()
    print(f"{arguments.steps} steps, seeds {arguments.seeds}, {date.today()}: test accuracy in %\n")
    print("| model | budget | method | mean | joint minus it, paired |\n|---|---|---|---|---|")
    for name in arguments.pairs.split(","):
        for share in map(float, arguments.budgets.split(",")):
            measure = alone if arguments.alone else scores
            runs = [measure(name, share, int(seed), arguments) for seed in arguments.seeds.split(",")]
            for method in runs[0]:
                ahead = [one["joint"] - one[method] for one in runs if method in one and "joint" in one]
                spread = f" ± {stdev(ahead):.2f}" if len(ahead) > 1 else ""
                told = "" if method == "joint" or not ahead else f"{mean(ahead):+.2f}{spread}"
                print(
                    f"| {name} | {share:g} int4 | {method} | {mean(one[method] for one in runs):.2f} | {told} |",
                    flush=True,
                )


if __name__ == "__main__":
    main()
