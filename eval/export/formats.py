"""The export formats: how to write the model of a run into a folder, and how to load it again."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

from eval.config.files import require
from eval.export.engine_reach import NO_MIX
from quant.errors import UserError

if TYPE_CHECKING:
    from torch import nn

    from eval.export.finished_run import FinishedRun
    from quant.export import LayerVerdict

SIDE_FILES = (
    *("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "vocab.txt"),
    "chat_template.jinja",
)
"""Files of a text model in addition to its weights."""


@dataclass(frozen=True)
class Usage:
    """Python code that runs an export; the model card fills in {folder} and {architecture}."""

    imports: tuple[str, ...]
    load: str
    call: str
    """Code that computes `logits` from `inputs`, a mapping of names to tensors."""
    arrays: bool = False
    """Whether inputs and outputs are numpy arrays instead of tensors."""
    where: str = ""
    """Sentence that names the required packages."""


@dataclass(frozen=True)
class Written:
    """Result of writing an export."""

    layers: dict[str, LayerVerdict]
    sizes: dict[str, int]
    """Part of the file -> its size in bytes; the sum is the size of the file."""
    weight_bytes: int
    """Bytes of the weights of searched layers, including block scales but no other scales."""
    notes: tuple[str, ...] = ()
    facts: dict[str, float] = field(default_factory=dict)
    """Further measurements by name."""
    usage: Usage | None = None
    """How to run this export, if that differs between exports of one format."""
    embeddings: dict[str, LayerVerdict] = field(default_factory=dict)
    """Embeddings that the run left in float, and the export rounds."""


@dataclass(frozen=True)
class ExportFormat:
    """An export format: `write` writes a run into a folder, `load` returns a module with its inputs and outputs."""

    write: Callable[[FinishedRun, Path], Written]
    load: Callable[[FinishedRun, Path], nn.Module]
    usage: Usage | None
    """How to run the export, for the model card; None if `Written.usage` says it."""
    needs: tuple[str, ...] = ()
    """Required packages of the extra `export`."""

    def check_installed(self) -> None:
        """Check that the required packages are installed.

        Raises:
            UserError: A package is missing.
        """
        require(*self.needs)


def copy_side_files(run: FinishedRun, folder: Path) -> None:
    """Copy the configuration and the tokenizer of a transformers model into `folder`."""
    for name in SIDE_FILES:
        if (source := run.folder / "model" / name).is_file():
            shutil.copy(source, folder / name)


HOLD_CACHES = ("packed", "torchao")
"""Exports that keep the formats of caches of keys and values."""
NO_CACHE = "it has no place for the format of --quantize_kv_cache"


def refuse_caches(run: FinishedRun, kind: str) -> None:
    """Raise UserError for a run with a quantized cache, whose format this kind of export would lose."""
    from quant.transforms.kv_cache import caches_of

    if caches_of(run.model):
        raise UserError(f"--format {kind}: {NO_CACHE.removeprefix('it ')}; choose {' or '.join(HOLD_CACHES)}")


HOLD_MIXES = ("packed", "onnx")
"""Exports that keep the values of layers whose output channels differ in format."""


def refuse_mixes(run: FinishedRun, kind: str) -> None:
    """Raise UserError for a run with layers whose output channels differ in format, which this export cannot hold."""
    from quant.formats import MixedFormat

    mixed = [name for name, module in run.modules.items() if isinstance(module.formats[0], MixedFormat)]
    if mixed:
        shown = f"{len(mixed)} of {len(run.modules)} layers, such as {mixed[0]} ({run.modules[mixed[0]].formats[0]})"
        raise UserError(f"--format {kind}: {NO_MIX} in {shown}; choose {' or '.join(HOLD_MIXES)}")


def refuse_sizes(run: FinishedRun, kind: str) -> None:
    """Raise UserError if the layers of a run have sizes of their own, which a reader's config.json does not hold."""
    from quant.elastic.saved import UNEVEN, described_sizes

    if described_sizes(run.model):
        raise UserError(f"--format {kind}: {UNEVEN}; choose packed or onnx")


