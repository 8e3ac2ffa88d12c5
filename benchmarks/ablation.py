"""What the parts of the search are worth, one changed at a time; for benchmarks/RESULTS.md.

    python -m benchmarks.ablation --shared ../shared [--row digits-3] [--variants "default;--distill 0.9"] [--seeds 0,1]

Every variant starts from the float weights of a row of benchmarks.quality, with its budget and steps. Some are flags of
a run; those that did not earn one (sandwich sampling, credit per layer, other temperatures) are built here. To choose
by: the loss of the last tenth of the steps, which is of training data, and the regret, of held-out training data. A run
that has its record is not run again.
"""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from datetime import date
from pathlib import Path
from statistics import mean, stdev
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from torch import Tensor

from benchmarks.quality import ROOT, common_flags, loss_at_the_end, rows, run, score
from eval.config.parser import parse
from trainer.search.search_state import Search


@contextmanager
def start_entropy(share: float) -> Iterator[None]:
    """The policy starts with another share of a uniform one's entropy: a colder or hotter prior."""
    with patch("trainer.search.sensitivity.PRIOR_ENTROPY", share):
        yield


@contextmanager
def changed(**settings: Any) -> Iterator[None]:
    """Settings of the search that have no flag."""
    from eval.run import trainer as run_trainer

    plain = run_trainer.search_settings
    with patch.object(run_trainer, "search_settings", lambda config: replace(plain(config), **settings)):
        yield


@contextmanager
def sandwich() -> Iterator[None]:
    """In the delay, the widest and the narrowest formats take turns with the draws (BigNAS, arXiv 2003.11142)."""
    plain = Search.draws

    def draws(self: Search, step: int) -> Tensor:
        table = self.budget.tables[0]
        ends = {0: table.argmax(1), 1: table.argmin(1)}
        if step < self.phases.delay and step % 3 in ends:
            return torch.from_numpy(ends[step % 3])[None]
        return plain(self, step)

    with patch.object(Search, "draws", draws):
        yield


@contextmanager
def layer_credit() -> Iterator[None]:
    """Credit per layer: an additive model of quality, fitted to all draws so far by ridge regression, is the baseline.

    Its expectation is learned from by its exact gradient, and what it leaves unexplained by sampling.
    """
    plain = Search.learn
    seen: dict[int, list[tuple[np.ndarray, float]]] = {}

    def learn(self: Search, choices: Tensor, qualities: Sequence[float], step: int) -> dict[str, Any]:
        decisions, formats = self.budget.tables[0].shape
        pairs = seen.setdefault(id(self), [])
        taken = [np.eye(formats)[choice.numpy()] for choice in choices]
        theta = np.zeros(decisions * formats)
        if pairs:
            x = np.array([difference for difference, _ in pairs])
            theta = np.linalg.solve(x.T @ x + np.eye(len(theta)), x.T @ np.array([gain for _, gain in pairs]))
        pairs.append(((taken[0] - taken[1]).ravel(), qualities[0] - qualities[1]))
        model = theta.reshape(decisions, formats)
        rest = [min(max(0.5 + q - (model * t).sum(), 1e-6), 1.0) for q, t in zip(qualities, taken, strict=True)]
        penalty, beta = self._expected_penalty, self.config.cost_beta

        def with_model() -> Tensor:
            return penalty() - (self.policy.probabilities() * torch.from_numpy(model)).sum() / beta

        with patch.object(self, "_expected_penalty", with_model):
            return plain(self, choices, rest, step) | {"quality": float(np.mean(qualities))}

    with patch.object(Search, "learn", learn):
        yield


BUILT_HERE: dict[str, Callable[[], AbstractContextManager[None]]] = {
    "sampled cost": lambda: changed(cost_gradient="sampled"),
    "rewards on whole batches": lambda: changed(reward_share=1.0),
    "start entropy 0.05": lambda: start_entropy(0.05),
    "start entropy 0.5": lambda: start_entropy(0.5),
    "sandwich": sandwich,
    "credit per layer": layer_credit,
}
VARIANTS = (
    "default",
    "--settle_fraction 0.5",
    "--settle_fraction 0.9",
    "--reward_draws 4",
    "--delay_steps 4",
    "--max_entropy_beta 0.01",
    "--policy_prior fisher",
    "--policy_prior hawq_v2",
    "--policy_prior none",
    "--distill 0.9",
    *BUILT_HERE,
    "--recipe fliqs",
)


def finish(variant: str, flags: list[str], name: str) -> tuple[dict[str, Any], Path]:
    """The record and the folder of a run, after running it if there is no record yet."""
    if variant not in BUILT_HERE:
        return run([*flags, *([] if variant == "default" else shlex.split(variant))], name)
    from eval.eval_run import run as run_here

    config = parse([*flags, "--run_id", name])
    if not (config.run_folder / "result.json").exists():
        with BUILT_HERE[variant]():
            run_here(config)
    return run(flags, name)


def line(variant: str, found: list[tuple[dict[str, Any], Path]]) -> str:
    """The variant's row of the table."""
    records = [record for record, _ in found]
    scores = [score(record) for record in records]
    ends = mean(loss_at_the_end(folder) for _, folder in found)
    used = mean(record["cost"] / record["cost_target"] for record in records)
    regrets = [100 * contest["certificate"]["regret"] for record in records if (contest := record.get("contest"))]
    spread = f" ± {stdev(scores):.2f}" if len(scores) > 1 else ""
    regret = f"{max(regrets):.2f}" if regrets else ""
    return f"| {variant} | {ends:.4f} | {regret} | {mean(scores):.2f}{spread} | {used:.2f} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shared", type=Path, required=True, help="folder with data/ and models/")
    parser.add_argument("--row", default="digits-3", choices=rows(), metavar="ROW")
    parser.add_argument("--variants", default=";".join(VARIANTS), help="list with semicolons between")
    parser.add_argument("--seeds", default="0,1,2,3,4")
    parser.add_argument("--output_root_dir", type=Path, default=ROOT / "output" / "quality")
    arguments = parser.parse_args()
    shared, output = arguments.shared.resolve(), arguments.output_root_dir.resolve()
    row = rows()[arguments.row]
    flags = [*common_flags(arguments.row, row, shared, output), *shlex.split(row.budget), "--search", "--quiet"]
    seeds = arguments.seeds.split(",")
    print(f"{arguments.row}, seeds {' '.join(seeds)}\n")
    print("| variant | training loss at the end | worst regret [points] | accuracy [%] | share of the budget |")
    print("|---|---|---|---|---|")
    for variant in arguments.variants.split(";"):
        slug = "".join(letter if letter.isalnum() or letter == "." else "-" for letter in variant)
        runs = [finish(variant, [*flags, "--seed", seed], f"part-{slug}-s{seed}") for seed in seeds]
        print(line(variant, runs), flush=True)
    print(f"\n{date.today()}")


if __name__ == "__main__":
    main()
