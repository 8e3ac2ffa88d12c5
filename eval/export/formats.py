"""The export formats: how each writes a run's model into a folder, and how what it wrote is run again."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

from eval.config.files import require
from quant.errors import UserError

if TYPE_CHECKING:
    from torch import nn

    from eval.export.finished_run import FinishedRun
    from quant.export import LayerVerdict

SIDE_FILES = ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "vocab.txt")
"""what a text model's folder holds beside its weights"""


@dataclass(frozen=True)
class Usage:
    """How an export is run in Python; {folder} and {architecture} are filled in by the model card."""

    imports: tuple[str, ...]
    load: str
    call: str
    """from `inputs`, a mapping of tensors by name, to `logits`"""
    arrays: bool = False
    """whether they are arrays of numpy instead of tensors"""
    where: str = ""
    """what has to be there"""


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
    usage: Usage | None = None
    """how to run it, where that is not the same for all exports of the format"""


@dataclass(frozen=True)
class ExportFormat:
    """One format: write(run, folder) and load(run, folder) -> a module with the run's inputs and outputs."""

    write: Callable[[FinishedRun, Path], Written]
    load: Callable[[FinishedRun, Path], nn.Module]
    usage: Usage | None
    """how to run the export, for the model card; None: `Written` says it"""
    needs: tuple[str, ...] = ()
    """packages of the extra `export`"""

    def check_installed(self) -> None:
        """Raises UserError, naming the packages, if one is missing."""
        require(*self.needs)


def copy_side_files(run: FinishedRun, folder: Path) -> None:
    """Configuration and tokenizer of a model of transformers."""
    for name in SIDE_FILES:
        if (source := run.folder / "model" / name).is_file():
            shutil.copy(source, folder / name)


def write_packed(run: FinishedRun, folder: Path) -> Written:
    import json

    from eval.packed_model import PACKED
    from quant.export import packed_sizes
    from quant.export import write_packed as write
    from trainer.training.quantization_file import QUANTIZATION

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
ROUND_OUTPUTS = "onnx: what convolutions return is rounded to 8 bits too: ONNX Runtime computes in integers"
ONNX_PACKAGES = ("onnx", "onnxruntime", "onnxscript")


def write_onnx(run: FinishedRun, folder: Path) -> Written:
    from eval.export.onnx_inputs import example, examples, write_float
    from eval.export.onnx_timing import latencies
    from quant.export.onnx.export import onnx_sizes, trace
    from quant.export.onnx.export import write_onnx as write

    if (kind := run.plan.data.kind) in ("qa", "summary"):
        raise UserError(f"--format onnx: a {kind} model has several outputs or writes; choose packed")
    inputs, modules = example(run), run.modules
    traced = trace(run.model, modules, inputs)
    layers = write(folder / ONNX, traced, modules, examples(run))
    copy_side_files(run, folder)
    sizes = onnx_sizes(folder / ONNX, layers)
    float_file = folder / "float.onnx"
    write_float(run, traced, float_file)
    (own, plain), *_ = latencies([((folder / ONNX, float_file), inputs)])
    float_bytes = float_file.stat().st_size
    float_file.unlink()
    note = (
        f"float ONNX: {float_bytes:,} bytes; one example: {plain:.3g} ms in float, {own:.3g} ms exported "
        f"({own / plain:.2f} of float; ONNX Runtime, 1 thread)"
    )
    facts = {"float_onnx_bytes": float_bytes, "latency_ms": own, "float_latency_ms": plain}
    weight_bytes = sizes["codes"] + sizes["block_scales"] + sizes["float_weights"]
    return Written(layers, sizes, weight_bytes, (note,), facts, onnx_usage(folder / ONNX))


def onnx_usage(path: Path) -> Usage:
    """How to run an ONNX export, with the settings it asks for."""
    from eval.export.onnx_timing import settings_of

    settings = [f'options.add_session_config_entry("{key}", "{value}")' for key, value in settings_of(path).items()]
    options = ["options = onnxruntime.SessionOptions()", *settings] if settings else []
    session = f'session = onnxruntime.InferenceSession("{{folder}}/{ONNX}"{", options" if settings else ""})'
    return Usage(
        ("import onnxruntime",),
        "\n".join([*options, session]),
        ONNX_CALL,
        arrays=True,
        where="It needs the package onnxruntime, and nothing of this repository.",
    )


