"""Estimates of runs before they start: number of steps, budget, range of reachable costs and approximate duration.

Estimating a run loads its data and builds its model, so that invalid settings end the launch before Ray starts.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any

from eval.config.run_config import DataFlags, LayerFlags

if TYPE_CHECKING:
    from eval.config.run_config import RunConfig
    from eval.run.plan import Plan

_SHAPING = [entry.name for group in (DataFlags, LayerFlags) for entry in fields(group)]
_SHAPING += ["load_model_path", "fuse_groups", "fuse_experts", "rotate", "quantize_kv_cache"]
_SHAPING += ["cost_scope", "per_channel", "weight_symmetric", "per_token"]
"""Flags that the data, the model and its layers depend on. Runs with equal values share one `Plan`."""
PASS_SHARE = 1 / 3
"""Duration of a forward pass as a share of a training step."""
CACHED_PASS_SHARE = 0.6
"""Duration of a forward pass that reuses cached activations up to the first changed layer, as a share of a full one.

Measured in benchmarks/RESULTS.md.
"""
OTHER_CANDIDATES = 40
"""Assignments that the final selection evaluates besides neighbours of the best: proposals, samples, alternatives."""


@dataclass(frozen=True)
class RunEstimate:
    """Estimate of one run."""

    steps: int
    cost_range: tuple[float, float]
    """Lowest and highest cost of the search space [MiB or GBOPs]."""
    cost_target: float | None
    seconds: float | None = None
    """Approximate duration on this machine; None if not measured."""
    outside_cost: str = ""
    """Matrices that no cost counts and their share of the weights; empty if there are none."""
    held_out: int = 0
    """Number of training examples that a search holds out to evaluate assignments."""
    summary: tuple[str, ...] = ()
    """Lines that describe the data and the model; empty if not measured."""


def estimate_runs(runs: Mapping[str, RunConfig], measure: bool = False) -> dict[str, RunEstimate]:
    """Estimate every run of a launch.

    Runs that differ only in training and search flags share one plan.

    Args:
        runs: Runs by their names in the launch.
        measure: Also time a training step, and describe the data and the model.

    Returns:
        Estimates by the same names.

    Raises:
        UserError: The data or the model of a run cannot be loaded, or its budget cannot be met.
    """
    from eval.run.plan import make_plan
    from eval.run.plan_summary import summary_of

    estimates: dict[str, RunEstimate] = {}
    trains = any(run.max_steps != 0 for run in runs.values())
    plans: dict[Any, tuple[Plan, float | None]] = {}
    for name, run in runs.items():
        key = tuple(getattr(run, name) for name in _SHAPING)
        if key not in plans:
            plans.clear()  # keeps one model in memory; runs that share a plan follow each other
            plan = make_plan(run)
            # Without training, from a forward pass: the gradients of a large model may not fit into memory.
            seconds = (_seconds_per_step(plan) if trains else _seconds_per_pass(plan) / PASS_SHARE) if measure else None
            plans[key] = plan, seconds
        plan, seconds = plans[key]
        own = replace(plan, config=run)
        estimates[name] = replace(_estimate(own, seconds), summary=summary_of(own) if measure else ())
    return estimates


def _estimate(plan: Plan, seconds_per_step: float | None) -> RunEstimate:
    from eval.run.plan import budget, check_phases, count_steps, search_space
    from eval.run.trainer import teacher_share
    from quant.analysis.float_share import float_share
    from trainer.training.sampler import held_out_size

    run, examples = plan.config, len(plan.prepared.train)
    check_phases(run)
    cost_type: Any = run.cost_type
    held_out = held_out_size(examples, run.search_fraction) if run.method == "search" else 0
    steps = count_steps(run, examples - held_out)
    seconds = None
    if seconds_per_step is not None:
        passes = _passes(plan, steps) if run.method == "search" else 0.0
        passes += steps if teacher_share(plan) else 0
        passes += _untrained_passes(plan) if run.max_steps == 0 else 0.0
        seconds = seconds_per_step * (steps + passes * PASS_SHARE)
    reach = search_space(plan).cost_range(plan.profiles, cost_type)
    outside = float_share(plan.bundle.model, plan.layers)
    uncounted = str(outside) if outside.left and run.cost_scope == "searched" else ""
    return RunEstimate(steps, reach, budget(plan), seconds, uncounted, held_out)


def _passes(plan: Plan, steps: int) -> float:
    """Forward passes, in batches of a training step, that a search makes for rewards, sensitivities and selection."""
    from eval.run.plan import search_settings, search_space
    from trainer.search.evaluation_sizes import examples_to_evaluate, examples_to_measure
    from trainer.search.measured_pairs import measured_formats
    from trainer.search.search_state import Phases

    run, config, space = plan.config, search_settings(plan.config), search_space(plan)
    phases = Phases.of(config, steps)
    batch = run.train_batch_size * run.gradient_accumulation_steps
    neighbours = 2 * space.num_decisions
    evaluated = 0.0
    if config.policy_prior == "measured":
        pairs = space.num_decisions * measured_formats(space)
        measured = examples_to_measure(steps, batch, pairs, config.measure_share)
        evaluated += pairs * (config.sensitivity_examples or measured)
    if config.contest:
        targets = max(1, len(run.target_list))
        examples = config.sensitivity_examples or examples_to_evaluate(steps, batch, targets * neighbours)
        evaluated += targets * (neighbours + OTHER_CANDIDATES) * examples
    rewards = config.reward_draws * config.reward_share * (phases.settle - phases.delay)
    return rewards + CACHED_PASS_SHARE * evaluated / batch


def _untrained_passes(plan: Plan) -> float:
    """Forward passes, in batches of a training step, of a run without training: measuring, calibrating, evaluating.

    Passes of a method that computes gradients count with their backward pass. What chooses the ranges of weights is no
    pass and not part of it.
    """
    from eval.run.plan import search_settings, search_space
    from policy.hessian import MOST_DRAWS
    from trainer.search.evaluation_sizes import EvaluationSizes
    from trainer.search.measured_pairs import measured_formats
    from trainer.search.sensitivity import EIGEN_STEPS

    run, rows = plan.config, len(plan.prepared.train)
    examples = 0.0
    if run.chooses:
        space, settings = search_space(plan), search_settings(run)
        pairs = space.num_decisions * measured_formats(space)
        sizes = EvaluationSizes(
            *(rows, space.num_decisions, space.num_choices, run.eval_batch_size, 0, 1, settings.sensitivity_examples),
            measured=measured_formats(space),
        )
        few = sizes.to_evaluate(space.num_decisions * space.num_choices)
        examples += {
            "measured": CACHED_PASS_SHARE * pairs * sizes.to_measure(),
            "greedy": CACHED_PASS_SHARE * pairs * sizes.to_measure(),
            "fisher": (1 / PASS_SHARE + space.num_choices) * few,
            "hawq_v2": 2 / PASS_SHARE * MOST_DRAWS * few,
            "qbert": 2 / PASS_SHARE * EIGEN_STEPS * few,
            "exhaustive": CACHED_PASS_SHARE * float(space.num_choices) ** space.num_decisions * sizes.to_evaluate(),
        }.get(str(run.method), 0.0)
    if plan.formats:
        examples += 2 * min(run.calibration_samples or 8 * run.train_batch_size, rows)  # again for the chosen formats
    with_float = plan.bundle.trained and run.method != "float"
    examples += (2 if with_float else 1) * sum(map(len, plan.prepared.validation.values()))
    return examples / run.train_batch_size


def _seconds_per_step(plan: Plan) -> float:
    """Time a forward and a backward pass of the float model."""
    seconds = _time(plan, lambda model, batch: model(**batch).loss.backward())
    plan.bundle.model.zero_grad()
    return seconds * plan.config.gradient_accumulation_steps


def _seconds_per_pass(plan: Plan) -> float:
    """Time a forward pass of the float model over a batch of a training step."""
    import torch

    with torch.no_grad():
        return _time(plan, lambda model, batch: model(**batch)) * plan.config.gradient_accumulation_steps


def _time(plan: Plan, compute: Callable[[Any, Any], Any]) -> float:
    """Time what is computed on a training batch: the second of two, because the first one allocates."""
    train, model = plan.prepared.train, plan.bundle.model
    batch = plan.prepared.data_collator([train[i] for i in range(min(plan.config.train_batch_size, len(train)))])
    model.train()
    for _ in range(2):
        started = time.monotonic()
        compute(model, batch)
        seconds = time.monotonic() - started
    return seconds
