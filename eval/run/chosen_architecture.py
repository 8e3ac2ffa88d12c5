"""The plan of a run after its architecture has been chosen, and its model extracted."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from eval.run.plan import Plan


def chosen_plan(plan: Plan) -> Plan:
    """Return the plan of the plain smaller model, after the elastic one of `plan` has been extracted."""
    from cost.profile import profile_model

    present = {name for name, _ in plan.bundle.model.named_modules()}
    layers = [name for name in plan.layers if name in present]
    profiles = profile_model(plan.bundle.model, plan.prepared.example_inputs, layers)
    return replace(plan, layers=layers, profiles=profiles, architecture=None, whole_profiles=plan.profiles)


def extracted(plan: Plan, structure: Sequence[int]) -> Plan:
    """Give the model of a plan one architecture for good: one index per decision of its elastic model."""
    assert plan.architecture is not None
    plan.architecture.extract(structure)
    return chosen_plan(plan)
