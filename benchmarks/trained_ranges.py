"""Range estimators of weights, before and after training; the table goes into benchmarks/RESULTS.md.

    python -m benchmarks.trained_ranges --shared ../shared [--models resnet20,resnet18,encoder,bert-tiny]
        [--formats int8,int4] [--observers minmax,mse,weighted_mse] [--seeds 0,1,2]

All runs of a model start from the same float weights. Untrained: weights alone are rounded. Trained: weights and
inputs, with learned scales that start at the estimator's ranges. Accuracy in % and, in brackets, loss, means over the
seeds; a run that has its record is not run again. ResNet-18 and BERT-tiny are trained from scratch first.
"""

from __future__ import annotations

import argparse
import shlex
from datetime import date
from pathlib import Path
from statistics import mean, stdev

from benchmarks.quality import RESNET20, ROOT, TEXT_STEPS, Row, common_flags, encoder, run, score

RESNET18 = (
    "--task cifar10 --model resnet18 --image_size 64 --data_dir {shared}/data/cifar10 --train_batch_size 32 "
    "--eval_batch_size 128"
)
BERT_TINY = (
    "--task sst2 --model bert-tiny --data_dir {shared}/data/glue/sst2 --train_batch_size 32 --eval_batch_size 64"
)


def subjects() -> dict[str, Row]:
    """Return the models with their steps; `Row.budget` is not used."""
    return {
        "resnet20": Row(f"{RESNET20} --max_steps 100", "", ()),
        "resnet18": Row(
            f"{RESNET18} --max_steps 60 --learning_rate 3e-4",
            "",
            (),
            start=f"{RESNET18} --from_scratch --max_steps 800 --learning_rate 1e-3",
        ),
        "encoder": Row(
            f"{encoder('mrpc')} {TEXT_STEPS}", "", (), start=f"{encoder('mrpc')} --max_steps 230 --learning_rate 1e-4"
        ),
        "bert-tiny": Row(
            f"{BERT_TINY} --max_steps 100 --learning_rate 3e-4",
            "",
            (),
            start=f"{BERT_TINY} --from_scratch --max_steps 1500 --learning_rate 1e-3",
        ),
    }


def cell(common: list[str], format_name: str, observer: str, seeds: list[int]) -> str:
    """Return untrained and trained accuracy and loss of a format."""
    own = [*common, "--weight_observer", observer]
    weights_alone = shlex.split(f"--weight_bits {format_name} --max_steps 0 --seed 0")
    untrained = run([*own, *weights_alone], f"untrained-{format_name}-{observer}")[0]
    trained = [
        run([*own, *shlex.split(f"--bits {format_name} --seed {seed}")], f"{format_name}-{observer}-s{seed}")[0]
        for seed in seeds
    ]
    accuracies = [score(record) for record in trained]
    spread = f" ± {stdev(accuracies):.2f}" if len(seeds) > 1 else ""
    losses = mean(score(record, metric="loss") for record in trained)
    before = f"{score(untrained):.2f} ({score(untrained, metric='loss'):.3f})"
    return f"{before} | {mean(accuracies):.2f}{spread} ({losses:.3f})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shared", type=Path, required=True, help="folder with data/ and models/")
    parser.add_argument("--models", default="resnet20,resnet18,encoder,bert-tiny")
    parser.add_argument("--formats", default="int8,int4")
    parser.add_argument("--observers", default="minmax,mse,weighted_mse")
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--output_root_dir", type=Path, default=ROOT / "output" / "ranges")
    arguments = parser.parse_args()
    formats, seeds = arguments.formats.split(","), [int(seed) for seed in arguments.seeds.split(",")]
    print(f"seeds {arguments.seeds}, {date.today()}\n")
    print("| model | ranges | " + " | ".join(f"{f}, untrained | {f}, trained" for f in formats) + " |")
    print("|---|---|" + "---|---|" * len(formats))
    for name in arguments.models.split(","):
        row = subjects()[name]
        common = common_flags(name, row, arguments.shared.resolve(), arguments.output_root_dir.resolve())
        whole = run([*common, "--method", "float", "--max_steps", "0", "--seed", "0"], "float")[0]
        print(f"| {name} | float | {score(whole):.2f} ({score(whole, metric='loss'):.3f}) |", flush=True)
        for observer in arguments.observers.split(","):
            cells = [cell(common, format_name, observer, seeds) for format_name in formats]
            print(f"| {name} | {observer} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
