"""What an export starts from: a finished run, its record, its settings and its model; what it may not start from."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from eval.config.parser import parse_written
from eval.config.run_config import RUN_FILE
from quant.errors import UserError

if TYPE_CHECKING:
    from torch import nn

    from cost.profile import LayerProfile
    from eval.config.run_config import RunConfig
    from eval.modeling.inputs import ModelInputs
    from eval.run.plan import Plan
    from quant.quant_module import QuantModule


NEEDED = ("assignment", "cost", "cost_target", "cost_type", "cost_unit", "layers", "metrics", "model", "run_id", "task")
"""fields of a record that exports tell of"""


@dataclass(frozen=True)
class FinishedRun:
    """A run folder whose record says 'finished'; model and data are loaded when asked for."""

    folder: Path
    record: dict[str, Any]
    data_dir: str | None = None
    """where the data stands now, if not where the run found it"""
    round_outputs: bool = False
    """ONNX: whether what convolutions return is rounded to 8 bits too"""

    @cached_property
    def config(self) -> RunConfig:
        """The run's settings. Raises UserError where they no longer hold: a folder that is gone, say."""
        overrides: Sequence[str] = () if self.data_dir is None else ("--data_dir", self.data_dir)
        return parse_written(self.folder / RUN_FILE, overrides)

    @cached_property
    def plan(self) -> Plan:
        """The run's data, prepared as it had them."""
        from eval.run.plan import make_plan

        return make_plan(self.config)

    @cached_property
    def inputs(self) -> ModelInputs:
        """What goes into the model: as the run saved it, or found again from its data where it is an older one."""
        from eval.modeling.inputs import from_json
        from eval.run.plan import inputs_of
        from trainer.training.quantization_file import QUANTIZATION

        saved = json.loads((self.folder / "model" / QUANTIZATION).read_text())
        known = saved.get("build", {}).get("inputs")
        return inputs_of(self.plan) if known is None else from_json(known)

    @cached_property
    def model(self) -> nn.Module:
        """The trained model in its formats, in eval mode, on the CPU."""
        from eval.saved_model import load_model
        from quant.transforms.placement import placed_sites

        model = load_model(self.folder)
        if placed_sites(model):
            raise UserError(
                f"RUN_DIR {self.folder}: quantizes more than layers (--high_precision_ops, --quantize_residual_adds, "
                "--quantize_products or --quantize_embeddings), which no export has a place for"
            )
        return model

    @cached_property
    def modules(self) -> dict[str, QuantModule]:
        """The model's searched layers by name; none in a float run."""
        from quant.quant_module import QuantModule

        return {name: module for name, module in self.model.named_modules() if isinstance(module, QuantModule)}

    def profiles(self, evaluated: bool) -> Sequence[LayerProfile]:
        """The layers' sizes: the record's, or with attention charged, which it does not hold, measured again."""
        from cost.profile import LayerProfile

        if evaluated:
            return self.plan.profiles
        if self.config.charge_attention:
            raise UserError("--no_evaluate: this run charges attention, whose share only its model and data tell")
        return [
            LayerProfile(layer["name"], layer["macs"], layer["params"], 0, 0, "", 1) for layer in self.record["layers"]
        ]


def finished_run(folder: Path, data_dir: str | None = None) -> FinishedRun:
    """The run in `folder`. Raises UserError, one line with the reason, if it failed or never finished."""
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
    return FinishedRun(folder, record, data_dir)
