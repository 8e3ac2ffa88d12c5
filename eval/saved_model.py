"""Saves a trained model as safetensors with all ranges, and loads it again as a module."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn
from transformers import PretrainedConfig

from eval.budgets import attach_budgets, set_budget
from eval.modeling.inputs import ModelInputs, to_json
from eval.modeling.text_nets import CandidateScorer
from quant.convert import Assignment
from quant.errors import UserError
from trainer.training.checkpoint import CheckpointError, load_tensors, save_weights, write_json
from trainer.training.quantization_file import QUANTIZATION, migrate_again, quantize_again, write_quantization
from trainer.training.saved_files import WEIGHTS

if TYPE_CHECKING:
    from eval.config.run_config import RunConfig
    from eval.modeling.bundle import ModelBundle
    from quant.quant_module import QuantModule


def save_model(
    folder: Path,
    config: RunConfig,
    bundle: ModelBundle,
    modules: dict[str, QuantModule],
    assignment: Assignment,
    num_labels: int,
    inputs: ModelInputs,
) -> None:
    """Write a model with everything that `load_model` needs to rebuild it.

    Args:
        folder: where to write; created if needed.
        config: the config of the run.
        bundle: the model, with its tokenizer and image settings.
        modules: its quantized layers by name.
        assignment: the formats of each layer.
        num_labels: outputs of the head.
        inputs: description of inputs and classes, saved for users of the model.
    """
    folder.mkdir(parents=True, exist_ok=True)
    save_weights(bundle.model.state_dict(), folder)
    if isinstance(settings := getattr(bundle.model, "config", None), PretrainedConfig):
        owner: Any = bundle.model.model if isinstance(bundle.model, CandidateScorer) else bundle.model
        settings.architectures = [type(owner).__name__]  # names the head
        settings.save_pretrained(folder)
        name_classes(folder / "config.json", settings)
        if owner.can_generate():  # not by save_pretrained, which refuses settings of some published models
            write_json(folder / "generation_config.json", owner.generation_config.to_diff_dict())
    if bundle.tokenizer is not None:
        bundle.tokenizer.save_pretrained(folder)
    build: dict[str, Any] = {"task": config.task, "model": bundle.name or config.model, "name": config.model_name}
    build |= {"image_size": bundle.image_size, "pixels": bundle.pixels if bundle.kind == "image" else None}
    build["inputs"] = to_json(inputs)
    write_quantization(folder, bundle.model, modules, assignment, build=build, num_labels=num_labels)


def name_classes(path: Path, settings: PretrainedConfig) -> None:
    """Write the names of a model's classes into its config.json.

    transformers omits them if there are two classes, its general default. When loading, it then uses the default of
    the architecture, which is three for BART.
    """
    classes = {"id2label": settings.id2label, "label2id": settings.label2id}
    write_json(path, classes | json.loads(path.read_text()))


def load_model(folder: str | Path, model: nn.Module | None = None, *, target_bits: float | None = None) -> nn.Module:
    """Load a saved model in eval mode, with its layers in the chosen formats.

    The model of a run with several `--target_bits` has `budgets`, their bits, and `set_budget(bits)`, which switches
    between them at run time.

    Args:
        folder: the folder of a finished run, its `model` folder, or one that a trainer's `save_model` wrote.
        model: a float model of the same architecture, which is quantized in place. Needed for an architecture that
            cannot be built by name.
        target_bits: one of the budgets of a run with several; None: the largest.

    Raises:
        UserError: if the folder holds no saved model or a damaged one, if `model` is needed, if `model` has another
            architecture, or if the run has no such budget.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; give the folder of a finished run, or its model folder")
    folder = folder / "model" if (folder / "model").is_dir() else folder
    if missing := [name for name in (QUANTIZATION, WEIGHTS) if not (folder / name).is_file()]:
        raise UserError(
            f"{folder}: is no saved model: it holds no {missing[0]}; give the folder of a finished run, whose model "
            f"folder holds {QUANTIZATION} and {WEIGHTS}"
        )
    try:
        saved = json.loads((folder / QUANTIZATION).read_text())
        tensors = load_tensors(folder / WEIGHTS)
    except (ValueError, CheckpointError) as error:
        raise UserError(f"{folder}: damaged: {error}") from None
    model = float_architecture(folder, saved) if model is None else model
    try:
        quantize_again(model, saved)
        model.load_state_dict(tensors)
    except (UserError, RuntimeError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"{folder}: was saved from a model other than this {type(model).__name__}: {reason}") from None
    attach_budgets(model, folder)
    if target_bits is not None:
        set_budget(model, target_bits)
    return model.eval()


def build_architecture(folder: Path, saved: Mapping[str, Any]) -> nn.Module:
    """Build the architecture of a saved model with the changes of its migration, without loading weights.

    Args:
        folder: the folder of the saved model.
        saved: the content of its quantization.json.
    """
    model = float_architecture(folder, saved)
    migrate_again(model, saved)
    return model


def float_architecture(folder: Path, saved: Mapping[str, Any]) -> nn.Module:
    """Build the float architecture that `saved` names, without loading weights; raise UserError if it names none."""
    from eval.models import build_architecture as build

    names = saved.get("build", {})  # a model saved by a trainer has none, but may have a config.json
    if not names and not (folder / "config.json").is_file():
        raise UserError(f"{folder}: its architecture is not known by name; give it: load_model(folder, model)")
    task, model_name, size = (names.get(key) for key in ("task", "model", "image_size"))
    return build(task or "", model_name or "", saved.get("num_labels", 0), folder, size)
