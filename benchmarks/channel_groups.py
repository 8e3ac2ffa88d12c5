"""Groups of output channels on ResNet-20 without training: what their order and their number are worth.

    python -m benchmarks.channel_groups --shared ../shared [--tables orders,budgets]

`orders`: weights of all layers in int4+int2 and int3+int2, activations in float; the channels of the second group are
those with the lowest scores of `trainer.search.sensitivity.channel_sensitivity`, the last ones as they come, ones drawn
at random, or those with the highest scores. `budgets`: formats that `--method measured` chooses for the weights with 1,
2 and 4 groups a layer. Searches that train are rows of benchmarks.quality. For benchmarks/RESULTS.md.
"""

from __future__ import annotations

import argparse
import shlex
from datetime import date
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from benchmarks.quality import RESNET20
from eval.config.parser import parse
from eval.run.plan import Plan, make_plan
from eval.run.trainer import evaluate, make_trainer
from quant.channel_groups import groups_of, order_channels
from quant.formats import FLOAT, MixedFormat, parse_format
from quant.quant_module import QuantModule
from trainer.reinforce_trainer import ReinforceTrainer

MIXES = ("int4+int2", "int3+int2")
DRAWS = 3
"""Random orders."""
BUDGETS = (3, 4)


def orders(modules: dict[str, QuantModule]) -> dict[str, dict[str, torch.Tensor]]:
    """Return name of an order -> layer -> (channels,), the largest value first; a trainer has ordered the channels."""
    scores = {}
    for name, module in modules.items():
        groups = groups_of(module)
        scores[name] = torch.zeros(sum(map(len, groups)))
        scores[name][groups[0]] = 1.0
    found = {"by score": scores, "as they come": {n: -torch.arange(float(len(s))) for n, s in scores.items()}}
    for seed in range(DRAWS):
        generator = torch.Generator().manual_seed(seed)
        found[f"random, seed {seed}"] = {n: torch.rand(len(s), generator=generator) for n, s in scores.items()}
    return {**found, "by score, reversed": {name: -own for name, own in scores.items()}}


def prepared(shared: Path, output: str, flags: str) -> tuple[Plan, ReinforceTrainer, dict[str, QuantModule]]:
    """Return the plan of a run without steps, and its trainer and layers, after it has chosen."""
    common = RESNET20.replace("--max_steps 200", "--max_steps 0").format(shared=shared)
    always = f"--weight_only_search --seed 0 --report_to none --quiet --output_root_dir {output}"
    plan = make_plan(parse(shlex.split(f"{common} {always} {flags}")))
    trainer, modules, _ = make_trainer(plan)
    trainer.prepare()
    return plan, trainer, modules


def order_table(shared: Path, output: str) -> None:
    """Print what each order of the channels gives."""
    flags = "--method head_tail --search_space 2,3,4 --target_bits 3 --channel_groups 2"
    plan, trainer, modules = prepared(shared, output, flags)
    print("| order of the channels |" + "".join(f" {mix}: accuracy [%] | loss |" for mix in MIXES))
    print("|---|" + "---|---|" * len(MIXES))
    for name, order in orders(modules).items():
        order_channels(modules, order)
        cells = []
        for mix in MIXES:
            trainer.calibration.set_formats(dict.fromkeys(modules, (parse_format(mix), FLOAT)))
            metrics = evaluate(trainer, plan)["validation"]
            cells.append(f" {100 * metrics['accuracy']:.2f} | {metrics['loss']:.3f} |")
        print(f"| {name} |" + "".join(cells), flush=True)


def budget_table(shared: Path, output: str) -> None:
    """Print what the measured allocation gives with each number of groups."""
    print("\n| bits of the weights | groups | memory [MiB] | accuracy [%] | loss | layers that mix |")
    print("|---|---|---|---|---|---|")
    for bits in BUDGETS:
        for groups in (1, 2, 4):
            flags = f"--method measured --search_space 2,3,4,6,8 --target_bits {bits:g} --channel_groups {groups}"
            plan, trainer, modules = prepared(shared, output, flags)
            trainer.finish()
            metrics = evaluate(trainer, plan)["validation"]
            mixed = sum(isinstance(module.formats[0], MixedFormat) for module in modules.values())
            told = f"{trainer.cost:.5f} | {100 * metrics['accuracy']:.2f} | {metrics['loss']:.3f}"
            print(f"| {bits:g} | {groups} | {told} | {mixed} of {len(modules)} |", flush=True)


TABLES = {"orders": order_table, "budgets": budget_table}


def main() -> None:
    """Print the tables in Markdown."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shared", type=Path, required=True, help="folder with data/ and models/")
    parser.add_argument("--tables", default=",".join(TABLES), help="comma list of the tables to print")
    arguments = parser.parse_args()
    print(date.today())
    with TemporaryDirectory() as output:
        for name in arguments.tables.split(","):
            TABLES[name](arguments.shared.resolve(), output)


if __name__ == "__main__":
    main()
