"""Start of a search of architecture and formats: its prior, its candidates, and what it does not go with."""

from __future__ import annotations

from contextlib import suppress
from typing import Any

import numpy as np
import torch
from torch import Tensor

from policy.joint_budget import JointBudget
from policy.solve import InfeasibleError, Table, solve_assignment
from quant.errors import UserError
from trainer.search.config import ReinforceConfig
from trainer.search.sensitivity import at_cost, entropy, prior_temperature


def check_joint(config: ReinforceConfig) -> None:
    """Raise UserError for settings that a search of architecture does not know."""
    reasons = {
        "method": (config.method != "search", "the competing methods choose formats alone"),
        "target_bits": (len(config.bits_list) > 1, "one supernet ends as one model: give one budget"),
        "max_drop": (config.max_drop is not None, "the budget of an architecture is a cost"),
        "engine": (config.engine is not None, "the table of what an engine stores knows formats alone"),
    }
    for setting, (wrong, why) in reasons.items():
        if wrong:
            raise UserError(f"{setting} {getattr(config, setting)} contradicts a search of architecture: {why}")


def joint_prior(sensitivity: Table, budget: JointBudget) -> tuple[Tensor, Tensor]:
    """Return starting logits: formats follow their sensitivities, architectures start alike, at the budget's cost.

    Args:
        sensitivity: degradation from each format alone, (decisions of formats, choices).
        budget: limits on all decisions.

    Returns:
        As `sensitivity_prior`: the logits, and the part of them that is cost pressure, (decisions, choices) each.
    """
    formats, choices = sensitivity.shape
    architecture = np.zeros((len(budget.tables[0]) - formats, choices))
    temperature = prior_temperature(sensitivity, entropy)
    logits, pressure = at_cost(np.concatenate([-sensitivity / temperature, architecture]), budget)
    return torch.from_numpy(logits), torch.from_numpy(-pressure)


def joint_candidates(sensitivity: Table, budget: JointBudget) -> dict[str, list[int]]:
    """Return choices that scale the whole model alike, each with its best formats; of those that fit, by name.

    Args:
        sensitivity: degradation from each format alone, (decisions of formats, choices).
        budget: limits on all decisions.
    """
    formats, choices = sensitivity.shape
    found: dict[str, list[int]] = {}
    own = budget.tables[0][formats:]  # a decision with fewer choices repeats its last one, at the same cost
    for index in reversed(range(choices)):
        if any(np.array_equal(own[:, index], own[:, other]) for other in range(index + 1, choices)):
            continue
        structure = [index] * (len(budget.tables[0]) - formats)
        with suppress(InfeasibleError):
            choice = [*best_formats(sensitivity, budget, structure), *structure]
            found["whole model" if index == choices - 1 else f"architecture {index + 1} of {choices}"] = choice
    return found


def best_formats(sensitivity: Table, budget: JointBudget, structure: list[int]) -> list[int]:
    """Return the formats with the least sum of sensitivities for a given architecture.

    Raises:
        InfeasibleError: if not even the narrowest fit.
    """
    formats = len(sensitivity)
    tables = [np.zeros_like(sensitivity) for _ in budget.limits]
    for factor in budget.factors:
        decision, *others = factor.decisions
        taken: tuple[Any, ...] = (slice(None), *(structure[other - formats] for other in others))
        for table, costs in zip(tables, factor.tables, strict=True):
            table[decision] += costs[taken]
    return solve_assignment(-sensitivity, tables, budget.limits)
