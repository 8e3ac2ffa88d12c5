"""Example inputs for tracing and timing the model of a run, and the export of its float model to ONNX."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quant.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor

    from eval.export.finished_run import FinishedRun
    from quant.quant_module import QuantModule

CALIBRATION, CALIBRATION_BATCH = 128, 32
"""Number of training examples for --round_outputs, and their batch size."""


def example(run: FinishedRun) -> dict[str, Tensor]:
    """Return the example inputs of the run by name, without labels."""
    return {name: x for name, x in run.plan.prepared.example_inputs.items() if name != "labels"}


def examples(run: FinishedRun) -> list[dict[str, Tensor]]:
    """Return batches of training examples to measure the ranges of outputs on.

    Returns:
        The batches; none if outputs stay in float: by the flag, or because there are no convolutions in integers.

    Raises:
        UserError: --round_outputs, but no convolution of the run is quantized to integers of at most 8 bits.
    """
    from eval.data.dataset import not_augmented
    from quant.export.onnx.layers import narrow
    from quant.quant_conv2d import QuantConv2d

    symmetric = run.config.act_symmetric  # for TensorRT, which takes no roundings with a zero point
    if run.round_outputs is False or (run.round_outputs is None and symmetric):
        return []
    if not any(isinstance(module, QuantConv2d) and all(map(narrow, module.formats)) for module in run.modules.values()):
        if run.round_outputs is None:
            return []
        raise UserError("--round_outputs: no convolution of this run has weights and inputs in integers of 2 to 8 bits")
    prepared = run.plan.prepared
    rows = not_augmented(prepared.train)
    batches = []
    for start in range(0, min(CALIBRATION, len(rows)), CALIBRATION_BATCH):
        taken = [rows[place] for place in range(start, min(start + CALIBRATION_BATCH, len(rows)))]
        batch = prepared.data_collator(taken)
        batches.append({name: x for name, x in batch.items() if name != "labels"})
    return batches


def describe_inputs(run: FinishedRun, path: Path) -> None:
    """Add what the model takes and gives (size, mean and standard deviation of images, classes) to an ONNX file.

    Args:
        run: Run of the model.
        path: The file; its metadata get the entry 'inputs', in JSON.
    """
    import json

    import onnx

    from eval.modeling.inputs import to_json

    proto = onnx.load(path)
    entry = proto.metadata_props.add()
    entry.key, entry.value = "inputs", json.dumps(to_json(run.inputs))
    onnx.save(proto, path)


def write_float(run: FinishedRun, traced: Any, path: Path, modules: Mapping[str, QuantModule]) -> None:
    """Write the float model of the run as ONNX.

    Args:
        run: Run whose model is written.
        traced: Trace of the quantized model, reused where it does not contain quantized activations.
        path: File to write.
        modules: The quantized layers of the trace, by name.
    """
    from quant.convert import in_float
    from quant.export.onnx.export import trace, write_onnx
    from quant.formats import BlockFormat

    blocks = any(isinstance(module.formats[1], BlockFormat) for module in modules.values())
    with in_float(modules):
        # Block formats of activations are part of the trace, so the float model needs its own trace.
        write_onnx(path, trace(run.model, modules, example(run)) if blocks else traced, modules)
