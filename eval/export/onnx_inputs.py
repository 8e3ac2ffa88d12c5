"""Example inputs for tracing and timing the model of a run, and the export of its float model to ONNX."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from quant.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor

    from eval.export.finished_run import FinishedRun

CALIBRATION, CALIBRATION_BATCH = 128, 32
"""Number of training examples for --round_outputs, and their batch size."""


def example(run: FinishedRun) -> dict[str, Tensor]:
    """Return the example inputs of the run by name, without labels."""
    return {name: x for name, x in run.plan.prepared.example_inputs.items() if name != "labels"}


def examples(run: FinishedRun) -> list[dict[str, Tensor]]:
    """Return batches of training examples to calibrate --round_outputs on; empty without the flag.

    Raises:
        UserError: No convolution of the run is quantized to integers of at most 8 bits.
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
    """Write the float model of the run as ONNX.

    Args:
        run: Run whose model is written.
        traced: Trace of the quantized model, reused where it does not contain quantized activations.
        path: File to write.
    """
    from quant.convert import in_float
    from quant.export.onnx.export import trace, write_onnx
    from quant.formats import BlockFormat

    blocks = any(isinstance(module.formats[1], BlockFormat) for module in run.modules.values())
    with in_float(run.modules):
        # Block formats of activations are part of the trace, so the float model needs its own trace.
        write_onnx(path, trace(run.model, run.modules, example(run)) if blocks else traced, run.modules)
