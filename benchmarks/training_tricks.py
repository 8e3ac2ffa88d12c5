"""What tricks of training are worth, one at a time, for one method; for benchmarks/RESULTS.md.

    python -m benchmarks.training_tricks --shared ../shared [--row resnet20-3] [--method "uniform int3"]
        [--tricks "teacher alone;scales of weights x10"] [--seeds 0,1,2] [--held_out 1017]

Each run is one of benchmarks.quality with a trick that the trainer itself does not know. `--held_out N` evaluates on N
training examples, which are then not trained on: to choose tricks by, without a look at validation data. A run that has
its record is not run again.
"""

from __future__ import annotations

import argparse
import math
import shlex
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from datetime import date
from pathlib import Path
from statistics import mean
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.quality import common_flags, interval, loss_at_the_end, methods_of, parse_for_rows, rows, run, score
from eval.config.parser import parse
from eval.report.paired import share_right
from quant.convert import set_formats
from quant.formats import Format, IntFormat
from quant.quant_module import QuantModule
from quant.quantizers.quantizer import Quantizer, Rounder
from trainer.reinforce_trainer import ReinforceTrainer
from trainer.training.distillation import TEMPERATURE, Teacher, divergence

Schedule = Callable[[float], float]
"""Share of the steps that are done, in [0, 1] -> value of a setting."""
MOMENTUM = 0.01
"""Of the averages of oscillations, as in arXiv 2203.11086."""


@contextmanager
def at_each_step(action: Callable[[ReinforceTrainer, float], None]) -> Iterator[None]:
    """Before each step, and once after the last one, call `action` with the trainer and the share of the steps done."""
    begin, finish = ReinforceTrainer._begin_step, ReinforceTrainer.finish

    def acting(plain: Callable[[ReinforceTrainer], None], acts_first: bool) -> Callable[[ReinforceTrainer], None]:
        def method(self: ReinforceTrainer) -> None:
            done = self.state.global_step / max(self.state.max_steps, 1)
            if acts_first:
                action(self, done)
            plain(self)
            if not acts_first:
                action(self, done)

        return method

    with (
        patch.object(ReinforceTrainer, "_begin_step", acting(begin, False)),
        patch.object(ReinforceTrainer, "finish", acting(finish, True)),
    ):
        yield


# ------------------------------------------------------ the teacher


@contextmanager
def taught(share: Schedule, temperature: Schedule = lambda done: TEMPERATURE) -> Iterator[None]:
    """The teacher's share of the loss and its temperature follow schedules."""
    now = [0.0]

    def loss(self: Teacher, loss: Tensor, logits: Tensor, batch: Mapping[str, Any], counted: Any) -> Tensor:
        reference = self.answers(batch)
        assert reference is not None
        t, own = temperature(now[0]), share(now[0])
        distance = t**2 * divergence(reference / t, logits / t).sum() / (len(logits) if counted is None else counted)
        return (1 - own) * loss + own * distance

    def remember(trainer: ReinforceTrainer, done: float) -> None:
        now[0] = done

    with at_each_step(remember), patch.object(Teacher, "loss", loss):
        yield


# ------------------------------------------------------ rates of scales


@contextmanager
def scale_rates(weights: float = 1.0, inputs: float = 1.0) -> Iterator[None]:
    """The gradients of learned scales are multiplied: under SGD the same as learning rates of their own."""
    plain = Quantizer._rounding_in

    def rounding(self: Quantizer, format: Format, x: Tensor) -> Rounder | None:
        rounder = plain(self, format, x)
        factor = inputs if self.batched else weights
        return None if rounder is None else replace(rounder, gradient_scale=rounder.gradient_scale * factor)

    with patch.object(Quantizer, "_rounding_in", rounding):
        yield


# ------------------------------------------------------ oscillations of weights


class Oscillations:
    """Follows the integer codes of one weight, and freezes those that go back and forth (arXiv 2203.11086).

    Args:
        codes: the codes at first.
    """

    def __init__(self, codes: Tensor) -> None:
        self.codes, self.average, self.held = codes, codes.clone(), codes
        self.direction, self.rate = torch.zeros_like(codes), torch.zeros_like(codes)
        self.frozen = torch.zeros_like(codes, dtype=torch.bool)

    def see(self, codes: Tensor, threshold: float) -> None:
        """Take in the codes after a step; from now on `frozen` ones are `held`."""
        moved = codes - self.codes
        self.rate.lerp_((moved * self.direction < 0).float(), MOMENTUM)
        self.average.lerp_(codes, MOMENTUM)
        newly = (self.rate > threshold) & ~self.frozen
        self.held = torch.where(newly, self.average.round(), self.held)
        self.frozen |= newly
        self.direction = torch.where(moved != 0, moved.sign(), self.direction)
        self.codes = torch.where(self.frozen, self.held, codes)


