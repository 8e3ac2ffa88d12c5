"""Formats for another budget from what a finished search has saved, without training.

`python eval/eval_run.py --resolve RUN --target_bits 3.2`
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from eval.export.finished_run import FinishedRun, finished_run
from eval.run.plan import make_plan
from eval.run.progress import RunProgress
from eval.run.record import describe
from eval.run.trainer import make_trainer
from quant.errors import UserError

if TYPE_CHECKING:
    from policy.budget import Budget
    from quant.convert import Assignment
    from trainer.reinforce_trainer import ReinforceTrainer

DECISIONS = "decisions.json"


def write_decisions(trainer: ReinforceTrainer, folder: Path) -> None:
    """Write what the policy of the current target has learned: log-probabilities without the pressure of costs.

    Args:
        trainer: After its search.
        folder: Folder of the target's record.
    """
    from trainer.training.checkpoint import write_json

    if trainer.target.search is None:
        return
    values = [
        [value if math.isfinite(value) else None for value in row] for row in trainer.target.search.values().tolist()
    ]
    layers = [list(decision.layers) for decision in trainer.space.decisions]
    write_json(folder / DECISIONS, {"layers": layers, "values": values})


def resolve(
    folder: Path, bits: float, write_result: Callable[..., dict[str, Any]], progress: RunProgress, data_dir: str | None
) -> tuple[dict[str, Any], Path]:
    """Choose formats for a budget between those of a finished search, and write its record into RUN/3.2b.

    The next smaller and the next larger budget propose: the formats that they have trained under, and their policies.
    The contest at the end of a search decides, on held-out examples and with the trained weights.

    Args:
        folder: Folder of the search.
        bits: The new budget.
        write_result: `eval.eval_run.write_result`.
        progress: Shows the progress.
        data_dir: Replaces the --data_dir of the run; None: as it was.

    Returns:
        The record and its folder.

    Raises:
        UserError: The folder is no finished search, or the budget is not within its own.
    """
    from cost.cost import assignment_from_json
    from eval.budgets import add_budget, assignments_of
    from trainer.training.checkpoint import load_tensors
    from trainer.training.saved_files import WEIGHTS

    started = time.monotonic()
    try:
        run = finished_run(folder, data_dir)
    except UserError as error:
        raise UserError(str(error).replace("RUN_DIR", "--resolve", 1)) from None
    near, place = _neighbours(run, bits), run.folder / f"{bits:g}b"
    tables = {own: _values(neighbour / DECISIONS) for own, neighbour in near.items()}
    if (place / "result.json").exists():
        raise UserError(f"--target_bits {bits:g}: {place} holds a record already")
    config = run.config.updated(target_bits=f"{bits:g}", save_model_path=None, verify_retrain=False, report_to="none")
    with TemporaryDirectory() as scratch:  # of the Trainer; the run itself may have been moved since
        plan = make_plan(config.updated(output_root_dir=scratch, log_dir=scratch), progress)
        trainer, modules, float_metrics = make_trainer(plan, progress=progress)
        trainer.evaluator.find_reference_loss()  # of the model as it was before the training
        trainer.model.load_state_dict(load_tensors(run.folder / "model" / WEIGHTS))
        known = assignments_of(run.folder / "model")
        _choose(trainer, tables, [assignment_from_json(known[own]) for own in near])
        record = describe(plan) | {"float_metrics": float_metrics, "run_id": f"{run.record['run_id']}-{bits:g}b"}
        record["notes"] = [*record["notes"], f"formats solved from the search in {run.folder.name}, not trained under"]
        written = write_result(replace(plan, config=config), trainer, modules, record, place, started, progress)
    add_budget(run.folder, bits)
    return written, place


def _neighbours(run: FinishedRun, bits: float) -> dict[float, Path]:
    """Return bits -> folder of the next smaller and the next larger budget of a search."""
    config, flag = run.config, f"--resolve {run.folder}"
    if config.method != "search":
        raise UserError(f"{flag}: was chosen by --method {config.method}; a search saves what its policy has learned")
    if config.max_steps == 0 or config.target_bits is None:
        raise UserError(f"{flag}: needs a search that trained, within --target_bits")
    # The folder may have been moved: its flags name the place where it was.
    folders = {own: run.folder / f"{own:g}b" for own in config.target_list[:-1]} | {config.target_list[-1]: run.folder}
    known = ", ".join(f"{own:g}" for own in folders)
    if not min(folders) < bits < max(folders) or bits in folders:
        raise UserError(
            f"--target_bits {bits:g}: must be between the budgets of {run.folder}, and none of them: {known}"
        )
    near = max(own for own in folders if own < bits), min(own for own in folders if own > bits)
    return {own: folders[own] for own in near}


def _values(path: Path) -> list[list[float]]:
    try:
        rows = json.loads(path.read_text())["values"]
        return [[-math.inf if value is None else float(value) for value in row] for row in rows]
    except FileNotFoundError:
        raise UserError(f"--resolve {path.parent}: holds no {path.name}: it is of an earlier version") from None
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"--resolve {path.parent}: {path.name} is damaged: {error}") from None


def _choose(trainer: ReinforceTrainer, tables: dict[float, list[list[float]]], trained: list[Assignment]) -> None:
    """Let the trainer choose as at the end of a search whose policy is the mean of those of the tables.

    Args:
        trainer: With the trained weights.
        tables: Bits of the next smaller and the next larger budget -> values.
        trained: Their assignments, in this order.
    """
    import torch

    (target,), searches = trainer.targets, trainer.searches
    values = {bits: torch.tensor(table, dtype=torch.float64) for bits, table in tables.items()}
    shape = trainer.space.num_decisions, trainer.space.num_choices
    if any(table.shape != shape for table in values.values()):
        raise UserError(f"--resolve: {DECISIONS} is of another search space than that of the flags")
    smaller, larger = (trainer.space.choice(assignment) for assignment in trained)
    low, high = tables
    proposals = {
        f"formats of {low:g} and {high:g} bits": between(target.limits, smaller, larger),
        f"formats of {low:g} bits": smaller,
        **{f"policy of {bits:g} bits": target.limits.solve(table.numpy()) for bits, table in values.items()},
    }
    prior = torch.stack(list(values.values())).mean(0).float()
    searches.start(target, prior, None, {name: list(choice) for name, choice in proposals.items()})
    trainer.finish()


def between(budget: Budget, smaller: Sequence[int], larger: Sequence[int]) -> list[int]:
    """Return the choice that uses most of a budget, each decision as one of two choices has it.

    Args:
        budget: Limits, which the first choice meets.
        smaller: Choice of a smaller budget.
        larger: Choice of a larger one.
    """
    import numpy as np

    costs = budget.tables[0] / budget.limits[0]
    values, decisions = np.full(costs.shape, -costs.sum()), np.arange(len(costs))
    for choice in (smaller, larger):
        values[decisions, choice] = costs[decisions, choice]
    return budget.solve(values)
