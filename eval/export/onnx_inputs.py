"""Example inputs that a run's model is traced and timed with, and its float model as an ONNX file."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from quant.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor

    from eval.export.finished_run import FinishedRun

CALIBRATION, CALIBRATION_BATCH = 128, 32


def example(run: FinishedRun) -> dict[str, Tensor]:
    """One example of the run's data, as the model takes it, without its label."""
    return {name: x for name, x in run.plan.prepared.example_inputs.items() if name != "labels"}


def examples(run: FinishedRun) -> list[dict[str, Tensor]]:
    """Batches of training examples that --round_outputs finds its ranges on; none without it.

    Raises UserError if there is nothing to round.
    """
    from eval.data.dataset import not_augmented
    from quant.export.onnx.layers import narrow
    from quant.quant_conv2d import QuantConv2d

    if not run.round_outputs:
        return []
    if not any(isinstance(module, QuantConv2d) and all(map(narrow, module.formats)) for module in run.modules.values()):
        raise UserError("--round_outputs: no convolution of this run has weights and inputs in integers of 2 to 8 bits")
    prepared = run.plan.prepared
    rows = not_augmented(prepared.train)
    batches = []
    for start in range(0, min(CALIBRATION, len(rows)), CALIBRATION_BATCH):
        taken = [rows[place] for place in range(start, min(start + CALIBRATION_BATCH, len(rows)))]
        batch = prepared.data_collator(taken)
        batches.append({name: x for name, x in batch.items() if name != "labels"})
    return batches


def write_float(run: FinishedRun, traced: Any, path: Path) -> None:
    """The run's model without any format, as ONNX; `traced` is its trace in the formats it has."""
    from quant.convert import in_float
    from quant.export.onnx.export import trace, write_onnx
    from quant.formats import BlockFormat

    blocks = any(isinstance(module.formats[1], BlockFormat) for module in run.modules.values())
    with in_float(run.modules):
        # Blocks of activations are in the trace itself.
        write_onnx(path, trace(run.model, run.modules, example(run)) if blocks else traced, run.modules)
