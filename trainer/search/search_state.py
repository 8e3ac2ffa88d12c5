"""The search beside the Trainer: draws assignments, learns from their rewards, names the winner.

It knows costs and rewards, but no model and no data: a toy test can drive it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from cost.cost import REWARDS, UNITS, CostType
from cost.profile import LayerProfile
from policy.allocators import Allocator
from policy.budget import Budget
from policy.reinforce import EntropySchedule, Reinforce
from policy.simple_policy import SimplePolicy
from policy.solve import Table
from policy.space import SearchSpace, uniform_cost
from quant.errors import UserError
from quant.validation import check_choices

PENALTIES: dict[str, Callable[[Tensor], Tensor]] = {"tunas_abs": torch.abs, "one_sided_tunas_abs": torch.relu}
"""rewards that subtract cost from quality -> what they subtract for a cost so much over the target, at beta 1"""


_ANY, _TINY = float("inf"), 1e-12
RANGES: dict[str, tuple[float, float, bool]] = {
    **dict.fromkeys(("cost_target", "target_bits", "rl_learning_rate"), (0.0, _ANY, True)),
    **dict.fromkeys(("cost_beta", "max_entropy_beta", "delay_steps"), (0.0, _ANY, False)),
    **dict.fromkeys(("reward_draws", "calibration_batches", "sensitivity_examples"), (1.0, _ANY, False)),
    **dict.fromkeys(("reward_share", "measure_share"), (_TINY, 1.0, False)),
    "max_drop": (0.0, 1.0, True),
    "settle_fraction": (0.0, 1.0, False),
}
"""setting -> (least, most, whether both ends are left out)"""
OF_THE_POLICY = (
    *("cost_function", "cost_beta", "cost_gradient", "reward_draws", "reward_share", "rl_learning_rate"),
    *("max_entropy_beta", "entropy_schedule_type", "delay_steps", "settle_fraction", "policy_prior"),
)
"""settings that a competitor, which decides once, has no use for"""

LEAST_JUDGED, MOST_JUDGED = 64, 512
"""held-out examples that an assignment is judged on: fewer tell nothing, more are not worth their time"""


def examples_to_judge(steps: int, batch_size: int, assignments: int, least: int = LEAST_JUDGED) -> int:
    """Held-out examples an assignment is judged on, so that judging all of them takes an eighth of the training.

    A training step is taken as three forward passes. At least `least`, at most `MOST_JUDGED`.
    """
    affordable = 3 * steps * batch_size / 8 / max(assignments, 1)
    return int(min(max(affordable, least), MOST_JUDGED))


def examples_to_measure(steps: int, batch_size: int, assignments: int, least: int, share: float) -> int:
    """Held-out examples that single formats are measured on: as `examples_to_judge`, within a `share` of the training.

    Without a step there is no training to take a share of.
    """
    wanted = examples_to_judge(steps, batch_size, assignments, least)
    if steps <= 0:
        return wanted
    return max(1, min(wanted, int(3 * steps * batch_size * share / max(assignments, 1))))


@dataclass(frozen=True)
class ReinforceConfig:
    """How to search. The names are those of the command line's flags."""

    method: Literal["search"] | Allocator = "search"
    """the policy, or a competitor that decides once, before the first step"""
    cost_type: CostType = "compute"
    cost_target: float | None = None
    """budget in MiB or GBOPs; one of cost_target and target_bits is needed"""
    target_bits: float | tuple[float, ...] | None = None
    """budget as the cost of every searched layer in that many bits; several: one policy each, over shared weights"""
    max_drop: float | None = None
    """instead of a budget: the cheapest assignment whose held-out quality is at most so far below the float model's"""
    cost_function: Literal["tunas_abs", "one_sided_tunas_abs", "soft_exponential", "hard_exponential"] = "tunas_abs"
    cost_beta: float = 1.0
    """how hard the reward punishes cost over the target"""
    cost_gradient: Literal["expected", "sampled"] = "expected"
    """how the policy learns of cost: exactly, from its expectation, or from each draw (see `Search.learn`)"""
    reward_quality: Literal["likelihood", "accuracy"] = "likelihood"
    reward_draws: int = 2
    """assignments drawn and rewarded a step, on the same held-out batch; one needs the 'ema' baseline"""
    reward_share: float = 0.25
    """held-out examples that each draw is rewarded on, as a share of the training batch"""
    rl_learning_rate: float = 0.01
    max_entropy_beta: float = 0.0
    entropy_schedule_type: EntropySchedule = "cosine"
    delay_steps: int | None = None
    """steps before the policy learns; None: a quarter of the steps"""
    settle_fraction: float = 0.75
    """last share of the steps, trained under the chosen assignment"""
    policy_prior: Literal["measured", "none", "fisher", "hawq_v2"] = "measured"
    contest: bool = True
    """settle on the best of policy, prior and local swaps by held-out loss; False: on the policy's most probable"""
    calibration_batches: int = 8
    """training batches that ranges and batch norms are calibrated on"""
    sensitivity_examples: int | None = None
    """held-out examples that an assignment is judged on, before and after the search; None: see `examples_to_judge`"""
    measure_share: float = 0.25
    """most that measuring single formats before the first step may take, as a share of the training: fewer examples"""

    def __post_init__(self) -> None:
        check_choices(self)
        if isinstance(self.target_bits, list):
            object.__setattr__(self, "target_bits", tuple(self.target_bits))
        aims = {name: getattr(self, name) for name in ("cost_target", "target_bits", "max_drop")}
        if sum(value is not None for value in aims.values()) != 1:
            given = ", ".join(f"{name}={value}" for name, value in aims.items())
            raise ValueError(f"set one of cost_target, target_bits and max_drop, got {given}")
        for name, (least, most, open_) in RANGES.items():
            for value in _values(getattr(self, name)):
                if not (least < value < most if open_ else least <= value <= most):  # also true for nan
                    ends = "()" if open_ else "[]"
                    raise ValueError(f"{name} must lie in {ends[0]}{least:g}, {most:g}{ends[1]}, got {value}")
        if self.method != "search":
            idle = [f.name for f in fields(self) if f.name in OF_THE_POLICY and getattr(self, f.name) != f.default]
            if idle:
                raise ValueError(f"{idle[0]} has no effect under method {self.method!r}: it is for a search")
        if self.max_drop is not None and (self.method != "search" or self.policy_prior == "none" or not self.contest):
            raise ValueError("max_drop needs a search with a prior and a contest: both bisect over budgets")
        if self.settle_fraction == 1:
            raise ValueError("settle_fraction must lie in [0, 1), got 1: the policy would have no step to learn in")

    @classmethod
    def fliqs(cls, **changes: Any) -> ReinforceConfig:
        """The published recipe (arXiv 2308.03290): uniform start, one draw, moving-average baseline, no settling."""
        return cls(
            **{
                "policy_prior": "none",
                "reward_draws": 1,
                "reward_share": 1.0,
                "settle_fraction": 0.0,
                "contest": False,
                "cost_gradient": "sampled",
                "rl_learning_rate": 0.05,
                "max_entropy_beta": 0.01,
                **changes,
            }
        )


