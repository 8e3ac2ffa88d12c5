"""What is known of the runs before they start: their steps, budget and cost range, and about how long they take.

Every run is planned here once, with its data and its model: whatever is wrong ends the launch before Ray starts.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any

from eval.config.run_config import DataFlags, LayerFlags

if TYPE_CHECKING:
    from eval.config.run_config import RunConfig
    from eval.run.plan import Plan

_SHAPING = [entry.name for group in (DataFlags, LayerFlags) for entry in fields(group)]
_SHAPING += ["load_model_path", "fuse_groups"]
"""what data, model and layers depend on"""
PASS_SHARE = 1 / 3
"""a forward pass takes about a third of a training step"""
REPLAYED_SHARE = 0.6
"""of a forward pass, where what comes before the first changed layer is played back; benchmarks/RESULTS.md"""
JUDGED_BESIDE = 40
"""assignments that a contest judges beside the neighbours of the best: proposals, samples, the certificate's"""


@dataclass(frozen=True)
class Facts:
    """Of one run."""

    steps: int
    cost_range: tuple[float, float]
    """[MiB or GBOPs]"""
    cost_target: float | None
    seconds: float | None = None
    """about how long it takes on this machine; None where it was not measured"""
    outside_cost: str = ""
    """the matrices that stay in float, and how much they are; empty: none"""
    held_out: int = 0
    """training examples that a search judges on"""
    found: tuple[str, ...] = ()
    """lines that tell what data and model are, where that was asked for"""


def learn(runs: Mapping[str, RunConfig], measure: bool = False) -> dict[str, Facts]:
    """The facts of every run, by its name in the launch. Raises UserError for data, models, targets that do not work.

    Runs that differ in training and search flags alone share one look at data and model.
    """
    from eval.run.plan import make_plan
    from eval.run.plan_summary import summary_of

    facts: dict[str, Facts] = {}
    plans: dict[Any, tuple[Plan, float | None]] = {}
    for name, run in runs.items():
        key = tuple(getattr(run, name) for name in _SHAPING)
        if key not in plans:
            plans.clear()  # one model in memory at a time: runs of a kind stand together
            plan = make_plan(run)
            plans[key] = plan, _seconds_per_step(plan) if measure else None
        plan, seconds = plans[key]
        own = replace(plan, config=run)
        facts[name] = replace(_facts(own, seconds), found=summary_of(own) if measure else ())
    return facts


def _facts(plan: Plan, seconds_per_step: float | None) -> Facts:
    from eval.run.plan import budget, check_phases, search_space
    from eval.run.trainer import teacher_share
    from quant.analysis.float_share import float_share

    run = plan.config
    check_phases(run)
    cost_type: Any = run.cost_type
    steps = _steps(plan)
    seconds = None
    if seconds_per_step is not None:
        passes = _passes(plan, steps) if run.method == "search" else 0.0
        passes += steps if teacher_share(plan) else 0
        seconds = seconds_per_step * (steps + passes * PASS_SHARE)
    reach = search_space(plan).cost_range(plan.profiles, cost_type)
    outside = float_share(plan.bundle.model, plan.layers)
    held = held_out(plan) if run.method == "search" else 0
    return Facts(steps, reach, budget(plan), seconds, str(outside) if outside.left else "", held)


def _passes(plan: Plan, steps: int) -> float:
    """Forward passes over a step's examples that a search takes beside training: rewards, sensitivities, contests."""
    from eval.run.plan import search_settings, search_space
    from trainer.search.evaluator import LEAST_MEASURED
    from trainer.search.search_state import Phases, examples_to_judge, examples_to_measure

    run, config, space = plan.config, search_settings(plan.config), search_space(plan)
    phases = Phases.of(config, steps)
    batch = run.train_batch_size * run.gradient_accumulation_steps
    neighbours = 2 * space.num_decisions
    judged = 0.0
    if config.policy_prior == "measured":
        pairs = space.num_decisions * space.num_choices
        judged += pairs * examples_to_measure(steps, batch, pairs, LEAST_MEASURED, config.measure_share)
    if config.contest:
        targets = max(1, len(run.target_list))
        judged += targets * (neighbours + JUDGED_BESIDE) * examples_to_judge(steps, batch, neighbours)
    rewards = config.reward_draws * config.reward_share * (phases.settle - phases.delay)
    return rewards + REPLAYED_SHARE * judged / batch


def _steps(plan: Plan) -> int:
    """Optimizer steps of the run, counted as transformers' Trainer counts them."""
    run = plan.config
    if run.max_steps >= 0:
        return run.max_steps
    examples = len(plan.prepared.train)
    if run.method == "search":
        examples -= held_out(plan)
    batches = math.ceil(examples / run.train_batch_size)
    return math.ceil(run.num_train_epochs * max(1, math.ceil(batches / run.gradient_accumulation_steps)))


def held_out(plan: Plan) -> int:
    """Training examples that a search keeps apart for the reward."""
    return max(1, round(len(plan.prepared.train) * plan.config.search_fraction))


def _seconds_per_step(plan: Plan) -> float:
    """A float step forward and backward on this machine, the second of two: the first one allocates."""
    train, model = plan.prepared.train, plan.bundle.model
    batch = plan.prepared.data_collator([train[i] for i in range(min(plan.config.train_batch_size, len(train)))])
    model.train()
    seconds = 0.0
    for _ in range(2):
        started = time.monotonic()
        model(**batch).loss.backward()
        seconds = time.monotonic() - started
    model.zero_grad()
    return seconds * plan.config.gradient_accumulation_steps
