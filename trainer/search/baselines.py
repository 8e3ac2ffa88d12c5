"""What the competitors of the search choose, from a trainer's model and data before its first step."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from policy.allocators import best_uniform, greedy, head_tail, least_harm, random_choice
from policy.hessian import MOST_DRAWS, held_weights
from policy.solve import InfeasibleError
from trainer.search import sensitivity
from trainer.training.distributed import of_first_process
from trainer.training.progress import Passes

if TYPE_CHECKING:
    from trainer.reinforce_trainer import ReinforceTrainer

ADDITIVE = ("measured", "fisher", "hawq_v2", "qbert")
"""sensitivities whose effects are added up: any of them is a method, and a prior of the policy"""


def allocate(method: str, trainer: ReinforceTrainer) -> list[int]:
    """The choice of a competitor (`policy.allocators.Allocator`) within the trainer's budget."""
    budget = trainer.budget
    match method:
        case "uniform":
            return best_uniform(budget)
        case "head_tail":
            return head_tail(budget)
        case "random":
            return random_choice(budget, np.random.default_rng(trainer.args.seed))
        case "greedy":
            return greedy(trainer.measure("errors").effect, budget)
        case "exhaustive":
            choices = list(budget.all_fitting())
            trainer.passes = Passes("judging every assignment", len(choices) * trainer.judging_passes)
            return list(choices[int(trainer.judge(choices)[:, 0].mean(1).argmin())])
    return least_harm(effects(method, trainer), budget)


def effects(method: str, trainer: ReinforceTrainer) -> NDArray[np.float64]:
    """(decisions, choices): what each choice alone does to the loss, as one of `ADDITIVE` estimates it.

    Of several processes, all get the first one's.
    """
    agreed = of_first_process(torch.from_numpy(_effects(method, trainer)))
    assert agreed is not None
    return agreed.numpy()


def _effects(method: str, trainer: ReinforceTrainer) -> NDArray[np.float64]:
    if method == "measured":
        return trainer.measure().effect
    batches = trainer.judging_batches(trainer.space.num_decisions * trainer.space.num_choices)
    model, modules, space = trainer.model, trainer.modules, trainer.space
    most = {"hawq_v2": MOST_DRAWS * len(batches)}.get(method, len(batches))
    passes = Passes(f"measuring ({method})", most)
    trainer.tell(passes.phase, 0, most)

    def loss(model: nn.Module, batch: Any) -> Tensor:
        value = trainer.plain_loss(model, batch)
        passes.count(trainer.tell)
        return value

    if method == "fisher":
        with held_weights(modules):
            return sensitivity.fisher_effect(model, modules, space, batches, loss)
    return sensitivity.hessian_effect(model, modules, space, batches, loss, method, trainer.args.seed)


def propose(trainer: ReinforceTrainer, known: Mapping[str, NDArray[np.float64]]) -> dict[str, list[int]]:
    """What the cheap competitors would choose, by name, without repetitions: candidates of the search's contest.

    `known` effects are used; fisher's take one backward pass and are measured.
    """
    table = {**known} if "fisher" in known else {**known, "fisher": effects("fisher", trainer)}
    choices = {name: least_harm(effect, trainer.budget) for name, effect in table.items()}
    with suppress(InfeasibleError):  # no uniform choice fits
        choices["uniform"] = best_uniform(trainer.budget)
    return {name: choice for n, (name, choice) in enumerate(choices.items()) if choice not in [*choices.values()][:n]}