def _values(value: Any) -> Sequence[float]:
    return () if value is None else value if isinstance(value, tuple) else (value,)


def resolve_target(
    space: SearchSpace,
    profiles: Sequence[LayerProfile],
    cost_type: CostType,
    target: float | None,
    bits: float | None,
    flag: str = "--cost_target",
) -> float:
    """The budget in MiB or GBOPs. Raises UserError, stating the feasible range, for one that no assignment meets.

    flag: what the error calls `target`.
    """
    weight_only = all(activation.name == "float" for _, activation in space.decisions[0].choices)
    resolved = uniform_cost(profiles, bits, cost_type, weight_only) if target is None else target  # type: ignore[arg-type]
    low, high = space.cost_range(profiles, cost_type)
    slack = 1e-9 * high
    if not low - slack <= resolved <= high + slack:
        asked = f"--target_bits {bits:g} is {resolved:.6g}" if target is None else f"{flag} {target:g}"
        raise UserError(
            f"{asked} {UNITS[cost_type]}, but assignments of this search space cost {low:.6g} to {high:.6g} "
            f"{UNITS[cost_type]}"
        )
    return resolved


@dataclass(frozen=True)
class Phases:
    """Which of the run's steps do what: [0, delay) train under draws; [delay, settle) also learn; then settle."""

    delay: int
    settle: int
    total: int

    @classmethod
    def of(cls, config: ReinforceConfig, total: int) -> Phases:
        """Raises UserError if the delay leaves the policy no step."""
        settle = total - round(total * config.settle_fraction)
        delay = settle // 2 if config.delay_steps is None and config.settle_fraction else total // 4
        delay = delay if config.delay_steps is None else config.delay_steps
        if total and not 0 <= delay < settle:
            raise UserError(
                f"--delay_steps {delay} leaves the policy no step to learn in: {total} steps (--max_steps, or the "
                f"epochs), of which the last {total - settle} settle (--settle_fraction {config.settle_fraction:g})"
            )
        return cls(delay, settle, total)

    def name(self, step: int) -> Literal["delay", "search", "settle"]:
        return "delay" if step < self.delay else "search" if step < self.settle else "settle"


