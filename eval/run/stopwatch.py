"""Times the model of a run under --latency_target as its ONNX export, at the end of the run."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from quant.errors import UserError

if TYPE_CHECKING:
    from torch import nn

    from eval.run.plan import Plan
    from quant.quant_module import QuantModule

MEASURED = "measured_latency"
"""Optional key of a record under --latency_target."""


def stopwatch(plan: Plan, model: nn.Module, modules: Mapping[str, QuantModule]) -> dict[str, Any]:
    """Write the model as ONNX, and measure it with ONNX Runtime: one example, one thread, median.

    Outputs of integer convolutions are rounded, as `eval.latency` measures them.

    Args:
        plan: Plan of the run.
        model: The trained model.
        modules: Its quantized layers, in the chosen formats.

    Returns:
        `ms` and `target_ms`; in place of `ms` the `reason` why it was not measured.
    """
    from eval.config.files import require
    from eval.export.onnx_timing import latencies
    from quant.export.onnx.export import export_onnx

    entry = {"target_ms": plan.config.latency_target}
    inputs = {name: x for name, x in plan.prepared.example_inputs.items() if name != "labels"}
    try:
        require("onnx", "onnxruntime", "onnxscript")
        if (device := next(model.parameters()).device.type) != "cpu":
            raise UserError(f"the model is on {device}: mpq-latency RUN_DIR times it")
        with TemporaryDirectory() as folder:
            path = Path(folder) / "model.onnx"
            export_onnx(path, model, modules, inputs, [inputs])
            ((taken,),) = latencies([([path], inputs)])
    except UserError as error:
        return {**entry, "reason": str(error)}
    return {**entry, "ms": taken}


def stopwatch_line(record: Mapping[str, Any]) -> str | None:
    """Compare the measured latency with the target; None for runs without one."""
    if MEASURED not in record:
        return None
    found = record[MEASURED]
    if "reason" in found:
        return f"exported file: not timed: {found['reason']}"
    kept = "within" if found["ms"] <= found["target_ms"] else "NOT within"
    return f"exported file: {found['ms']:.4g} ms on ONNX Runtime, one thread: {kept} {found['target_ms']:.4g} ms"