def write_packed(run: FinishedRun, folder: Path) -> Written:
    """Write every weight in its own number of bits, in one safetensors file that this project reads."""
    import json

    from eval.packed_model import PACKED
    from quant.export import packed_sizes
    from quant.export import write_packed as write
    from trainer.training.quantization_file import QUANTIZATION

    saved = json.loads((run.folder / "model" / QUANTIZATION).read_text())
    extra = {"build": saved["build"], "num_labels": saved["num_labels"], "metrics": run.record["metrics"]}
    extra |= {key: saved[key] for key in ("migration", "architecture") if key in saved}
    whole_file = run.record.get("cost_scope") == "file"  # its cost counts 16 bits for what stays in float
    layers = write(folder / PACKED, run.model, run.modules, extra, halve=whole_file)
    copy_side_files(run, folder)
    sizes = packed_sizes(folder / PACKED)
    return Written(layers, sizes, sizes["codes"] + sizes["block_scales"] + sizes["float_weights"])


def load_packed(run: FinishedRun, folder: Path) -> nn.Module:
    """Load a packed export as a module in eval mode."""
    from eval.packed_model import load_packed as load

    return load(folder)


ONNX = "model.onnx"
ROUND_OUTPUTS = (
    "onnx: what convolutions return is rounded to 8 bits too: ONNX Runtime computes in integers; default: where the "
    "metric on training examples stays within 0.2 points"
)
ROUND_EMBEDDINGS = (
    "onnx: embeddings of text models without a format are stored in uint4g16 where the loss on training examples rises "
    "by at most 0.005, else in int8 with a scale per row; the default"
)
ONNX_PACKAGES = ("onnx", "onnxruntime", "onnxscript")


def write_onnx(run: FinishedRun, folder: Path) -> Written:
    """Write an ONNX file with quantize and dequantize nodes, and measure its latency.

    Raises:
        UserError: The model generates text, or has a quantized cache.
    """
    from eval.export.onnx_inputs import describe_inputs, example, write_float
    from eval.export.onnx_outputs import write_file
    from eval.export.onnx_tables import format_of_tables
    from eval.export.onnx_timing import latencies
    from quant.export.onnx.export import onnx_sizes, trace
    from quant.export.tables import rounded_tables

    if (kind := run.plan.data.kind) == "summary":
        raise UserError(f"--format onnx: a {kind} model writes; choose packed")
    refuse_caches(run, "onnx")
    inputs, modules = example(run), run.modules
    of_tables, why = format_of_tables(run)
    with rounded_tables(run.model, of_tables) as tables:
        traced = trace(run.model, {**modules, **tables}, inputs)
        stored, notes, facts = write_file(run, folder / ONNX, traced, {**modules, **tables})
        float_file = folder / "float.onnx"
        write_float(run, traced, float_file, {**modules, **tables})
    describe_inputs(run, folder / ONNX)
    copy_side_files(run, folder)
    sizes = onnx_sizes(folder / ONNX, stored, tables)
    (own, plain), *_ = latencies([((folder / ONNX, float_file), inputs)])
    float_bytes = float_file.stat().st_size
    float_file.unlink()
    note = (
        f"float ONNX: {float_bytes:,} bytes; one example: {plain:.3g} ms in float, {own:.3g} ms exported "
        f"({own / plain:.2f} of float; ONNX Runtime, 1 thread)"
    )
    if own > plain and (told := advice(run)):
        note += f"; to be faster than float: {told}"
    if tables:
        notes = (*notes, why)
    facts = {"float_onnx_bytes": float_bytes, "latency_ms": own, "float_latency_ms": plain, **facts}
    weight_bytes = sizes["codes"] + sizes["block_scales"] + sizes["float_weights"]
    layers = {name: stored[name] for name in modules}
    embeddings = {name: stored[name] for name in tables}
    return Written(layers, sizes, weight_bytes, (note, *notes), facts, onnx_usage(folder / ONNX), embeddings)


