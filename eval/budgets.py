"""The budgets of one run in one file of shared weights: what each changes of the model, and switching between them.

Beside the weights in the model folder of a run with several `--target_bits`, budgets.json holds the formats of each
budget, and budgets.safetensors the tensors that differ from model.safetensors: statistics of batch norms, ranges of
activations, and weights that were rounded for one budget.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MethodType

import torch
from torch import Tensor, nn

from cost.cost import assignment_from_json
from quant.convert import set_formats
from quant.errors import UserError
from quant.quant_module import QuantModule
from quant.transforms.kv_cache import caches_of
from trainer.training.checkpoint import CheckpointError, load_tensors, save_tensors, write_json
from trainer.training.saved_files import QUANTIZATION, WEIGHTS

BUDGETS = "budgets.json"
DIFFERING = "budgets.safetensors"


@dataclass
class Budgets:
    """The budgets of a loaded model."""

    assignments: dict[float, dict[str, Sequence[str]]]
    """Bits -> layer name -> names of the formats of weight and input."""
    tensors: dict[float, dict[str, Tensor]]
    """Bits -> the values of the tensors that differ between budgets."""


def write_budgets(own: Path, bits: float, others: Mapping[float, Path]) -> None:
    """Write what the models of a run's other budgets change of its own.

    Args:
        own: Model folder of the run, whose budget is the largest.
        bits: Its budget.
        others: The other budgets, and the model folders with their complete models.
    """
    base = load_tensors(own / WEIGHTS)
    assignments = {f"{bits:g}": _assignment(own)}
    differing: dict[str, Tensor] = {}
    for budget, folder in others.items():
        assignments[f"{budget:g}"] = _assignment(folder)
        tensors = load_tensors(folder / WEIGHTS)
        differing |= {f"{budget:g}/{name}": t for name, t in tensors.items() if not torch.equal(t, base[name])}
    save_tensors(differing, own / DIFFERING)
    write_json(own / BUDGETS, assignments)


def add_budget(run_folder: Path, bits: float) -> None:
    """Add a budget to the model of a run, once its record and model are in `3.2b` in the run's folder."""
    own = run_folder / "model"
    known = assignments_of(own)
    others = {
        budget: run_folder / f"{budget:g}b" / "model" for budget in sorted({*known, bits}) if budget != max(known)
    }
    write_budgets(own, max(known), others)


def _assignment(folder: Path) -> dict[str, Sequence[str]]:
    try:
        assignment: dict[str, Sequence[str]] = json.loads((folder / QUANTIZATION).read_text())["assignment"]
    except FileNotFoundError:
        raise UserError(f"{folder}: the model of this budget is missing: {QUANTIZATION}") from None
    return assignment


def assignments_of(folder: Path) -> dict[float, dict[str, Sequence[str]]]:
    """Read the budgets of a model folder: bits -> assignment in JSON. Raises UserError if the file is damaged."""
    try:
        return {float(bits): own for bits, own in json.loads((folder / BUDGETS).read_text()).items()}
    except (ValueError, AttributeError) as error:
        raise UserError(f"{folder}: {BUDGETS} is damaged: {error}") from None


def attach_budgets(model: nn.Module, folder: Path) -> None:
    """Give a loaded model `budgets`, their bits in ascending order, and `set_budget(bits)`, if its run has several.

    Args:
        model: The model, as `eval.saved_model.load_model` restores it from the folder.
        folder: Its model folder.

    Raises:
        UserError: If a file is damaged.
    """
    if not (folder / BUDGETS).is_file():
        return
    assignments = assignments_of(folder)
    try:
        stored = load_tensors(folder / DIFFERING)
        state = model.state_dict()
        shared = {name: state[name].clone() for name in {key.partition("/")[2] for key in stored}}
    except (ValueError, KeyError, AttributeError, CheckpointError) as error:
        raise UserError(f"{folder}: {BUDGETS} or {DIFFERING} is damaged: {error}") from None
    tensors = {bits: {name: stored.get(f"{bits:g}/{name}", shared[name]) for name in shared} for bits in assignments}
    model.budgets = tuple(sorted(assignments))  # type: ignore[assignment]
    model.of_budgets = Budgets(assignments, tensors)  # type: ignore[assignment]
    model.set_budget = MethodType(set_budget, model)  # type: ignore[assignment]


def set_budget(model: nn.Module, bits: float) -> None:
    """Put a model into the formats of one of its run's budgets, with the statistics and ranges that belong to them.

    Args:
        model: A model of `load_model`.
        bits: One of `model.budgets`.

    Raises:
        UserError: If its run has no such budget.
    """
    known = getattr(model, "of_budgets", None)
    if known is None:
        raise UserError(f"target_bits {bits:g}: the run of this model has one budget; give several to --target_bits")
    if bits not in known.assignments:
        choices = ", ".join(f"{budget:g}" for budget in sorted(known.assignments))
        raise UserError(
            f"target_bits {bits:g}: no budget of this run; choices: {choices}; eval_run.py --resolve RUN adds others"
        )
    state = model.state_dict()
    with torch.no_grad():
        for name, value in known.tensors[bits].items():
            state[name].copy_(value)
    caches, assignment = caches_of(model), assignment_from_json(known.assignments[bits])
    for name, cache in caches.items():
        cache.set_formats(assignment[name][0])
    layers = {name: m for name, m in model.named_modules(remove_duplicate=False) if isinstance(m, QuantModule)}
    set_formats(layers, {name: pair for name, pair in assignment.items() if name not in caches})