def integer_weights(trainer: ReinforceTrainer) -> Iterator[tuple[str, QuantModule, Rounder]]:
    """Layers whose weights are integers under the final assignment, with what rounds their weights."""
    for name, module in trainer.modules.items() if trainer._fine_tuning else ():
        if isinstance(module.weight_quantizer.format, IntFormat):
            rounder = module.weight_quantizer.rounding(module.weight)
            if rounder is not None and rounder.scale is not None:
                yield name, module, rounder


def cosine(start: float, end: float, done: float) -> float:
    """A value that goes from `start` to `end` along half a wave."""
    return end + (start - end) * (1 + math.cos(math.pi * min(max(done, 0.0), 1.0))) / 2


@contextmanager
def frozen_oscillations(first: float, last: float) -> Iterator[None]:
    """Weights that oscillate more often than a threshold, which falls from `first` to `last`, keep their code."""
    seen: dict[str, Oscillations] = {}

    @torch.no_grad()
    def freeze(trainer: ReinforceTrainer, done: float) -> None:
        for name, module, rounder in integer_weights(trainer):
            codes = (rounder.values(module.weight) / rounder.scale).round()
            state = seen.setdefault(name, Oscillations(codes))
            state.see(codes, cosine(first, last, done))
            module.weight.copy_(torch.where(state.frozen, state.held * rounder.scale, module.weight))
        if done == 1 and seen:
            share = mean(float(state.frozen.float().mean()) for state in seen.values())
            print(f"frozen, mean over the layers: {share:.2%} of the weights", flush=True)

    with at_each_step(freeze):
        yield


@contextmanager
def dampened_oscillations(last: float, from_done: float = 0.25) -> Iterator[None]:
    """Pull weights to the middle of their step, by a loss whose factor grows from 0 to `last`."""
    now = [0.0]
    plain = ReinforceTrainer.compute_loss

    def remember(trainer: ReinforceTrainer, done: float) -> None:
        now[0] = done

    def with_pull(
        self: ReinforceTrainer, model: nn.Module, inputs: Any, return_outputs: bool = False, **counted: Any
    ) -> Any:
        loss, outputs = plain(self, model, inputs, True, **counted)
        if model.training and now[0] > from_done:
            factor = cosine(0.0, last, (now[0] - from_done) / (1 - from_done))
            loss = loss + factor * sum(distance(module, rounder) for _, module, rounder in integer_weights(self))
        return (loss, outputs) if return_outputs else loss

    with at_each_step(remember), patch.object(ReinforceTrainer, "compute_loss", with_pull):
        yield


def distance(module: QuantModule, rounder: Rounder) -> Tensor:
    """Squared distance of a weight from its rounded values, within the grid; the mean over a kernel's positions."""
    weight, rounded = module.weight, rounder.values(module.weight.detach())
    assert rounder.scale is not None
    largest = rounded.abs().amax(dim=tuple(range(1, rounded.dim())), keepdim=True)
    apart = (rounded - weight).square() * (weight.detach().abs() <= largest + rounder.scale.detach() / 2)
    return apart.sum() / math.prod(weight.shape[2:])


# ------------------------------------------------------ formats of the first steps


@contextmanager
def wide_first(share: float, mixed: bool = False) -> Iterator[None]:
    """The first steps train in the widest formats, or each layer at random in these and its own (`mixed`)."""
    generator = np.random.default_rng(0)

    def widen(trainer: ReinforceTrainer, done: float) -> None:
        if trainer.assignment is None:
            return
        wide = {
            layer: max(decision.choices, key=lambda pair: pair[0].bits)
            for decision in trainer.space.decisions
            for layer in decision.layers
            if done < share and (not mixed or generator.random() < 0.5)
        }
        set_formats(trainer.modules, {**trainer.assignment, **wide})

    with at_each_step(widen):
        yield


