"""SearchTarget and MultiTargetSearch: the budgets of a run, what is proposed for them, and what is chosen."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from cost.cost import assignment_from_json, assignment_to_json
from cost.profile import LayerProfile
from cost.units import UNITS
from policy.budget import Budget, Limit
from policy.joint_budget import JointBudget
from policy.joint_space import JointSpace
from policy.solve import Table
from policy.space import SearchSpace
from quant.formats import Format
from quant.quant_module import Reach, runs_in
from trainer.search.baselines import allocator, candidate_tables, propose, sensitivities
from trainer.search.config import ReinforceConfig, make_budget
from trainer.search.diagnostics import SAMPLES, additivity, all_if_affordable, most_swaps, optimality_report
from trainer.search.evaluator import AssignmentEvaluator
from trainer.search.joint import check_joint, joint_candidates, joint_prior
from trainer.search.pairs import PAIRS_SHARE, adds_up, decisions_by_block, measure_pairs
from trainer.search.quality_constraint import HALVINGS, cheapest_budget, cheapest_choice, limited
from trainer.search.search_state import Phases, Search
from trainer.search.selection import PROPOSALS, ROUNDS, CandidateSelector, SelectionResult
from trainer.search.sensitivity import sensitivity_prior
from trainer.search.turns import Turns
from trainer.training.batch_norm import LEAST_TELLING, recalibrate_batch_norm
from trainer.training.distributed import of_first_process
from trainer.training.progress import Passes

ROUNDS_SHARE, REPORT_SHARE = 1 / 8, 1 / 100
"""Largest shares of the training's time for the rounds of a selection, and for the random assignments of its report."""
LEAST_COMPARED = 8
"""Least number of random assignments in an optimality report."""


