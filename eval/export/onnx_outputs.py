"""Writes the ONNX file of a run, and decides whether the outputs of its convolutions are rounded to 8 bits."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from eval.export.finished_run import FinishedRun
    from quant.export import LayerVerdict
    from quant.quant_module import QuantModule

MAX_DROP = 0.002
"""Largest loss of the metric on training examples for which outputs are rounded: 0.2 points."""


def write_file(
    run: FinishedRun, path: Path, traced: Any, modules: Mapping[str, QuantModule]
) -> tuple[dict[str, LayerVerdict], tuple[str, ...], dict[str, float]]:
    """Write the ONNX file of a run.

    Without --round_outputs or --no_round_outputs, outputs of convolutions are rounded if the metric on training
    examples stays within `MAX_DROP`.

    Args:
        run: The run.
        path: The file to write.
        traced: Trace of the model.
        modules: Its quantized layers by name.

    Returns:
        How each layer is stored, notes, and measurements by name.
    """
    from eval.export.onnx_inputs import examples
    from quant.export.onnx.export import write_onnx

    batches = examples(run)
    layers = write_onnx(path, traced, modules, batches)
    if not batches or run.round_outputs:
        said = ("the outputs of convolutions are rounded to 8 bits (--round_outputs)",) if batches else ()
        return layers, said, {}
    plain = path.with_name("plain.onnx")
    plain_layers = write_onnx(plain, traced, modules)
    if over_compute_budget(run, layers):
        plain.replace(path)
        note = "the outputs of convolutions are not rounded: inputs held in 8 bits would cost more than the budget"
        return plain_layers, (note,), {}
    metric, rows = run.record["metric"], training_metrics(run, (plain, path))
    before, after = (own[metric] for own in rows)
    allowed = rounding_allowed(metric, before, after)
    if allowed:
        plain.unlink()
    else:
        plain.replace(path)
        layers = plain_layers
    state, other = ("are", "--no_round_outputs leaves") if allowed else ("are not", "--round_outputs rounds")
    note = (
        f"the outputs of convolutions {state} rounded to 8 bits: {metric} on {rows[0]['n']:,} training examples "
        f"{before:.5g} without, {after:.5g} with; {other} them"
    )
    return layers, (note,), {"train_metric": before, "train_metric_rounded_outputs": after}


def over_compute_budget(run: FinishedRun, layers: Mapping[str, LayerVerdict]) -> bool:
    """Whether a file costs more compute than the run's target, because it holds inputs in more bits than chosen."""
    from cost.cost import cost_of_bits

    target = run.record["cost_target"]
    if target is None or run.record["cost_type"] != "compute":
        return False
    profiles = run.plan.profiles
    bits = {name: (layer.weight_bits, layer.activation_bits) for name, layer in layers.items()}
    cost = cost_of_bits(profiles, [bits.get(profile.name, (16, 16)) for profile in profiles], "compute")
    return cost > target * (1 + 1e-12)


def training_metrics(run: FinishedRun, files: tuple[Path, ...]) -> list[dict[str, float]]:
    """Evaluate ONNX files of a run on training examples that no range was measured on.

    Returns:
        The metrics of each file.
    """
    from eval.export.evaluation import evaluate_exported, training_rows
    from eval.export.onnx_inputs import CALIBRATION
    from eval.export.onnx_model import load_onnx_model

    rows = {"train": training_rows(run, CALIBRATION)}
    kind = run.plan.data.kind
    return [evaluate_exported(run, load_onnx_model(file, kind), rows)["train"] for file in files]


def rounding_allowed(metric: str, before: float, after: float) -> bool:
    """Whether a metric loses at most `MAX_DROP` when outputs are rounded; NaN never allows it."""
    from eval.export.evaluation import metric_drop

    return metric_drop(metric, before, after) <= MAX_DROP
