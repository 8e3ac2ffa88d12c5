"""Accuracy of the search against uniform formats on real data, over seeds; the table goes into benchmarks/RESULTS.md.

    python -m benchmarks.quality --shared ../shared [--only resnet20] [--output_root_dir output/quality]

`--shared` holds data/cifar10, data/glue/sst2 and models/resnet20-cifar10. All methods of a row start from the same
weights and train for the same steps. A run that has its record is not run again, so an interrupted call goes on.
"""

from __future__ import annotations

import argparse
import json
import shlex
import subprocess
import sys
from datetime import date
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from eval.flags import parse

ROOT = Path(__file__).resolve().parents[1]
SEEDS = (0, 1, 2)
PAIRS: dict[str, tuple[str, dict[str, str]]] = {
    "resnet20": (
        "--task cifar10 --model resnet20 --data_dir {shared}/data/cifar10 "
        "--model_path {shared}/models/resnet20-cifar10 --max_steps 400 --train_batch_size 128 --eval_batch_size 128 "
        "--optimizer sgd --learning_rate 0.001 --cost_type compute --per_channel",
        {
            "float": "--method float --max_steps 0",
            "uniform int4": "--bits 4",
            "search 2,4,8 at 4.3 bits": "--search --search_space 2,4,8 --target_bits 4.3",
        },
    ),
    "bert-tiny": (
        "--task sst2 --model bert-tiny --from_scratch --data_dir {shared}/data/glue/sst2 --max_steps 2000 "
        "--train_batch_size 32 --eval_batch_size 64 --learning_rate 1e-3 --max_length 64",
        {
            "float": "--method float",
            "uniform int4": "--bits 4",
            "block search 4,8": "--block_search --search_space 4,8",
        },
    ),
}
"""model -> (flags of all its runs, method -> its flags)"""


def run(flags: list[str]) -> dict[str, Any]:
    """The record of a run, after running it if there is none yet."""
    path = parse(flags).run_folder / "result.json"
    if not path.exists():
        print("$ python eval/eval_run.py", shlex.join(flags), flush=True)
        subprocess.run([sys.executable, "eval/eval_run.py", *flags], cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    record: dict[str, Any] = json.loads(path.read_text())
    if record["status"] != "finished":
        raise SystemExit(f"{path}: {record['reason']}")
    return record


def rows(model: str, shared: Path, output: Path) -> None:
    """Print a line of the table for each method of the model."""
    common, methods = PAIRS[model]
    for method, own in methods.items():
        flags = shlex.split(f"{common.format(shared=shared)} {own} --save_strategy no --output_root_dir {output}")
        records = [run([*flags, "--seed", str(seed)]) for seed in SEEDS]
        first = records[0]
        accuracies = [100 * next(iter(record["metrics"].values()))[record["metric"]] for record in records]
        target = "" if first["cost_target"] is None else f" (target {first['cost_target']:.4g})"
        costs = ", ".join(f"{cost:.4g}" for cost in sorted({record["cost"] for record in records}))
        values = " / ".join(f"{value:.2f}" for value in accuracies)
        spread = f"{mean(accuracies):.2f} ± {stdev(accuracies):.2f}"
        print(f"| {model} | {method} | {costs} {first['cost_unit']}{target} | {values} | {spread} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shared", type=Path, required=True, help="folder with data/ and models/")
    parser.add_argument("--only", choices=list(PAIRS), help="one model of the table")
    parser.add_argument("--output_root_dir", type=Path, default=ROOT / "output" / "quality")
    arguments = parser.parse_args()
    print("| model | method | cost | accuracy of seeds 0 / 1 / 2 [%] | mean ± sd [%] |\n|---|---|---|---|---|")
    for model in [arguments.only] if arguments.only else PAIRS:
        rows(model, arguments.shared.resolve(), arguments.output_root_dir.resolve())
    print(f"\n{date.today()}")


if __name__ == "__main__":
    main()