def advice(run: FinishedRun) -> str:
    """Return what makes the ONNX file of a run faster that is slower than float; "" if the run has done all of it."""
    int8 = "a search with --engine onnxruntime takes formats that it computes in, of which int8 is the fastest"
    undone = {
        "--round_outputs lets convolutions run in integers": run.inputs.pixels is not None and not run.round_outputs,
        int8: run.config.engine != "onnxruntime",
    }
    return ", and ".join(told for told, left in undone.items() if left)


def onnx_usage(path: Path) -> Usage:
    """Return the code that runs an ONNX export with the session settings in its metadata."""
    from eval.export.onnx_timing import settings_of

    settings = [f'options.add_session_config_entry("{key}", "{value}")' for key, value in settings_of(path).items()]
    options = ["options = onnxruntime.SessionOptions()", *settings] if settings else []
    session = f'session = onnxruntime.InferenceSession("{ONNX}"{", options" if settings else ""})'
    return Usage(
        ("import onnxruntime",),
        "\n".join([*options, session]),
        ONNX_CALL,
        arrays=True,
        where="It needs onnxruntime and what it imports besides, and nothing of this repository. OpenVINO reads the "
        "file too: give it INFERENCE_PRECISION_HINT=f32, since on some processors it computes in bfloat16 by default.",
    )


def load_onnx(run: FinishedRun, folder: Path) -> nn.Module:
    """Load an ONNX export as a module that runs on ONNX Runtime."""
    from eval.export.onnx_model import load_onnx_model

    return load_onnx_model(folder / ONNX, run.plan.data.kind)


ALLOW_FAKE = "torchao: also write a file of which torchao runs no layer: all layers then round in float32"


def write_torchao(run: FinishedRun, folder: Path) -> Written:
    """Write a packed export that is loaded with torchao's weights, and note which layers torchao supports.

    Raises:
        UserError: torchao runs none of the layers, and `run.allow_fake` does not ask for the file nevertheless.
    """
    from eval.packed_model import load_torchao
    from quant.engines.table import ENGINES
    from quant.export.torchao import mismatch
    from quant.formats import FLOAT

    refuse_mixes(run, "torchao")
    quantized = {name: module for name, module in run.modules.items() if module.formats != (FLOAT, FLOAT)}
    reasons = {name: mismatch(module) for name, module in quantized.items()}
    if quantized and None not in reasons.values() and not run.allow_fake:
        name, reason = next(iter(reasons.items()))
        raise UserError(
            f"--format torchao: torchao runs none of the {len(quantized)} quantized layers ({name}: {reason}); it runs "
            f"Linear layers in {ENGINES['torchao'].choices()}; choose packed or onnx, or give --allow_fake for a file "
            "that rounds in float32"
        )
    written = write_packed(run, folder)
    _, layers = load_torchao(folder)
    runs = sum(reason is None for reason in reasons.values())
    note = f"torchao runs {runs} of {len(quantized)} layers; the file holds weights in their own bits, torchao in bytes"
    return replace(written, layers=layers, notes=(note,))


def load_torchao(run: FinishedRun, folder: Path) -> nn.Module:
    """Load the export as a module whose Linear layers have torchao's weights."""
    from eval.packed_model import load_torchao

    return load_torchao(folder)[0]


