"""The trained model on disk: safetensors with all ranges, and what builds the module around them again."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn
from transformers import PretrainedConfig

from cost.cost import assignment_from_json, assignment_to_json
from eval.text_nets import CandidateScorer
from quant.convert import Assignment, quantize_model, set_formats
from quant.errors import UserError
from quant.formats import FLOAT, parse_format
from quant.migration import Migration, added, attach
from quant.placement import attach_quantizers, placed_sites
from quant.quantizer import QuantizerConfig
from trainer.checkpoint import load_tensors, save_tensors, write_json

if TYPE_CHECKING:
    from eval.model_bundle import ModelBundle
    from eval.run_config import RunConfig
    from quant.quant_module import QuantModule

QUANTIZATION = "quantization.json"


def save_model(
    folder: Path,
    config: RunConfig,
    bundle: ModelBundle,
    modules: dict[str, QuantModule],
    assignment: Assignment,
    num_labels: int,
) -> None:
    """Write the model as it is now: weights, ranges, assignment, and the names that `load_model` builds it from."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in bundle.model.state_dict().items()}
    save_tensors(tensors, folder / "model.safetensors")
    if isinstance(settings := getattr(bundle.model, "config", None), PretrainedConfig):
        owner = bundle.model.model if isinstance(bundle.model, CandidateScorer) else bundle.model
        settings.architectures = [type(owner).__name__]  # which head: nothing else says it
        settings.save_pretrained(folder)
        name_classes(folder / "config.json", settings)
    if bundle.tokenizer is not None:
        bundle.tokenizer.save_pretrained(folder)
    first = next(iter(modules.values()), None)
    formats = [] if first is None else [*first.weight_quantizer.grids, *first.input_quantizer.grids]
    write_json(
        folder / QUANTIZATION,
        {
            "build": {"task": config.task, "model": config.model, "image_size": bundle.image_size},
            "num_labels": num_labels,
            "assignment": assignment_to_json(assignment),
            "formats": list(dict.fromkeys(formats)),
            "weight": None if first is None else asdict(first.weight_quantizer.config),
            "activation": None if first is None else asdict(first.input_quantizer.config),
            "migration": asdict(added(bundle.model)),
            "placement": placed_sites(bundle.model),
        },
    )


def name_classes(path: Path, settings: PretrainedConfig) -> None:
    """Write the names of a model's classes into its config.json, where transformers has left them out.

    So it does where there are two; on loading it takes the architecture's default then, which is three for BART.
    """
    classes = {"id2label": settings.id2label, "label2id": settings.label2id}
    write_json(path, classes | json.loads(path.read_text()))


def load_model(folder: str | Path) -> nn.Module:
    """The model of a finished run (its folder, or the `model` folder in it), in eval mode and in its formats.

    Raises UserError if the folder holds no saved model.
    """
    folder = Path(folder)
    folder = folder / "model" if (folder / "model").is_dir() else folder
    if not (folder / QUANTIZATION).is_file():
        raise UserError(f"{folder}: holds no {QUANTIZATION}; give the folder of a finished run")
    saved = json.loads((folder / QUANTIZATION).read_text())
    model = build_architecture(folder, saved)
    assignment = assignment_from_json(saved["assignment"])
    if saved["weight"] is not None:
        modules = quantize_model(
            model,
            include=list(assignment),
            formats=[parse_format(name) for name in saved["formats"]],
            weight=QuantizerConfig(**saved["weight"]),
            activation=QuantizerConfig(**saved["activation"]),
        )
        attach_quantizers(model, modules, saved.get("placement", {}))
        used = {format for pair in assignment.values() for format in pair if format != FLOAT}
        set_formats(modules, assignment if used else {})
    model.load_state_dict(load_tensors(folder / "model.safetensors"))
    return model.eval()


def build_architecture(folder: Path, saved: Mapping[str, Any]) -> nn.Module:
    """The float architecture that `saved` (what `save_model` noted) names, without its weights."""
    from eval.models import build_architecture as build

    names = saved.get("build", {})  # a tuner's model has none, but a config.json
    if not names and not (folder / "config.json").is_file():
        raise UserError(f"{folder}: holds no config.json, and {QUANTIZATION} does not say which architecture this is")
    task, model_name, size = (names.get(key) for key in ("task", "model", "image_size"))
    model = build(task or "", model_name or "", saved.get("num_labels", 0), folder, size)
    if "migration" in saved:
        attach(model, Migration(**saved["migration"]))
    return model
