"""What tells before the training how well an assignment will train; for benchmarks/RESULTS.md.

    python -m benchmarks.foresight --shared ../shared [--rows resnet20-3] [--assignments 12] [--steps 60] [--seed 0]

Takes the model, data and budget of rows of benchmarks.quality. Each of some assignments around the choice of `measured`
is judged on held-out TRAINING examples under the float weights, and then trained from these, all on the same batches.
Told is the correlation of what each criterion says with the loss of the last third of the steps.
"""

from __future__ import annotations

import argparse
import copy
from contextlib import nullcontext
from itertools import islice
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.stats import spearmanr

from benchmarks.contest import around
from benchmarks.quality import parse_for_rows, searching
from quant.convert import calibrate, set_formats
from trainer.reinforce_trainer import ReinforceTrainer
from trainer.search.baselines import allocator
from trainer.training.batch_norm import statistics_of_batch
from trainer.training.distillation import class_logits, divergence

TEMPERATURES = (1.0, 4.0)


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


def trained(trainer: ReinforceTrainer, choice: tuple[int, ...], batches: list[Any]) -> float:
    """The loss of the last third of as many steps as there are batches."""
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


def measured(name: str, arguments: argparse.Namespace) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Of a row's assignments: what each criterion says, (assignments, 2 x criteria), and the loss after training."""
    seed = arguments.seed
    trainer = searching(name, arguments.shared, arguments.output_root_dir, seed, f"foresight-s{seed}")
    calibrate(trainer.model, trainer.modules, trainer.calibration.batches())
    chosen = tuple(allocator("measured", trainer.evaluator, seed)(trainer.target.limits))
    start = copy.deepcopy(trainer.model.state_dict())
    loader = trainer.get_train_dataloader()
    batches = [trainer._prepare_inputs(batch) for batch in islice(_again(loader), arguments.steps)]
    told, losses = [], []
    for choice in [chosen, *around(trainer, chosen, arguments.assignments - 1)]:
        trainer.model.load_state_dict(start)
        told.append([harm for own in (False, True) for harm in harms(trainer, choice, own)])
        losses.append(trained(trainer, choice, batches))
        print(" ".join(f"{value:.3f}" for value in (*told[-1], losses[-1])), flush=True)
    return np.array(told), np.array(losses)


def _again(loader: Any) -> Any:
    while True:
        yield from loader


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--assignments", type=int, default=12)
    parser.add_argument("--steps", type=int, default=60)
    arguments = parse_for_rows(parser, "resnet20-3")
    criteria = ["loss", *(f"divergence from float, temperature {t:g}" for t in TEMPERATURES)]
    for name in arguments.rows:
        told, losses = measured(name, arguments)
        print(f"\n**{name}**: {len(losses)} assignments, {arguments.steps} steps\n")
        print("| judged by | moving averages | the batch's statistics |\n|---|---|---|")
        for index, criterion in enumerate(criteria):
            pairs = [spearmanr(told[:, column], losses).statistic for column in (index, len(criteria) + index)]
            print(f"| {criterion} | {pairs[0]:.2f} | {pairs[1]:.2f} |")


if __name__ == "__main__":
    main()