def write_compressed(run: FinishedRun, folder: Path) -> Written:
    """Write a compressed-tensors checkpoint for transformers and vLLM.

    Raises:
        UserError: The model is not from transformers, has migration factors, or mixes formats within a fused group.
    """
    import json

    from transformers import PreTrainedModel

    from eval.export.onnx_inputs import example
    from eval.layers.fused_groups import fused_groups
    from eval.saved_model import build_architecture, name_classes
    from quant.export.compressed_tensors import BLOCK_SCHEMES, TRANSFORMERS, check_fused, export_compressed
    from quant.transforms.migration import added
    from trainer.training.quantization_file import QUANTIZATION

    refuse_caches(run, "compressed-tensors")
    refuse_mixes(run, "compressed-tensors")
    refuse_sizes(run, "compressed-tensors")
    if added(run.model).factors:
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
    alone = sum(layer.engine == TRANSFORMERS for layer in layers.values())
    notes = [f"vLLM has kernels for {len(layers) - alone} of {len(layers)} layers, transformers runs all of them"]
    usage = COMPRESSED_USAGE
    if any(layer.exported_weight in BLOCK_SCHEMES for layer in layers.values()):
        notes.append("transformers unpacks 4-bit floats to bfloat16, and runs the model in that type")
        usage = replace(usage, load=usage.load.replace('"{folder}"', '"{folder}", dtype=torch.bfloat16'))
    return Written(layers, sizes, weight_bytes, tuple(notes), usage=usage)


def load_compressed(run: FinishedRun, folder: Path) -> nn.Module:
    """Load a compressed-tensors export with transformers, as its model card does."""
    import torch
    import transformers

    from quant.export.compressed_tensors import BLOCK_SCHEMES

    small = any(module.formats[0].name in BLOCK_SCHEMES for module in run.modules.values())
    return getattr(transformers, type(run.model).__name__).from_pretrained(
        folder, dtype=torch.bfloat16 if small else torch.float32, trust_remote_code=False
    )


GGUF = "model.gguf"


def write_gguf(run: FinishedRun, folder: Path) -> Written:
    """Write a GGUF file for llama.cpp.

    Raises:
        UserError: llama.cpp does not compute this model or has no such tokenizer, or the model has migration factors.
    """
    import json

    from transformers import AutoTokenizer, PreTrainedModel

    from eval.export.gguf_model import gguf_contents, reader_config
    from eval.export.gguf_model import write_gguf as write
    from quant.transforms.migration import added

    refuse_caches(run, "gguf")
    refuse_mixes(run, "gguf")
    refuse_sizes(run, "gguf")
    if not isinstance(run.model, PreTrainedModel) or added(run.model).factors:
        raise UserError(
            "--format gguf: needs a decoder of transformers without the factors of --gamma_migration or "
            "--smooth_quant; choose packed or onnx"
        )
    contents = gguf_contents(run.model, run.modules)
    tokenizer = AutoTokenizer.from_pretrained(run.folder / "model", trust_remote_code=False)
    write(folder / GGUF, run.model, contents, tokenizer, run.record["model"])
    copy_side_files(run, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(reader_config(config, contents), indent=2))
    sizes = {name: tensor.data.nbytes for name, tensor in contents.tensors.items()}
    weights = sum(sizes[name] for name in contents.weights)
    parts = {"weights": weights, "rest": sum(sizes.values()) - weights}
    parts["header"] = (folder / GGUF).stat().st_size - sum(parts.values())
    return Written(contents.layers, parts, weights, tuple(contents.notes))


def load_gguf(run: FinishedRun, folder: Path) -> nn.Module:
    """Load a GGUF export with transformers, as a module with its weights in float32."""
    import contextlib
    import io

    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    with contextlib.redirect_stderr(io.StringIO()):  # a progress bar; failures are exceptions
        read = AutoModelForCausalLM.from_pretrained(
            folder, gguf_file=GGUF, config=config, dtype=torch.float32, trust_remote_code=False
        )
    plain = type(read)(config)  # a Trainer takes no model that is marked as quantized
    plain.load_state_dict(read.state_dict())
    return plain.eval()


PTE = "model.pte"
INPUT_NAMES = "inputs.json"