@dataclass
class Search:
    """A policy over a search space with its costs, and what it has learned so far."""

    space: SearchSpace
    budget: Budget
    config: ReinforceConfig
    phases: Phases
    generator: torch.Generator
    """private: draws do not depend on what else consumes random numbers"""
    prior: Tensor | None = None
    """starting logits (decisions, choices)"""
    pressure: Tensor | None = None
    """part of the prior that stands for the cost, which the final choice replaces by the budget itself"""
    sharing: int = 1
    """searches that take turns at the steps of the run"""
    candidates: dict[str, list[int]] = field(default_factory=dict)
    """choices that others propose: they are trained in turn before the policy learns, and enter the contest"""
    policy: SimplePolicy = field(init=False)
    reinforce: Reinforce = field(init=False)

    def __post_init__(self) -> None:
        self.policy = SimplePolicy(len(self.space.decisions), self.space.num_choices, self.prior)
        self.reinforce = Reinforce(
            self.policy,
            self.config.rl_learning_rate,
            self.config.entropy_schedule_type,
            self.config.max_entropy_beta,
            max(self.phases.settle - self.phases.delay, 1),  # steps of the run: of several searches, all keep its pace
            baseline="leave_one_out" if self.config.reward_draws > 1 else "ema",
        )

    def draw(self) -> Tensor:
        """One choice per decision from the policy as it is: int64 (decisions,)."""
        return self.policy.sample(self.generator)

    def draws(self, step: int) -> Tensor:
        """What the run's `step` works on, int64 (draws, decisions); the first one is trained.

        In the delay every second step trains a candidate, each in its turn: a contest is only fair between choices that
        the weights have met about as often.
        """
        if step < self.phases.delay:
            turn, odd = divmod(step // self.sharing, 2)
            if self.candidates and not odd:
                return torch.tensor([list(self.candidates.values())[turn % len(self.candidates)]])
            return self.draw()[None]
        return torch.stack([self.draw() for _ in range(self.config.reward_draws)])

    def cost(self, choice: Sequence[int] | Tensor) -> float:
        """Cost of a choice, in the unit of the run's own cost."""
        return self.budget.costs(np.asarray(choice))[0]  # type: ignore[arg-type]

    def learn(self, choices: Tensor, qualities: Sequence[float], step: int) -> dict[str, Any]:
        """One policy step from choices int64 (draws, decisions) and their quality in (0, 1], at the run's `step`.

        The cost of a policy is known, not only that of its draws. So by default the draws' advantages hold quality
        alone, and the cost's share of the reward enters by its exact gradient, taken at the expected cost; with one
        moving cost among many draws, sampled costs would drown the quality. Rewards that multiply quality and cost
        (the exponential ones) are always sampled.

        Returns the means over the draws of reward, quality and cost, "draws" as [cost, quality] each, and what
        `Reinforce.step` tells.
        """
        reward, beta = REWARDS[self.config.cost_function], self.config.cost_beta
        costs = [self.cost(choice) for choice in choices]
        ratios = [self.budget.ratio(choice.tolist()) for choice in choices]
        rewards = [reward(quality, ratio, 1.0, beta) for quality, ratio in zip(qualities, ratios, strict=True)]
        expected = self.config.cost_gradient == "expected" and self.config.cost_function in PENALTIES
        learned_from = torch.tensor(qualities if expected else rewards, dtype=torch.float64)
        penalty = beta * self._expected_penalty() if expected else None
        told = self.reinforce.step(choices, learned_from, step - self.phases.delay, penalty)
        return {
            "reward": float(np.mean(rewards)),
            "quality": float(np.mean(qualities)),
            "cost": float(np.mean(costs)),
            "draws": [list(draw) for draw in zip(costs, qualities, strict=True)],
            **told,
        }

    def _expected_penalty(self) -> Tensor:
        """What the policy's expected cost takes from the reward at beta 1: scalar, with a gradient."""
        probabilities = self.policy.probabilities()
        tables = zip(self.budget.tables, self.budget.limits, strict=True)
        ratio = torch.stack([(probabilities * torch.from_numpy(table / limit)).sum() for table, limit in tables]).max()
        return PENALTIES[self.config.cost_function](ratio - 1)

    def best(self) -> list[int]:
        """The most probable choice that fits the budget, exactly."""
        return self.budget.solve(self.values())

    def values(self) -> Table:
        """What the policy holds of each choice, (decisions, choices): its log-probability without the cost's part."""
        values = self.policy.log_probabilities().detach()
        return (values if self.pressure is None else values - self.pressure).numpy()

    def state_dict(self) -> dict[str, Any]:
        return {
            "reinforce": self.reinforce.state_dict(),
            "generator": self.generator.get_state(),
            "prior": self.prior,
            "pressure": self.pressure,
            "candidates": self.candidates,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.reinforce.load_state_dict(state["reinforce"])
        self.generator.set_state(state["generator"])
        self.prior, self.pressure, self.candidates = state["prior"], state["pressure"], state["candidates"]
