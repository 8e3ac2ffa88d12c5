"""What tells before the training how well an assignment will train; for benchmarks/RESULTS.md.

    python -m benchmarks.foresight --shared ../shared [--rows resnet20-3-apart] [--assignments 32]
        [--steps 40] [--seed 0]

Takes the model, data and budget of rows of benchmarks.quality. Half of the assignments are random ones that use the
budget, half change a few decisions of the choice of `measured`. Each is trained from the float weights, all on the same
batches; what is trained is kept on disk, so that an interrupted call goes on where it was. Each criterion says before
the training what an assignment loses. Told is its rank correlation with the loss of the last third of the steps.
"""

from __future__ import annotations

import argparse
import copy
import json
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.stats import rankdata

from benchmarks.contest import LEAST_USED, around
from benchmarks.quality import parse_for_rows, searching
from policy.allocators import random_choice
from quant.convert import calibrate, set_formats
from trainer.reinforce_trainer import ReinforceTrainer
from trainer.search.baselines import allocator, sensitivities
from trainer.training.atomic import write_json
from trainer.training.batch_norm import statistics_of_batch
from trainer.training.distillation import class_logits, divergence

TEMPERATURES = (1.0, 4.0)
RESAMPLES = 5000
"""Bootstrap samples of the assignments, for the interval of a correlation."""
KINDS = ("measured", "fisher")
"""Sensitivities of single decisions whose sum is a criterion."""

Choices = list[tuple[int, ...]]
Said = tuple[NDArray[np.float64], float]
"""What a criterion says of each choice, the smaller, the better, and the processor seconds that it took."""
Made = TypeVar("Made")


def drawn(trainer: ReinforceTrainer, count: int, seed: int) -> Choices:
    """Return `count` different choices: half random ones that use the budget, half around the choice of `measured`."""
    budget, generator = trainer.target.limits, np.random.default_rng(seed)
    chosen = tuple(allocator("measured", trainer.evaluator, seed)(budget))
    random: dict[tuple[int, ...], None] = {}
    while len(random) < count // 2:
        choice = tuple(random_choice(budget, generator))
        if budget.ratio(choice) >= LEAST_USED:
            random[choice] = None
    return [*random, chosen, *around(trainer, chosen, count - len(random) - 1)]