def write_executorch(run: FinishedRun, folder: Path) -> Written:
    """Write an ExecuTorch program: a graph of core ATen operations, lowered to XNNPACK where it has kernels.

    Raises:
        UserError: torch.export cannot follow the model, ExecuTorch lacks an operation, or there are several outputs.
    """
    import json

    from eval.export.executorch_model import dynamic_shapes, lower
    from eval.export.onnx_inputs import example
    from quant.export.core_aten import core_verdict, export_graph, stored_width

    if (kind := run.plan.data.kind) in ("qa", "summary"):
        raise UserError(f"--format executorch: a {kind} model has several outputs or writes; choose packed")
    refuse_caches(run, "executorch")
    refuse_mixes(run, "executorch")
    inputs = example(run)
    rows = {name: x if x.shape[0] > 1 else x.repeat(2, *(1,) * (x.dim() - 1)) for name, x in inputs.items()}
    length = None if run.inputs.pixels is not None else run.config.max_length
    graph = export_graph(run.model, run.modules, rows, dynamic_shapes(rows, length), decompose=False)
    portable = lower(graph, folder / PTE)
    (folder / INPUT_NAMES).write_text(json.dumps(list(inputs)))
    copy_side_files(run, folder)
    layers = {name: core_verdict(module) for name, module in run.modules.items()}
    stored = sum(stored_width(module) is not None for module in run.modules.values())
    note = f"XNNPACK multiplies by {stored - portable} of {stored} integer weights, portable kernels by the others"
    weights = round(sum(layers[name].weight_bits * module.weight.numel() for name, module in run.modules.items()) / 8)
    whole = (folder / PTE).stat().st_size
    return Written(layers, {"weights": weights, "rest": whole - weights}, weights, (note,))


def load_executorch(run: FinishedRun, folder: Path) -> nn.Module:
    """Load an ExecuTorch program as a module that runs on ExecuTorch."""
    import json

    from eval.export.executorch_model import ExecutorchModel

    return ExecutorchModel(folder / PTE, run.plan.data.kind, json.loads((folder / INPUT_NAMES).read_text()))


CALL = """\
with torch.no_grad():
    logits = model(**inputs).logits"""
OURS = "It needs the package of this repository, installed or with its root in PYTHONPATH."
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
EXECUTORCH_USAGE = Usage(
    ("import json", "from executorch.runtime import Runtime"),
    f'program = Runtime.get().load_program("{PTE}")\n'
    'method = program.load_method("forward")\n'
    f'names = json.load(open("{INPUT_NAMES}"))',
    "logits = method.execute([inputs[name] for name in names])[0]",
    where="It needs the package executorch, whose runtime also runs on phones, and nothing of this repository.",
)
GGUF_USAGE = Usage(
    ("import torch", "from transformers import AutoConfig, AutoModelForCausalLM"),
    'config = AutoConfig.from_pretrained("{folder}")\n'
    f'options = {{{{"gguf_file": "{GGUF}", "config": config, "dtype": torch.float32}}}}\n'
    'model = AutoModelForCausalLM.from_pretrained("{folder}", **options)',
    CALL,
    where=f"llama.cpp runs it: `llama-cli -m {GGUF}`. Transformers reads it with the package gguf, in float32.",
)
ONNX_CALL = """\
feed = {entry.name: inputs[entry.name] for entry in session.get_inputs()}
logits = session.run(["logits"], feed)[0]"""

EXPORT_FORMATS: dict[str, ExportFormat] = {
    "packed": ExportFormat(write_packed, load_packed, PACKED_USAGE),
    "onnx": ExportFormat(write_onnx, load_onnx, None, ONNX_PACKAGES),
    "torchao": ExportFormat(write_torchao, load_torchao, TORCHAO_USAGE, ("torchao",)),
    "compressed-tensors": ExportFormat(write_compressed, load_compressed, COMPRESSED_USAGE, ("compressed_tensors",)),
    "executorch": ExportFormat(write_executorch, load_executorch, EXECUTORCH_USAGE, ("executorch",)),
    "gguf": ExportFormat(write_gguf, load_gguf, GGUF_USAGE, ("gguf",)),
}
