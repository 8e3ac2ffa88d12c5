"""The competitors of the search: each decides once, from an evaluator's model and data, before the first step."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import suppress
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from policy.allocators import best_uniform, greedy, head_tail, least_degradation, random_choice
from policy.budget import Budget
from policy.hessian import MOST_DRAWS, held_weights
from policy.solve import InfeasibleError
from quant.quant_cache import QuantCache
from trainer.search import sensitivity
from trainer.search.evaluator import AssignmentEvaluator
from trainer.training.distributed import of_first_process
from trainer.training.progress import Passes


def allocator(method: str, evaluator: AssignmentEvaluator, seed: int) -> Callable[[Budget], list[int]]:
    """Return the function of a competing method from a budget to the choice within it, having measured once for all.

    Args:
        method: one of `policy.allocators.Allocator`.
        evaluator: model, layers and held-out data.
        seed: seed of random choices and random vectors.

    Raises:
        ValueError: The method is none of them.
    """
    match method:
        case "uniform":
            return best_uniform
        case "head_tail":
            return head_tail
        case "random":
            return lambda budget: random_choice(budget, np.random.default_rng(seed))
        case "greedy":
            return partial(greedy, evaluator.measure("errors").mean)
        case "exhaustive":
            return partial(_best_of_all, evaluator)
        case "measured" | "fisher" | "hawq_v2" | "qbert":
            return partial(least_degradation, sensitivities(method, evaluator, seed))
    raise ValueError(f"no allocator is called {method!r}")


def _best_of_all(evaluator: AssignmentEvaluator, budget: Budget) -> list[int]:
    choices = list(budget.all_fitting())
    evaluator.passes = Passes("judging every assignment", len(choices) * evaluator.sizes.passes)
    return list(choices[int(evaluator.evaluate_assignments(choices)[:, 0].mean(1).argmin())])


def sensitivities(
    kind: str, evaluator: AssignmentEvaluator, seed: int, first_order: NDArray[np.float64] | None = None
) -> NDArray[np.float64]:
    """Return the degradation from each choice alone, float64 (decisions, choices).

    With several processes, all return the result of the first.

    Args:
        kind: "measured", "fisher", "hawq_v2" or "qbert".
        evaluator: model, layers and held-out data.
        seed: seed of the random vectors of Hessian methods.
        first_order: Fisher's sensitivities, which spare "measured" the negligible choices; None: it measures all.
    """
    agreed = of_first_process(torch.from_numpy(_sensitivities(kind, evaluator, seed, first_order)))
    assert agreed is not None
    return agreed.numpy()


def _sensitivities(
    kind: str, evaluator: AssignmentEvaluator, seed: int, first_order: NDArray[np.float64] | None
) -> NDArray[np.float64]:
    if kind == "measured":
        return evaluator.measure(first_order=first_order).mean
    model, modules, space = evaluator.model, evaluator.modules, evaluator.space
    batches = evaluator.evaluation_batches(space.num_decisions * space.num_choices)
    most = {"hawq_v2": MOST_DRAWS * len(batches)}.get(kind, len(batches))
    passes = Passes(f"measuring ({kind})", most)
    evaluator.tell(passes.phase, 0, most)

    def loss(model: nn.Module, batch: Any) -> Tensor:
        value = evaluator.loss(model, batch)
        passes.count(evaluator.tell)
        return value

    if kind == "fisher":
        with held_weights({name: module for name, module in modules.items() if not isinstance(module, QuantCache)}):
            return sensitivity.fisher_sensitivity(model, modules, space, batches, loss)
    return sensitivity.hessian_sensitivity(model, modules, space, batches, loss, kind, seed)


def candidate_tables(kind: str, evaluator: AssignmentEvaluator, seed: int) -> dict[str, NDArray[np.float64]]:
    """Return kind -> sensitivities from which `propose` takes candidates: those of the kind first, and Fisher's.

    Fisher's take one backward pass, and spare "measured" the choices that they find negligible.

    Args:
        kind: "measured", "fisher" or "hawq_v2".
        evaluator: model, layers and held-out data.
        seed: seed of random vectors.
    """
    fisher = sensitivities("fisher", evaluator, seed)
    own = fisher if kind == "fisher" else sensitivities(kind, evaluator, seed, fisher)
    return {kind: own, "fisher": fisher}


def propose(budget: Budget, tables: Mapping[str, NDArray[np.float64]]) -> dict[str, list[int]]:
    """Return the different choices of the cheap competitors, by name: candidates of the final selection.

    Args:
        budget: limits that the choices have to meet.
        tables: kind -> sensitivities, see `candidate_tables`.
    """
    choices = {name: least_degradation(table, budget) for name, table in tables.items()}
    with suppress(InfeasibleError):  # no uniform choice fits
        choices["uniform"] = best_uniform(budget)
    return {name: choice for n, (name, choice) in enumerate(choices.items()) if choice not in [*choices.values()][:n]}
