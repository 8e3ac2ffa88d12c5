"""The export formats: how each writes a run's model into a folder, and how what it wrote is run again."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from quant.errors import UserError

if TYPE_CHECKING:
    from torch import nn

    from eval.export_run import FinishedRun
    from quant.export import LayerVerdict

SIDE_FILES = ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "vocab.txt")
"""what a text model's folder holds beside its weights"""


@dataclass(frozen=True)
class Written:
    """What an export wrote."""

    layers: dict[str, LayerVerdict]
    sizes: dict[str, int]
    """bytes of the model's file by what they hold; their sum is the file's size"""
    weight_bytes: int
    """bytes of the searched layers' weights, their block scales included, other scales not"""
    notes: tuple[str, ...] = ()
    facts: dict[str, float] = field(default_factory=dict)
    """what else was measured, by name"""


@dataclass(frozen=True)
class ExportFormat:
    """One format: write(run, folder) and load(run, folder) -> a module with the run's inputs and outputs."""

    write: Callable[[FinishedRun, Path], Written]
    load: Callable[[FinishedRun, Path], nn.Module]
    usage: str
    """how to run the export, in Python, for the model card"""
    needs: tuple[str, ...] = ()
    """packages of requirements-extras.txt"""

    def check_installed(self) -> None:
        """Raises UserError, naming the package and where it is pinned, if one is missing."""
        require(*self.needs)


def require(*packages: str) -> None:
    """Raises UserError if one of these extras is not installed."""
    if missing := [name for name in packages if find_spec(name) is None]:
        raise UserError(f"{missing[0]} is not installed: python -m pip install -r requirements-extras.txt")


def copy_side_files(run: FinishedRun, folder: Path) -> None:
    """Configuration and tokenizer of a model of transformers."""
    for name in SIDE_FILES:
        if (source := run.folder / "model" / name).is_file():
            shutil.copy(source, folder / name)


def write_packed(run: FinishedRun, folder: Path) -> Written:
    import json

    from eval.packed_model import PACKED
    from eval.saved_model import QUANTIZATION
    from quant.export import packed_sizes
    from quant.export import write_packed as write

    saved = json.loads((run.folder / "model" / QUANTIZATION).read_text())
    extra = {"build": saved["build"], "num_labels": saved["num_labels"], "metrics": run.record["metrics"]}
    extra |= {key: saved[key] for key in ("migration",) if key in saved}
    layers = write(folder / PACKED, run.model, run.modules, extra)
    copy_side_files(run, folder)
    sizes = packed_sizes(folder / PACKED)
    return Written(layers, sizes, sizes["codes"] + sizes["block_scales"] + sizes["float_weights"])


def load_packed(run: FinishedRun, folder: Path) -> nn.Module:
    from eval.packed_model import load_packed as load

    return load(folder)


ONNX = "model.onnx"
ONNX_PACKAGES = ("onnx", "onnxruntime", "onnxscript")


def write_onnx(run: FinishedRun, folder: Path) -> Written:
    from eval.latency import example, median_latency, write_float
    from quant.export_onnx import onnx_sizes, trace
    from quant.export_onnx import write_onnx as write

    inputs, modules = example(run), run.modules
    traced = trace(run.model, modules, inputs)
    layers = write(folder / ONNX, traced, modules, run.fold)
    copy_side_files(run, folder)
    sizes = onnx_sizes(folder / ONNX, layers)
    float_file = folder / "float.onnx"
    write_float(run, traced, float_file)
    own, plain = (median_latency(path, inputs) for path in (folder / ONNX, float_file))
    float_bytes = float_file.stat().st_size
    float_file.unlink()
    note = (
        f"float ONNX: {float_bytes:,} bytes; one example: {plain:.3g} ms in float, {own:.3g} ms exported "
        f"({own / plain:.2f} of float; ONNX Runtime, 1 thread)"
    )
    facts = {"float_onnx_bytes": float_bytes, "latency_ms": own, "float_latency_ms": plain}
    return Written(layers, sizes, sizes["codes"] + sizes["block_scales"] + sizes["float_weights"], (note,), facts)


def load_onnx(run: FinishedRun, folder: Path) -> nn.Module:
    from eval.onnx_model import OnnxModel

    return OnnxModel(folder / ONNX, run.plan.data.kind)


PACKED_USAGE = """\
from eval.packed_model import load_packed

model = load_packed("{folder}")  # a torch.nn.Module in eval mode
logits = model({inputs}).logits"""

ONNX_USAGE = """\
import onnxruntime

session = onnxruntime.InferenceSession("{folder}/model.onnx")
logits = session.run(["logits"], {{name: array for name, array in inputs.items()}})[0]  # numpy arrays: {inputs}"""

EXPORT_FORMATS: dict[str, ExportFormat] = {
    "packed": ExportFormat(write_packed, load_packed, PACKED_USAGE),
    "onnx": ExportFormat(write_onnx, load_onnx, ONNX_USAGE, ONNX_PACKAGES),
}
