"""Loads a finished run for export: its record, its settings, its data and its model."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from eval.config.parser import parse_written
from eval.config.run_config import RUN_FILE
from eval.run.schema import FIELDS
from quant.engines.table import ENGINES
from quant.errors import UserError

if TYPE_CHECKING:
    from torch import nn

    from cost.profile import FileShare, LayerProfile
    from eval.config.run_config import RunConfig
    from eval.modeling.inputs import ModelInputs
    from eval.run.plan import Plan
    from quant.quant_module import QuantModule


NEEDED = ("assignment", "cost", "cost_target", "cost_type", "cost_unit", "layers", "metrics", "model", "run_id", "task")
"""Keys of a record that exports need."""


@dataclass(frozen=True)
class FinishedRun:
    """A run folder with a record of status 'finished'. Model and data are loaded on first access."""

    folder: Path
    record: dict[str, Any]
    data_dir: str | None = None
    """Replaces the --data_dir of the run, for data that has been moved."""
    allow_fake: bool = False
    """torchao only: export a run of which torchao runs no layer."""
    round_outputs: bool | None = None
    """ONNX only: also quantize the outputs of convolutions to 8 bits; None: where the metric allows it."""
    round_embeddings: bool = True
    """ONNX only: store embeddings of text models that have no format in 4 or 8 bits."""

    @cached_property
    def config(self) -> RunConfig:
        """The settings of the run.

        Raises:
            UserError: They are no longer valid, for example because a folder is missing.
        """
        overrides: Sequence[str] = () if self.data_dir is None else ("--data_dir", self.data_dir)
        return parse_written(self.folder / RUN_FILE, overrides)

    @cached_property
    def plan(self) -> Plan:
        """The plan of the run, with its data prepared in the same way; of an architecture, that of the chosen one."""
        from eval.run.chosen_architecture import chosen_plan
        from eval.run.plan import make_plan

        plan = make_plan(self.config)
        if plan.architecture is None:
            return plan
        return chosen_plan(replace(plan, bundle=replace(plan.bundle, model=self.model)))

    @cached_property
    def inputs(self) -> ModelInputs:
        """Inputs of the model: as saved by the run, or derived from its data for older runs that did not save them."""
        from eval.modeling.inputs import from_json
        from eval.run.plan import inputs_of
        from trainer.training.quantization_file import QUANTIZATION

        saved = json.loads((self.folder / "model" / QUANTIZATION).read_text())
        inputs = saved.get("build", {}).get("inputs")
        return inputs_of(self.plan) if inputs is None else from_json(inputs)

    @cached_property
    def model(self) -> nn.Module:
        """The trained and quantized model, in eval mode on the CPU."""
        from eval.saved_model import load_model
        from quant.transforms.placement import is_cached, placed_sites

        model = load_model(self.folder)
        if not all(map(is_cached, placed_sites(model))):
            raise UserError(
                f"RUN_DIR {self.folder}: quantizes more than layers (--high_precision_ops, --quantize_residual_adds, "
                "--quantize_products or --quantize_embeddings), which no export has a place for"
            )
        return model

    @cached_property
    def modules(self) -> dict[str, QuantModule]:
        """Quantized layers of the model by name; empty for a float run."""
        from quant.quant_module import QuantModule

        return {name: module for name, module in self.model.named_modules() if isinstance(module, QuantModule)}

    def check(self) -> None:
        """Load settings and model, and check that the record is theirs.

        Raises:
            UserError: A file is damaged, or the record has other formats than the saved model.
        """
        from quant.formats import parse_format
        from quant.quant_module import runs_in

        _ = self.config
        for name, module in self.modules.items():
            pair = tuple(map(parse_format, self.record["assignment"].get(name, ("float", "float"))))
            if module.formats not in (pair, runs_in(module.reach, pair)):  # type: ignore[arg-type]
                own, told = ("/".join(map(str, formats)) for formats in (module.formats, pair))
                raise UserError(f"RUN_DIR {self.folder}: its record has {name} in {told}, its saved model in {own}")

    def profiles(self, evaluated: bool) -> Sequence[LayerProfile]:
        """Return the profiles of the layers.

        Args:
            evaluated: Whether the export is evaluated, so that the plan of the run is loaded anyway. Otherwise the
                profiles come from the record, which does not include the cost of attention.

        Raises:
            UserError: The run charges attention, and the export is not evaluated.
        """
        from cost.profile import LayerProfile, channels_of, experts_of

        if evaluated:
            return self.plan.profiles
        if self.config.charge_attention:
            raise UserError("--no_evaluate: this run charges attention, whose share only its model and data tell")
        channels = {name: channels_of(module) * experts_of(module) for name, module in self.modules.items()}
        return [
            LayerProfile(
                *(layer["name"], layer["macs"], layer["params"], 0),
                *(channels.get(layer["name"], 0), layer.get("kind", ""), 1),
                file=_share_of(layer),
                engine=self.record.get("engine"),
            )
            for layer in self.record["layers"]
        ]


def _share_of(layer: dict[str, Any]) -> FileShare | None:
    """Return what a layer of a record takes in a packed file; older records hold more numbers of it."""
    from cost.profile import FileShare

    known = {key: value for key, value in layer.get("file", {}).items() if key in FileShare.__dataclass_fields__}
    return FileShare(**known) if known else None


def finished_run(folder: Path, data_dir: str | None = None) -> FinishedRun:
    """Open the finished run in `folder`.

    Args:
        folder: Folder of the run.
        data_dir: Replaces the --data_dir of the run.

    Raises:
        UserError: The folder holds no finished run; the message is one line with the reason.
    """
    if not folder.is_dir():
        raise UserError(f"RUN_DIR {folder}: no such folder")
    result = folder / "result.json"
    if not result.is_file():
        why = "never finished: it has no result.json" if (folder / RUN_FILE).is_file() else "is no run's folder"
        raise UserError(f"RUN_DIR {folder}: {why}; give the folder of a finished run")
    try:
        record = json.loads(result.read_text())
        status = record["status"]
    except (ValueError, KeyError, TypeError):
        raise UserError(f"RUN_DIR {folder}: its result.json is damaged or not a record") from None
    if status != "finished":
        raise UserError(f"RUN_DIR {folder}: the run {status}: {record.get('reason')}; there is nothing to export")
    if not (folder / "model" / "model.safetensors").is_file():
        raise UserError(f"RUN_DIR {folder}: holds no model/model.safetensors")
    if missing := [name for name in NEEDED if name not in record]:
        raise UserError(f"RUN_DIR {folder}: its result.json lacks {', '.join(missing)}: no record of a run")
    wrong = [name for name in NEEDED if name in FIELDS and not isinstance(record[name], FIELDS[name])]
    wrong += [] if record["metrics"] else ["metrics"]
    wrong += [] if record.get("engine") in (None, *ENGINES) else ["engine"]
    if wrong:
        raise UserError(f"RUN_DIR {folder}: its result.json is damaged: {wrong[0]} is {record[wrong[0]]!r}")
    return FinishedRun(folder, record, data_dir)
