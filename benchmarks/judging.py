"""What judging many assignments takes, and how far few examples can be trusted; for benchmarks/RESULTS.md.

    python -m benchmarks.judging [--rounds 3]                            # passes played back, over all of them run
    python -m benchmarks.judging --shared ../shared [--rows mrpc]        # sensitivities from samples of the examples

The first compares forward passes over an assignment and all that differ from it in one layer. The second takes the
model, data and budget of rows of benchmarks.quality, measures the divergence of every decision's formats on held-out
TRAINING examples, and asks how much more the choice of an exact knapsack costs when it sees a sample of them only.
"""

from __future__ import annotations

import argparse
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from benchmarks.quality import ROOT, rows, searching
from benchmarks.step_time import FORMATS, model_and_batch
from benchmarks.timing import ratio, take_turns
from policy.allocators import least_degradation
from policy.budget import Budget
from policy.space import build_space
from quant.convert import calibrate, quantize_model, set_formats
from quant.quant_utils import use_compiled
from quant.quantizers.prefix_cache import prefix_cached
from trainer.search.sensitivity import measure_sensitivity
from trainer.training.distillation import class_logits, divergence

TEMPERATURES, POWERS = (1.0, 2.0, 4.0, 8.0), (1.0, 0.5)
"""what logits are divided by; of the mean over examples"""
SIZES = (16, 32, 64)
DRAWS = 40
SHRUNK = {"resnet20": 5, "bert6x384": 2}
"""model -> how many times smaller than a training batch a judging batch is"""


def played_back(name: str, rounds: int) -> str:
    """The line of a model: assignments, and seconds of both ways."""
    model, batch, _ = model_and_batch(name, SHRUNK[name])
    modules = quantize_model(model, formats=FORMATS)
    calibrate(model, modules, [batch])
    model.eval()
    space = build_space(list(modules), FORMATS)
    middle = [1] * space.num_decisions
    moved = [(*middle[:d], c, *middle[d + 1 :]) for d in range(space.num_decisions) for c in (0, 2)]
    choices = sorted([tuple(middle), *moved])

    @torch.no_grad()
    def every_layer() -> list[Tensor]:
        found = []
        for choice in choices:
            set_formats(modules, space.assignment(choice))
            found.append(model(**batch)["logits"])
        return found

    @torch.no_grad()
    def from_the_difference() -> list[Tensor]:
        found = []
        with prefix_cached(modules) as cache:
            for choice in choices:
                set_formats(modules, space.assignment(choice))
                cache.restart()
                found.append(model(**batch)["logits"])
        return found

    if not all(torch.equal(a, b) for a, b in zip(every_layer(), from_the_difference(), strict=True)):
        raise SystemExit(f"{name}: what is played back differs")
    seconds = take_turns({"run": every_layer, "played": from_the_difference}, rounds, warm_up=1)
    plain, played = (float(np.median(seconds[way])) for way in ("run", "played"))
    return f"| {name} | {len(choices)} | {plain:.2f} | {played:.2f} | {ratio(seconds, 'played', 'run'):.2f} |"


def divergences(name: str, shared: Path, output: Path, examples: int) -> tuple[NDArray[np.float64], Budget]:
    """From a row's float weights, at each temperature, of every decision, choice and example; the row's budget.

    The former are (temperatures, decisions, choices, examples).
    """
    trainer = searching(name, shared, output, 0, "judging-s0")
    modules = trainer.modules
    calibrate(trainer.model, modules, trainer.calibration.batches())
    held_out = torch.utils.data.Subset(trainer.evaluator.dataset, range(min(examples, len(trainer.evaluator.dataset))))
    seen: list[Tensor] = []

    def note(reference: Tensor, now: Tensor) -> Tensor:
        seen.append(torch.stack([t**2 * divergence(reference / t, now / t) for t in TEMPERATURES]))
        return seen[-1][0]

    def logits(model: Any, batch: Any) -> Tensor:
        found = class_logits(model(**batch), batch)
        assert found is not None, "every row's task has classes"
        return found

    for batch in trainer.batches_of(held_out):
        measure_sensitivity(trainer.model, modules, trainer.space, [batch], logits, note)
    pairs = trainer.space.num_decisions * trainer.space.num_choices
    whole = torch.cat([torch.stack(seen[i : i + pairs], 1) for i in range(0, len(seen), pairs)], 2).double().numpy()
    return whole.reshape(
        len(TEMPERATURES), trainer.space.num_decisions, trainer.space.num_choices, -1
    ), trainer.target.limits


def excess(
    seen: NDArray[np.float64], truth: NDArray[np.float64], budget: Budget, size: int, power: float, generator: Any
) -> float:
    """How much more than the best, in %, the choices from samples of `seen` cost, by the mean of `truth`.

    Both (decisions, choices, examples).
    """
    everything, decisions = truth.mean(2), np.arange(len(truth))
    best = everything[decisions, least_degradation(everything, budget)].sum()
    lost = []
    for _ in range(DRAWS if size < seen.shape[2] else 1):
        sample = seen[:, :, generator.choice(seen.shape[2], size, replace=False)]
        effect = (sample**power).mean(2) ** (1 / power)
        lost.append(everything[decisions, least_degradation(effect, budget)].sum() / best - 1)
    return 100 * float(np.mean(lost))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--shared", type=Path, help="folder with data/ and models/")
    parser.add_argument("--rows", default="resnet20-3,mrpc", help="comma list of rows of benchmarks.quality")
    parser.add_argument("--examples", type=int, default=192)
    parser.add_argument("--output_root_dir", type=Path, default=ROOT / "output" / "quality")
    arguments = parser.parse_args()
    if arguments.shared is None:
        use_compiled("auto")
        print("| model | assignments | every layer [s] | played back [s] | ratio |\n|---|---|---|---|---|")
        for name in SHRUNK:
            print(played_back(name, arguments.rounds), flush=True)
        return
    for name in arguments.rows.split(","):
        if name not in rows():
            parser.error(f"unknown row {name}; choices: {', '.join(rows())}")
        output = arguments.output_root_dir.resolve()
        seen, budget = divergences(name, arguments.shared.resolve(), output, arguments.examples)
        sizes = [*(size for size in SIZES if size < seen.shape[-1]), seen.shape[-1]]
        heads = " | ".join(f"{size} examples" for size in sizes)
        print(f"\n**{name}**\n\n| temperature | power | {heads} |\n" + "|---" * (len(sizes) + 2) + "|")
        for (temperature, own), power in product(zip(TEMPERATURES, seen, strict=True), POWERS):
            generator = np.random.default_rng(0)
            told = (f"{excess(own, seen[0], budget, size, power, generator):.1f}" for size in sizes)
            print(f"| {temperature:g} | {power:g} | {' | '.join(told)} |", flush=True)


if __name__ == "__main__":
    main()
