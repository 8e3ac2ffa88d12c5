"""Search: draws assignments, learns from their rewards and names the best choice.

It sees costs and rewards only, neither model nor data, so that a toy problem can drive it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from cost.cost import REWARDS
from policy.budget import Budget
from policy.reinforce import Reinforce
from policy.simple_policy import SimplePolicy
from policy.solve import Table
from policy.space import SearchSpace
from quant.errors import UserError
from trainer.search.config import ReinforceConfig

PENALTIES: dict[str, Callable[[Tensor], Tensor]] = {"tunas_abs": torch.abs, "one_sided_tunas_abs": torch.relu}
"""Reward that subtracts cost from quality -> its penalty as a function of cost / target - 1, for beta = 1."""
SETTLE, SETTLE_ARCHITECTURE = 3 / 4, 15 / 16
"""Last share of the steps that fine-tunes the chosen assignment. Of an architecture, which starts again from the first
weights, it is larger: what is trained before the choice helps the choice alone."""


@dataclass(frozen=True)
class Phases:
    """Steps of a run: [0, delay) train under draws, [delay, settle) also learn, [settle, total) fine-tune."""

    delay: int
    settle: int
    total: int

    @classmethod
    def of(cls, config: ReinforceConfig, total: int, architecture: bool = False) -> Phases:
        """Return the phases of `total` steps.

        Args:
            config: settings of the search.
            total: steps of the run.
            architecture: whether the search chooses an architecture, too.

        Raises:
            UserError: if the delay leaves the policy no step to learn in.
        """
        share = config.settle_fraction
        if share is None:
            share = SETTLE_ARCHITECTURE if architecture else SETTLE
        settle = max(total - round(total * share), int(architecture))  # a sixteenth of a few steps is none
        delay = settle // 2 if config.delay_steps is None and share else total // 4
        delay = delay if config.delay_steps is None else config.delay_steps
        if total and not 0 <= delay < settle:
            raise UserError(
                f"--delay_steps {delay} leaves the policy no step to learn in: {total} steps (--max_steps, or the "
                f"epochs), of which the last {total - settle} settle (--settle_fraction {share:g})"
            )
        return cls(delay, settle, total)

    def name(self, step: int) -> Literal["delay", "search", "settle"]:
        """Return the phase of a step, as the history names it."""
        return "delay" if step < self.delay else "search" if step < self.settle else "settle"


@dataclass
class Search:
    """A policy over a search space under a budget, and what it has learned so far."""

    space: SearchSpace
    budget: Budget
    config: ReinforceConfig
    phases: Phases
    generator: torch.Generator
    """Private, so that draws do not depend on other consumers of random numbers."""
    prior: Tensor | None = None
    """Starting logits, float64 (decisions, choices); None: uniform."""
    pressure: Tensor | None = None
    """Part of the prior that stands for the cost; the final choice drops it and solves under the budget instead."""
    sharing: int = 1
    """Number of searches that take turns at the steps of the run."""
    candidates: dict[str, list[int]] = field(default_factory=dict)
    """Name -> choice of a competing method. They are trained in turn during the delay and compared at the end."""
    policy: SimplePolicy = field(init=False)
    reinforce: Reinforce = field(init=False)

    def __post_init__(self) -> None:
        self.policy = SimplePolicy(self.space.num_decisions, self.space.num_choices, self.prior)
        self.reinforce = Reinforce(
            self.policy,
            self.config.rl_learning_rate,
            self.config.entropy_schedule_type,
            self.config.max_entropy_beta,
            max(self.phases.settle - self.phases.delay, 1),  # steps of the run: of several searches, all keep its pace
            baseline="leave_one_out" if self.config.reward_draws > 1 else "ema",
        )

    def draw(self) -> Tensor:
        """Sample one choice per decision from the policy, int64 (decisions,)."""
        return self.policy.sample(self.generator)

    def draws(self, step: int) -> Tensor:
        """Sample the assignments of one step, int64 (draws, decisions); the first one is trained.

        During the delay every second step trains a candidate, one after the other: comparing choices is only fair
        if the weights have been trained under each about equally often.

        Args:
            step: step of the run, from 0.
        """
        if step < self.phases.delay:
            turn, odd = divmod(step // self.sharing, 2)
            if self.candidates and not odd:
                return torch.tensor([list(self.candidates.values())[turn % len(self.candidates)]])
            return self.draw()[None]
        return torch.stack([self.draw() for _ in range(self.config.reward_draws)])

    def cost(self, choice: Sequence[int] | Tensor) -> float:
        """Return the cost of a choice in the unit of the run's own cost."""
        return self.budget.costs(np.asarray(choice))[0]  # type: ignore[arg-type]

    def learn(self, choices: Tensor, qualities: Sequence[float], step: int) -> dict[str, Any]:
        """Update the policy once.

        The expected cost of the policy is known exactly, not only the cost of its draws. By default the advantages of
        the draws therefore hold quality alone, and the cost enters by its exact gradient at the expected cost: sampled
        costs of many decisions would drown the quality. Rewards that multiply quality and cost (the exponential ones)
        are always sampled.

        Args:
            choices: drawn choices, int64 (draws, decisions).
            qualities: quality of each draw, in (0, 1].
            step: step of the run, from 0.

        Returns:
            The entries of the history: means over the draws of reward, quality and cost, "draws" as [cost, quality]
            each, and the statistics of `Reinforce.step`.
        """
        reward, beta = REWARDS[self.config.cost_function], self.config.cost_beta
        costs = [self.cost(choice) for choice in choices]
        ratios = [self.budget.ratio(choice.tolist()) for choice in choices]
        rewards = [reward(quality, ratio, 1.0, beta) for quality, ratio in zip(qualities, ratios, strict=True)]
        expected = self.config.cost_gradient == "expected" and self.config.cost_function in PENALTIES
        learned_from = torch.tensor(qualities if expected else rewards, dtype=torch.float64)
        penalty = beta * self._expected_penalty() if expected else None
        stats = self.reinforce.step(choices, learned_from, step - self.phases.delay, penalty)
        return {
            "reward": float(np.mean(rewards)),
            "quality": float(np.mean(qualities)),
            "cost": float(np.mean(costs)),
            "draws": [list(draw) for draw in zip(costs, qualities, strict=True)],
            **stats,
        }

    def _expected_penalty(self) -> Tensor:
        """Penalty of the policy's expected cost for beta = 1: scalar, with a gradient."""
        return PENALTIES[self.config.cost_function](self.budget.expected_ratio(self.policy.probabilities()) - 1)

    def best(self) -> list[int]:
        """Return the most probable choice within the budget, solved exactly."""
        return self.budget.solve(self.values())

    def values(self) -> Table:
        """Return the policy's log-probabilities without the cost pressure of its prior, (decisions, choices)."""
        values = self.policy.log_probabilities().detach()
        return (values if self.pressure is None else values - self.pressure).numpy()

    def state_dict(self) -> dict[str, Any]:
        """Return the state for a checkpoint."""
        return {
            "reinforce": self.reinforce.state_dict(),
            "generator": self.generator.get_state(),
            "prior": self.prior,
            "pressure": self.pressure,
            "candidates": self.candidates,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a `state_dict`."""
        self.reinforce.load_state_dict(state["reinforce"])
        self.generator.set_state(state["generator"])
        self.prior, self.pressure, self.candidates = state["prior"], state["pressure"], state["candidates"]