TRICKS: dict[str, Callable[[], AbstractContextManager[None]]] = {
    "none": nullcontext,
    "teacher alone": lambda: taught(lambda done: 1.0),
    "temperature 1": lambda: taught(lambda done: 0.9, lambda done: 1.0),
    "temperature 2": lambda: taught(lambda done: 0.9, lambda done: 2.0),
    "temperature 4 to 1": lambda: taught(lambda done: 0.9, lambda done: 4 - 3 * done),
    "share 1 to 0.5": lambda: taught(lambda done: 1 - done / 2),
    "scales of weights x10": lambda: scale_rates(weights=10.0),
    "scales of weights x0.1": lambda: scale_rates(weights=0.1),
    "scales of inputs x10": lambda: scale_rates(inputs=10.0),
    "scales of inputs x0.1": lambda: scale_rates(inputs=0.1),
    "freezing": lambda: frozen_oscillations(0.1, 0.011),
    "dampening": lambda: dampened_oscillations(0.1),
    "wide for a quarter": lambda: wide_first(0.25),
    "wide for half": lambda: wide_first(0.5),
    "mixed with wide for a quarter": lambda: wide_first(0.25, mixed=True),
    "mixed with wide for half": lambda: wide_first(0.5, mixed=True),
}


# ------------------------------------------------------ runs


def held_out_data(source: Path, folder: Path, count: int) -> Path:
    """Write data whose test file is a part of the training file; return its folder."""
    import pyarrow.parquet as pq

    folder.mkdir(parents=True, exist_ok=True)
    table = pq.read_table(source / "train-00000-of-00001.parquet")
    order = np.random.default_rng(7).permutation(len(table))
    for split, chosen in (("test", order[:count]), ("train", order[count:])):
        pq.write_table(table.take(np.sort(chosen)), folder / f"{split}-00000-of-00001.parquet")
    return folder


def finish(trick: str, flags: list[str], name: str) -> tuple[dict[str, Any], Path]:
    """The record and the folder of a run, after running it if there is no record yet."""
    from eval.eval_run import run as run_here

    config = parse([*flags, "--run_id", name])
    if not (config.run_folder / "result.json").exists():
        with TRICKS[trick]():
            run_here(config)
    return run(flags, name)


def line(trick: str, found: Sequence[tuple[dict[str, Any], Path]], plain: Sequence[tuple[dict[str, Any], Path]]) -> str:
    """The trick's row of the table."""
    scores = [score(record) for record, _ in found]
    ours, theirs = (share_right([folder for _, folder in runs]) for runs in (found, plain))
    assert ours is not None and theirs is not None, "every row's task has classes"
    ahead = "" if trick == "none" else interval([[100 * (ours - theirs)]])
    loss = mean(score(record, metric="loss") for record, _ in found)
    end = mean(loss_at_the_end(folder) for _, folder in found)
    shown = " / ".join(f"{value:.2f}" for value in scores)
    return f"| {trick} | {shown} | {mean(scores):.2f} | {ahead} | {loss:.4f} | {end:.4f} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--method", default="uniform int3", help="a method of the row")
    parser.add_argument("--tricks", default=";".join(TRICKS), help="list with semicolons between")
    parser.add_argument("--seeds", default="0")
    parser.add_argument("--held_out", type=int, default=0, help="training examples to evaluate on; 0: the test file")
    arguments = parse_for_rows(parser, "resnet20-3")
    seeds, shared, output = arguments.seeds.split(","), arguments.shared, arguments.output_root_dir
    for name in arguments.rows:
        row = rows()[name]
        flags = [*common_flags(name, row, shared, output), *shlex.split(methods_of(row)[arguments.method]), "--quiet"]
        if arguments.held_out:
            place = flags.index("--data_dir") + 1
            flags[place] = str(held_out_data(Path(flags[place]), output / f"{name}-cut", arguments.held_out))
        print(f"{name}, {arguments.method}, seeds {' '.join(seeds)}, held out {arguments.held_out}\n")
        print("| trick | accuracy [%] | mean | ahead [points] | loss | training loss at the end |")
        print("|---|---|---|---|---|---|", flush=True)
        runs: dict[str, list[tuple[dict[str, Any], Path]]] = {}
        for trick in dict.fromkeys(["none", *arguments.tricks.split(";")]):
            slug = f"{trick} {arguments.method}{' cut' if arguments.held_out else ''}".replace(" ", "-")
            runs[trick] = [finish(trick, [*flags, "--seed", seed], f"trick-{slug}-s{seed}") for seed in seeds]
            print(line(trick, runs[trick], runs["none"]), flush=True)
    print(f"\n{date.today()}")


if __name__ == "__main__":
    main()