def trained(trainer: ReinforceTrainer, choice: tuple[int, ...], batches: list[Any]) -> float:
    """Return the loss of the last third of as many steps as there are batches."""
    set_formats(trainer.modules, trainer.space.assignment(choice))
    trainer.model.train()
    trainer.optimizer = None
    optimizer = trainer.create_optimizer()
    losses = []
    for batch in batches:
        loss = trainer.compute_loss(trainer.model, dict(batch))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return float(np.mean(losses[-len(losses) // 3 :]))


def trained_losses(
    trainer: ReinforceTrainer, arguments: argparse.Namespace, batches: list[Any], path: Path
) -> tuple[Choices, list[float]]:
    """Return the choices and the loss of each after training on the batches; `path` keeps what is done."""
    done = json.loads(path.read_text()) if path.exists() else {"choices": drawn_rows(trainer, arguments), "losses": []}
    choices, losses = [tuple(choice) for choice in done["choices"]], list(done["losses"])
    start = copy.deepcopy(trainer.model.state_dict())
    for choice in choices[len(losses) :]:
        trainer.model.load_state_dict(start)
        losses.append(trained(trainer, choice, batches))
        write_json(path, {"choices": choices, "losses": losses})
        print(f"trained {len(losses)} of {len(choices)}: loss {losses[-1]:.3f}", flush=True)
    trainer.model.load_state_dict(start)
    return choices, losses


def drawn_rows(trainer: ReinforceTrainer, arguments: argparse.Namespace) -> list[list[int]]:
    """Return the choices of a row as they are kept on disk."""
    return [[int(index) for index in choice] for choice in drawn(trainer, arguments.assignments, arguments.seed)]


def _again(loader: Any) -> Iterator[Any]:
    while True:
        yield from loader


# ------------------------------------------------------ criteria


@torch.no_grad()
def harms(trainer: ReinforceTrainer, choice: tuple[int, ...], own_statistics: bool) -> list[float]:
    """Of a choice on all held-out examples: the loss, and the divergence from the teacher at each temperature."""
    assert trainer.teacher is not None
    set_formats(trainer.modules, trainer.space.assignment(choice))
    trainer.model.eval()
    found: list[list[float]] = []
    for batch in trainer.batches_of(trainer.evaluator.dataset):
        models = (trainer.model, trainer.teacher.model)
        contexts = [statistics_of_batch(m, batch) if own_statistics else nullcontext() for m in models]
        with contexts[0], contexts[1]:
            known, logits = trainer.teacher.answers(batch), class_logits(trainer.model(**batch), batch)
        assert known is not None and logits is not None
        away = [t**2 * float(divergence(known / t, logits / t).mean()) for t in TEMPERATURES]
        found.append([float(torch.nn.functional.cross_entropy(logits, batch["labels"])), *away])
    return np.mean(found, axis=0).tolist()


def told(trainer: ReinforceTrainer, choices: Choices, seed: int) -> dict[str, Said]:
    """Return what each criterion says."""
    found: dict[str, Said] = {}
    for kind in KINDS:
        effects, seconds = timed(lambda kind=kind: sensitivities(kind, trainer.evaluator, seed))
        found[f"{kind}, summed"] = sums(effects, choices), seconds
    names = ["loss", *(f"divergence from float, temperature {t:g}" for t in TEMPERATURES)]
    for own, by in ((False, "moving averages"), (True, "the batch's statistics")):
        values, seconds = timed(lambda own=own: np.array([harms(trainer, choice, own) for choice in choices]))
        found |= {f"{name}, {by}": (column, seconds) for name, column in zip(names, values.T, strict=True)}
    return found


def timed(make: Callable[[], Made]) -> tuple[Made, float]:
    """Return what a function makes, and its processor seconds."""
    since = time.process_time()
    return make(), time.process_time() - since


def sums(table: NDArray[np.float64], choices: Choices) -> NDArray[np.float64]:
    """Return the sum of a table's entries for each choice."""
    return np.array([table[np.arange(len(table)), list(choice)].sum() for choice in choices])


# ------------------------------------------------------ report


def correlations(values: NDArray[np.float64], losses: Sequence[float], seed: int = 0) -> NDArray[np.float64]:
    """Return the rank correlation (Spearman) of (choices,) values with the losses: first of all, then of resamples.

    The same seed draws the same resamples for every criterion, so that differences between criteria are paired.
    """
    rows = np.random.default_rng(seed).integers(len(losses), size=(RESAMPLES, len(losses)))
    rows = np.concatenate([np.arange(len(losses))[None], rows])
    ranks = [rankdata(np.asarray(series)[rows], axis=1) for series in (values, losses)]
    left, right = (rank - rank.mean(axis=1, keepdims=True) for rank in ranks)
    together = np.sqrt((left**2).sum(1) * (right**2).sum(1))
    return (left * right).sum(1) / np.where(together > 0, together, np.inf)


def with_interval(found: NDArray[np.float64]) -> str:
    """Return an estimate, the first entry, with the interval that holds 95 % of its resamples, the others."""
    low, high = np.quantile(found[1:], [0.025, 0.975])
    return f"{found[0]:.2f} [{low:.2f}, {high:.2f}]"


def table(said: dict[str, Said], losses: Sequence[float], half: int) -> list[str]:
    """Return the lines of Markdown of a row; the first `half` of the assignments are the random ones."""
    lines = [
        "| criterion | all assignments | ahead of the first | random ones | around `measured` | processor time [s] |",
        "|---|---|---|---|---|---|",
    ]
    first = correlations(next(iter(said.values()))[0], losses)
    for name, (values, seconds) in said.items():
        own = correlations(values, losses)
        parts = [correlations(values[part], losses[part])[0] for part in (slice(half), slice(half, None))]
        ahead = with_interval(own - first)
        lines.append(f"| {name} | {with_interval(own)} | {ahead} | {parts[0]:.2f} | {parts[1]:.2f} | {seconds:.1f} |")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--assignments", type=int, default=32)
    parser.add_argument("--steps", type=int, default=40)
    arguments = parse_for_rows(parser, "resnet20-3-apart")
    for name in arguments.rows:
        lines = report(name, arguments)
        print("\n".join(lines), flush=True)


def report(name: str, arguments: argparse.Namespace) -> list[str]:
    """Return the lines of Markdown of a row, after training what is missing."""
    seed, output = arguments.seed, arguments.output_root_dir
    trainer = searching(name, arguments.shared, output, seed, f"foresight-s{seed}")
    calibrate(trainer.model, trainer.modules, trainer.calibration.batches())
    loader = trainer.get_train_dataloader()
    batches = [trainer._prepare_inputs(batch) for batch in islice(_again(loader), arguments.steps)]
    path = output / f"foresight-{name}-{arguments.assignments}x{arguments.steps}-s{seed}.json"
    choices, losses = trained_losses(trainer, arguments, batches, path)
    title = f"\n**{name}**: {len(losses)} assignments, {arguments.steps} steps, seed {seed}\n"
    return [title, *table(told(trainer, choices, seed), losses, len(choices) // 2)]


if __name__ == "__main__":
    main()
