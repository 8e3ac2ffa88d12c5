"""quantization.json: how a saved model is quantized, which has to be restored before its tensors are read."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch import nn
from transformers import PreTrainedModel, Trainer

from cost.cost import assignment_from_json, assignment_to_json
from quant.convert import Assignment, describe_quantizers, quantize_as_described, set_formats
from quant.elastic.saved import described_sizes, shrink
from quant.formats import FLOAT, parse_format
from quant.quant_module import QuantModule
from quant.transforms.kv_cache import caches_of, describe_caches
from quant.transforms.migration import Migration, added, attach
from quant.transforms.placement import attach_quantizers, placed_sites
from trainer.training.checkpoint import write_json
from trainer.training.saved_files import QUANTIZATION


def write_quantization(
    folder: Path, model: nn.Module, modules: Mapping[str, QuantModule], assignment: Assignment, **more: Any
) -> None:
    """Write how the layers of a model are quantized.

    Args:
        folder: folder of the saved model.
        model: the quantized model.
        modules: layer name -> quantized layer.
        assignment: formats of the layers.
        **more: further entries.
    """
    quantizers = [quantizer for m in modules.values() for quantizer in (m.weight_quantizer, m.input_quantizer)]
    formats = [name for quantizer in quantizers for name in quantizer.grids]
    described = {
        "assignment": assignment_to_json(assignment),
        "formats": list(dict.fromkeys(formats)),
        **describe_quantizers(modules),
        "migration": asdict(added(model)),
        "placement": placed_sites(model),
        "caches": describe_caches(model)["formats"],
    }
    if sizes := described_sizes(model):
        described["architecture"] = sizes
    write_json(folder / QUANTIZATION, {**more, **described})


def write_companions(folder: Path, trainer: Trainer) -> None:
    """Write the configuration of a transformers model and its tokenizer or processor."""
    if isinstance(trainer.model, PreTrainedModel):
        config = copy.deepcopy(trainer.model.config)
        config.architectures = [type(trainer.model).__name__]
        config.save_pretrained(folder)
    processing: Any = trainer.processing_class or getattr(trainer.data_collator, "tokenizer", None)
    if processing is not None:
        processing.save_pretrained(folder)


def migrate_again(model: nn.Module, described: Mapping[str, Any]) -> None:
    """Give a float model, in place, the sizes of a saved one, and add the modules of its migration."""
    shrink(model, described.get("architecture", {}))
    if "migration" in described:
        attach(model, Migration(**described["migration"]))


def quantize_again(model: nn.Module, described: Mapping[str, Any]) -> None:
    """Quantize a float model in place as the contents of a quantization.json describe."""
    migrate_again(model, described)
    cached = described.get("caches", {})
    assignment = assignment_from_json(described["assignment"])
    assignment = {name: pair for name, pair in assignment.items() if name not in cached}
    modules: dict[str, QuantModule] = {}
    if described.get("weight") is not None:  # else a float run: no layer was replaced
        formats = [parse_format(name) for name in described["formats"]]
        modules = quantize_as_described(model, assignment, described, formats)
    attach_quantizers(model, modules, described.get("placement", {}))
    for name, cache in caches_of(model).items():
        cache.set_formats(parse_format(cached[name]))
    used = {format for pair in assignment.values() for format in pair if format != FLOAT}
    set_formats(modules, assignment if modules and used else {})