@dataclass
class SearchTarget:
    """One budget of a run, the search within it, and the assignment that was chosen."""

    index: int = 0
    budget: Budget | None = None
    """None: the run has no search."""
    search: Search | None = None
    """None: not started, or the assignment is chosen by another method."""
    assignment: dict[str, tuple[Format, Format]] | None = None
    """Formats of the layers at the end of the run; None: not chosen yet, or float."""
    choice: list[int] | None = None
    """The choice behind the assignment, which also holds the architecture, of a search that has made it."""
    contest: dict[str, Any] | None = None
    """How the final choice was made: part of the run's record."""

    @property
    def limits(self) -> Budget:
        """The budget. Raises ValueError for a run without a search."""
        if self.budget is None:
            raise ValueError("this trainer has no budget: pass search=ReinforceConfig(...)")
        return self.budget

    def state_dict(self) -> dict[str, Any]:
        """Return the state for a checkpoint."""
        return {
            "search": None if self.search is None else self.search.state_dict(),
            "contest": self.contest,
            "choice": self.choice,
            "limits": None if self.budget is None else list(self.budget.limits),
            "assignment": None if self.assignment is None else assignment_to_json(self.assignment),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from a `state_dict`; a search has to be started before."""
        if self.search is not None and state["search"] is not None:
            self.search.load_state_dict(state["search"])
        self.contest, self.choice = state["contest"], state.get("choice")
        if state["assignment"] is not None:
            self.assignment = assignment_from_json(state["assignment"])

    def set_reach(self, reach: Mapping[str, Reach]) -> None:
        """Keep layers that calibration did not reach in float in a given assignment."""
        if self.assignment is not None:
            pairs = self.assignment.items()
            self.assignment = {name: runs_in(reach.get(name, "called"), pair) for name, pair in pairs}


class MultiTargetSearch:
    """Searches assignments for one or several budgets over shared weights.

    Args:
        config: settings of the search, or of a competing method.
        evaluator: evaluates assignments on held-out data.
        profiles: cost profiles of the layers.
        limits: hard limits on further costs.
        phases: phases of the run.
        seed: seed of all random choices.
    """

    def __init__(
        self,
        config: ReinforceConfig,
        evaluator: AssignmentEvaluator,
        profiles: Sequence[LayerProfile],
        limits: Sequence[Limit],
        phases: Phases,
        seed: int,
    ) -> None:
        self.config, self.evaluator, self.profiles, self.phases, self.seed = config, evaluator, profiles, phases, seed
        self._hard_limits = tuple(limits)
        if isinstance(self.space, JointSpace):
            check_joint(config)
        self.float_quality: float | None = None
        """Held-out quality of the float model, from which `max_drop` counts."""
        self.after_measuring: Callable[[str, Table], None] | None = None
        """Called with the kind of the prior's sensitivities and their values, (decisions, choices)."""
        self.targets = [SearchTarget(index, self._budget(bits)) for index, bits in enumerate(config.bits_list)]
        self.turns = Turns(len(self.targets))

    @property
    def space(self) -> SearchSpace:
        """The search space."""
        return self.evaluator.space

    def turn(self, step: int) -> int:
        """Return the index of the target that a step trains.

        It depends on the step and the state of a checkpoint alone: a resumed run asks again for the step it goes on at.
        Until the assignments are chosen, targets go round; then, see `Turns`.
        """
        return step % len(self.targets) if step < self.phases.settle else self.turns.next()

    def count(self, target: SearchTarget, step: int, loss: float) -> None:
        """Count a step of a target with its training loss."""
        if step >= self.phases.settle:
            agreed = of_first_process(torch.tensor(loss, dtype=torch.float64))
            assert agreed is not None
            self.turns.count(target.index, agreed.item())

    def set_reach(self, reach: Mapping[str, Reach]) -> None:
        """Charge and evaluate layers that calibration did not reach as the float layers they stay."""
        self.evaluator.space = replace(self.space, reach=reach)
        for target, bits in zip(self.targets, self.config.bits_list, strict=True):
            target.budget = self._budget(bits)

    def prepare(self) -> None:
        """Decide by a competing method, or start each target's policy from measured sensitivities."""
        self.evaluator.find_reference_loss()
        config = self.config
        if config.method != "search":
            choose = allocator(config.method, self.evaluator, self.seed)
            for target in self.targets:
                self._take(target, choose(target.limits))
            return
        prior = config.policy_prior
        tables = {}
        if prior != "none" and config.contest:
            tables = candidate_tables(prior, self.evaluator, self.seed)
        elif prior != "none":
            tables = {prior: sensitivities(prior, self.evaluator, self.seed)}
        table = tables.get(prior)
        if table is not None and self.after_measuring is not None:
            self.after_measuring(prior, table)
        for target in self.targets:
            if table is None:
                self.start(target)
                continue
            if config.max_drop is not None:
                self.evaluator.passes = Passes("looking for the budget", (HALVINGS + 3) * self.evaluator.sizes.passes)
                self.float_quality = self.evaluator.evaluate_float()
                target.budget = self._cheapest_budget(-table)
                self.evaluator.passes = None
            if isinstance(target.limits, JointBudget):
                logits, pressure = joint_prior(table, target.limits)
                candidates = joint_candidates(table, target.limits) if config.contest else {}
            else:
                logits, pressure = sensitivity_prior(table, target.limits)
                candidates = propose(target.limits, tables) if config.contest else {}
            self.start(target, of_first_process(logits), of_first_process(pressure), candidates)

    def start(
        self,
        target: SearchTarget,
        prior: Tensor | None = None,
        pressure: Tensor | None = None,
        candidates: dict[str, list[int]] | None = None,
    ) -> None:
        """Start the search of a target; the arguments are those of `Search`."""
        generator = torch.Generator().manual_seed(self.seed + 7919 * target.index)
        sharing = len(self.targets)
        target.search = Search(
            self.space, target.limits, self.config, self.phases, generator, prior, pressure, sharing, candidates or {}
        )

    def state_dict(self) -> dict[str, Any]:
        """Return the state for a checkpoint."""
        return {
            "targets": [target.state_dict() for target in self.targets],
            "float_quality": self.float_quality,
            "reference_loss": self.evaluator.reference_loss,
            "turns": self.turns.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from the state of a checkpoint; older ones have neither `reference_loss` nor `turns`."""
        self.float_quality = state["float_quality"]
        if state.get("turns") is not None:
            self.turns.load_state_dict(state["turns"])
        self.evaluator.reference_loss = state.get("reference_loss")
        for target, saved in zip(self.targets, state["targets"], strict=True):
            target.budget = replace(target.limits, limits=tuple(saved["limits"]))
            if saved["search"] is not None:
                self.start(target)
            target.load_state_dict(saved)
            if isinstance(self.space, JointSpace) and target.choice is not None:
                self.space.apply(self.evaluator.modules, target.choice)

    # ------------------------------------------------------ the final choice

    def choose(self, calibration_batches: Callable[[], Iterable[Any]]) -> None:
        """Choose the assignment of each target with the trained weights.

        Args:
            calibration_batches: returns training batches for recalibrating batch norms.
        """
        for target in self.targets:
            self._choose(target, calibration_batches)
        self.evaluator.passes = None

    def _choose(self, target: SearchTarget, calibration_batches: Callable[[], Iterable[Any]]) -> None:
        assert target.search is not None
        choice = tuple(target.search.best())
        if self.config.contest:
            # Only batches too small for their own statistics use averages; those of training mix all drawn formats.
            if self.evaluator.sizes.smallest_batch < LEAST_TELLING:
                self.space.apply(self.evaluator.modules, choice)
                recalibrate_batch_norm(self.evaluator.model, calibration_batches())
            choice = self._select(target, choice)
        self._take(target, choice)

    def _select(self, target: SearchTarget, best: tuple[int, ...]) -> tuple[int, ...]:
        """Compare the policy's choice with all candidates, and record how the choice was made."""
        search, evaluator = target.search, self.evaluator
        assert search is not None
        affordable = max(LEAST_COMPARED, evaluator.sizes.affordable(REPORT_SHARE))
        several = (
            f", budget {target.limits.limits[0]:.6g} {UNITS[self.config.cost_type]}" if len(self.targets) > 1 else ""
        )
        evaluator.passes = Passes("choosing", self._selection_passes(target, affordable), purpose=several)
        if self.config.max_drop is not None:
            target.budget = search.budget = self._cheapest_budget(search.values())
            best = tuple(search.best())
        selector = CandidateSelector(target.limits, evaluator.evaluate_assignments, self._rounds, evaluator.decide)
        candidates = {name: c for name, c in search.candidates.items() if selector.budget.fits(c)}
        result = selector.select({**candidates, "policy": best})
        everything = all_if_affordable(selector, affordable)  # the optimality report evaluates all of them anyway
        if everything is not None and (least := selector.best_of_all(everything, result.choice)) != result.choice:
            result = replace(result, choice=least, origin="the best of all")
        additive = additivity(selector, result.choice, self.seed)
        pairs: dict[str, Any] = {}
        if everything is None and not adds_up(additive):
            result, pairs = self._select_with_pairs(selector, result)
        if (floor := self._least_quality) is not None:
            cheapest = cheapest_choice(selector, result.choice, floor, everything)
            if cheapest != result.choice:
                result = replace(result, choice=cheapest, origin=f"cheaper than {result.origin}")
            lower = limited(target.limits, target.limits.costs(cheapest)[0])
            target.budget = search.budget = selector.budget = lower
            additive = additivity(selector, cheapest, self.seed)  # of the final choice, within the final budget
        described = result.describe()
        target.contest = {
            **described,
            "judged_by": evaluator.criterion,
            "decided_by": "the same examples" if selector.decide_by is None else "other examples",
            **self._describe_drop(described["held_out_quality"]),
            "certificate": optimality_report(selector, result.choice, affordable, self.seed),
            "additivity": additive,
            **pairs,
        }
        return result.choice

    def _select_with_pairs(
        self, selector: CandidateSelector, result: SelectionResult
    ) -> tuple[SelectionResult, dict[str, Any]]:
        """Solve the choice again with the terms of pairs; return the result and what the record says of the pairs."""
        evaluator = self.evaluator
        most = evaluator.sizes.affordable(PAIRS_SHARE)
        terms = measure_pairs(selector, result.choice, decisions_by_block(self.space, evaluator.units()), most)
        proposed = selector.neighbours(result.choice, terms.factors(self.space.num_choices)) if terms.measured else []
        better = selector.better_of(proposed, result.choice)
        pairs = {"pairs": terms.describe(self.space, better is not None)}
        return result if better is None else replace(
            result, choice=better, origin=f"pairs around {result.origin}"
        ), pairs

    @property
    def _rounds(self) -> int:
        """Rounds of the selection: measuring the neighbourhood is most of its work; at least one."""
        rounds = self.evaluator.sizes.affordable(ROUNDS_SHARE) // self.evaluator.sizes.neighbours
        return min(max(rounds, 1), ROUNDS)

    def _selection_passes(self, target: SearchTarget, affordable: int) -> int:
        """Upper estimate of the forward passes that the selection takes."""
        assert target.search is not None
        sizes, rounds = self.evaluator.sizes, self._rounds
        near, far = sizes.neighbours, min(sizes.decisions * (sizes.choices - 1), most_swaps(affordable))
        candidates = len(target.search.candidates) + 1
        pairs = sizes.affordable(PAIRS_SHARE) + PROPOSALS
        evaluated = candidates + rounds * (near + PROPOSALS) + far + affordable + near + SAMPLES + pairs
        deciding = 2 * (rounds + 1) * len(sizes.batch_starts(*sizes.to_decide()))
        return min(evaluated, max(target.limits.size, 1)) * sizes.passes + deciding

    # ------------------------------------------------------ budgets

    def _budget(self, bits: float | None) -> Budget:
        return make_budget(self.config, self.space, self.profiles, bits, self._hard_limits)

    def _cheapest_budget(self, values: Table) -> Budget:
        """Return the lowest budget whose most valuable choice stays within `max_drop` of float."""
        floor = self._least_quality
        assert floor is not None

        def quality_of(choice: Sequence[int]) -> float:
            return float(self.evaluator.evaluate_assignments([choice])[0, 1].mean())

        return cheapest_budget(self._budget(None), values, quality_of, floor)

    @property
    def _least_quality(self) -> float | None:
        """Least held-out quality under `max_drop`; None without one."""
        if self.config.max_drop is None or self.float_quality is None:
            return None
        return self.float_quality - self.config.max_drop

    def _describe_drop(self, quality: float) -> dict[str, Any]:
        if (floor := self._least_quality) is None:
            return {}
        values = {"float_quality": self.float_quality, "max_drop": self.config.max_drop}
        return {**values, "within_drop": quality >= floor}

    def _take(self, target: SearchTarget, choice: Sequence[int]) -> None:
        """Decide for a choice: with several processes, for the first one's. The model runs in it from now on."""
        agreed = of_first_process(torch.tensor(list(choice)))
        assert agreed is not None
        target.choice = agreed.tolist()
        target.assignment = self.space.assignment(agreed.tolist())
        if isinstance(self.space, JointSpace):
            self.space.apply(self.evaluator.modules, agreed.tolist())