def load_onnx(run: FinishedRun, folder: Path) -> nn.Module:
    from eval.export.onnx_model import OnnxModel

    return OnnxModel(folder / ONNX, run.plan.data.kind)


def write_torchao(run: FinishedRun, folder: Path) -> Written:
    from eval.packed_model import load_torchao

    written = write_packed(run, folder)
    _, layers = load_torchao(folder)
    told = sum(layer.as_chosen for layer in layers.values())
    note = f"torchao runs {told} of {len(layers)} layers; the file holds every weight in its own bits, torchao in bytes"
    return replace(written, layers=layers, notes=(note,))


def load_torchao(run: FinishedRun, folder: Path) -> nn.Module:
    from eval.packed_model import load_torchao

    return load_torchao(folder)[0]


def write_compressed(run: FinishedRun, folder: Path) -> Written:
    import json

    from transformers import PreTrainedModel

    from eval.export.onnx_inputs import example
    from eval.layers.fused_groups import fused_groups
    from eval.saved_model import build_architecture, name_classes
    from quant.export.compressed_tensors import check_fused, export_compressed
    from quant.transforms.migration import added
    from trainer.training.quantization_file import QUANTIZATION

    if (migration := added(run.model)).shortcuts or migration.divided:
        raise UserError(
            "--format compressed-tensors: has no place for the factors of this run's --gamma_migration or "
            "--smooth_quant; choose packed or onnx"
        )

    if not isinstance(run.model, PreTrainedModel):
        raise UserError(
            "--format compressed-tensors: needs a model of transformers, this run's is not one; choose packed or onnx"
        )
    check_fused(fused_groups(run.model, run.modules, example(run)).values(), run.modules)
    saved = json.loads((run.folder / "model" / QUANTIZATION).read_text())
    plain = build_architecture(run.folder / "model", saved)
    weights = {name: tensor for name, tensor in run.model.state_dict().items() if "_quantizer." not in name}
    plain.load_state_dict(weights)
    copy_side_files(run, folder)
    layers, weight_bytes = export_compressed(folder, plain.eval(), run.modules)
    name_classes(folder / "config.json", plain.config)  # type: ignore[arg-type]
    file = folder / "model.safetensors"
    sizes = {"weights": weight_bytes, "rest_and_header": file.stat().st_size - weight_bytes}
    return Written(layers, sizes, weight_bytes)


def load_compressed(run: FinishedRun, folder: Path) -> nn.Module:
    import transformers

    return getattr(transformers, type(run.model).__name__).from_pretrained(folder, trust_remote_code=False)


CALL = """\
with torch.no_grad():
    logits = model(**inputs).logits"""
OURS = "From the root of this repository, or where it is installed."
PACKED_USAGE = Usage(
    ("import torch", "from eval.packed_model import load_packed"),
    'model = load_packed("{folder}")  # a torch.nn.Module in eval mode',
    CALL,
    where=OURS,
)
TORCHAO_USAGE = Usage(
    ("import torch", "from eval.packed_model import load_torchao"),
    'model, _ = load_torchao("{folder}")  # a torch.nn.Module whose Linear weights are torchao\'s',
    CALL,
    where=OURS,
)
COMPRESSED_USAGE = Usage(
    ("import torch", "from transformers import {architecture}"),
    'model = {architecture}.from_pretrained("{folder}").eval()',
    CALL,
    where="It needs the packages transformers and compressed-tensors.",
)
ONNX_CALL = """\
feed = {entry.name: inputs[entry.name] for entry in session.get_inputs()}
logits = session.run(["logits"], feed)[0]"""

EXPORT_FORMATS: dict[str, ExportFormat] = {
    "packed": ExportFormat(write_packed, load_packed, PACKED_USAGE),
    "onnx": ExportFormat(write_onnx, load_onnx, None, ONNX_PACKAGES),
    "torchao": ExportFormat(write_torchao, load_torchao, TORCHAO_USAGE, ("torchao",)),
    "compressed-tensors": ExportFormat(write_compressed, load_compressed, COMPRESSED_USAGE, ("compressed_tensors",)),
}
