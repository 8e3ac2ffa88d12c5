"""The engines of `benchmarks.engines`: what each loads of a run, called like a function of arrays.

An engine prepares a folder of three files: the run's export, its weights in float, and the engine's own int8 of these.
"""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from eval.export.__main__ import export
from eval.export.executorch_model import ExecutorchModel, dynamic_shapes, lower
from eval.export.finished_run import FinishedRun
from eval.export.formats import GGUF, INPUT_NAMES, ONNX, PTE, load_compressed
from eval.export.onnx_inputs import CALIBRATION, CALIBRATION_BATCH, example, write_float
from eval.packed_model import load_torchao
from eval.saved_model import build_architecture
from quant.convert import in_float
from quant.errors import UserError
from quant.module_utils import OfOrderedInputs
from trainer.training.quantization_file import QUANTIZATION

Arrays = Mapping[str, np.ndarray]
Call = Callable[[Arrays], np.ndarray]
"""Inputs by name -> logits."""


class Engine(ABC):
    """One engine: how it reads a run, in one thread."""

    title: ClassVar[str]
    format: ClassVar[str]
    """The export that it reads."""
    packages: ClassVar[Mapping[str, str]] = {}
    """Module that it needs -> the package that pip installs it by."""
    why_no_int8: ClassVar[str] = ""
    """Why there is no int8 of its own."""

    def missing(self) -> list[str]:
        """Return the packages that are not installed."""
        return [package for module, package in self.packages.items() if find_spec(module) is None]

    def prepare(self, run: FinishedRun, folder: Path) -> dict[str, Any]:
        """Write the three files into a folder; return the export's verdict."""
        verdict = export(run, self.format, folder / "export", evaluate=False)
        self.write(run, folder)
        return verdict

    @abstractmethod
    def write(self, run: FinishedRun, folder: Path) -> None:
        """Write the float model and the engine's own int8 of it, where these are files."""

    @abstractmethod
    def calls(self, run: FinishedRun, folder: Path) -> dict[str, Call]:
        """Load `exported`, `float` and, where the engine has one, `int8`."""


def onnx_runtime(path: Path) -> Call:
    """The first output of a file in a default session of one thread."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = 1, 3
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    names = [entry.name for entry in session.get_inputs()]
    return lambda inputs: session.run(None, {name: inputs[name] for name in names})[0]


def openvino(path: Path) -> Call:
    """The first output of a file in OpenVINO, float32 where it computes in float, one thread."""
    from openvino import Core

    settings = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": 1, "PERFORMANCE_HINT": "LATENCY"}
    model = Core().compile_model(str(path), "CPU", settings)
    names = [entry.get_any_name() for entry in model.inputs]
    request = model.create_infer_request()
    return lambda inputs: request.infer({name: inputs[name] for name in names})[0]


def in_torch(model: nn.Module) -> Call:
    """The logits of a module."""

    @torch.no_grad()
    def call(inputs: Arrays) -> np.ndarray:
        output = model(**{name: torch.from_numpy(x) for name, x in inputs.items()})
        return np.asarray(output["logits"])

    return call


def float_model(run: FinishedRun) -> nn.Module:
    """The run's weights in a model without quantizers."""
    saved = json.loads((run.folder / "model" / QUANTIZATION).read_text())
    plain = build_architecture(run.folder / "model", saved)
    plain.load_state_dict({name: x for name, x in run.model.state_dict().items() if "_quantizer." not in name})
    return plain.eval()


def training_batches(run: FinishedRun) -> list[dict[str, Tensor]]:
    """Training examples to calibrate on, without augmentation and labels."""
    from eval.data.dataset import not_augmented

    prepared = run.plan.prepared
    rows = not_augmented(prepared.train)
    count = min(CALIBRATION, len(rows))
    parts = [range(start, min(start + CALIBRATION_BATCH, count)) for start in range(0, count, CALIBRATION_BATCH)]
    batches = [prepared.data_collator([rows[place] for place in part]) for part in parts]
    return [{name: x for name, x in batch.items() if name != "labels"} for batch in batches]


class OnnxRuntime(Engine):
    """ONNX Runtime; its int8: quantize_static (QDQ, per channel, uint8 inputs) of images, quantize_dynamic of texts."""

    title, format = "ONNX Runtime", "onnx"
    packages: ClassVar = {"onnx": "onnx", "onnxruntime": "onnxruntime", "onnxscript": "onnxscript"}

    def write(self, run: FinishedRun, folder: Path) -> None:
        """Write float.onnx and int8.onnx."""
        from quant.export.onnx.export import trace

        write_float(run, trace(run.model, run.modules, example(run)), folder / "float.onnx", run.modules)
        self.write_int8(run, folder)

    def write_int8(self, run: FinishedRun, folder: Path) -> None:
        """Write ONNX Runtime's own int8 of float.onnx."""
        from onnxruntime.quantization import QuantFormat, QuantType, quantize_dynamic, quantize_static
        from onnxruntime.quantization.shape_inference import quant_pre_process

        prepared = folder / "prepared.onnx"
        quant_pre_process(str(folder / "float.onnx"), str(prepared), skip_symbolic_shape=True)
        if run.inputs.pixels is None:
            quantize_dynamic(str(prepared), str(folder / "int8.onnx"), per_channel=True)
        else:
            settings: dict[str, Any] = {"quant_format": QuantFormat.QDQ, "per_channel": True}
            settings |= {"activation_type": QuantType.QUInt8}
            quantize_static(str(prepared), str(folder / "int8.onnx"), _Reader(training_batches(run)), **settings)
        prepared.unlink()

    def calls(self, run: FinishedRun, folder: Path) -> dict[str, Call]:
        """Load the three files."""
        paths = {"exported": folder / "export" / ONNX, "float": folder / "float.onnx", "int8": folder / "int8.onnx"}
        return {name: onnx_runtime(path) for name, path in paths.items()}


class _Reader:
    """Batches as ONNX Runtime's calibration asks for them."""

    def __init__(self, batches: Iterable[Mapping[str, Tensor]]) -> None:
        self.batches = iter(batches)

    def get_next(self) -> Arrays | None:
        """Return the next batch; None behind the last."""
        batch = next(self.batches, None)
        return None if batch is None else {name: x.numpy() for name, x in batch.items()}


class OpenVino(OnnxRuntime):
    """OpenVINO; its int8 is NNCF's: post-training quantization, of decoders int8 weights (compress_weights)."""

    title = "OpenVINO"
    packages: ClassVar = {**OnnxRuntime.packages, "openvino": "openvino", "nncf": "nncf"}

    def write_int8(self, run: FinishedRun, folder: Path) -> None:
        """Write int8.xml."""
        import nncf
        from openvino import Core, save_model

        model = Core().read_model(str(folder / "float.onnx"))
        if run.plan.data.kind == "lm":
            made = nncf.compress_weights(model)
        else:
            feeds = [{name: x.numpy() for name, x in batch.items()} for batch in training_batches(run)]
            kind = None if run.inputs.pixels else nncf.ModelType.TRANSFORMER
            made = nncf.quantize(model, nncf.Dataset(feeds), subset_size=len(feeds), model_type=kind)
        save_model(made, str(folder / "int8.xml"), compress_to_fp16=False)

    def calls(self, run: FinishedRun, folder: Path) -> dict[str, Call]:
        """Load the three files."""
        paths = {"exported": folder / "export" / ONNX, "float": folder / "float.onnx", "int8": folder / "int8.xml"}
        return {name: openvino(path) for name, path in paths.items()}


class Torchao(Engine):
    """torchao in eager PyTorch; its int8: Int8DynamicActivationInt8WeightConfig."""

    title, format = "torchao", "torchao"
    packages: ClassVar = {"torchao": "torchao"}

    def write(self, run: FinishedRun, folder: Path) -> None:
        """Nothing: both are made of the run's weights when they are loaded."""

    def calls(self, run: FinishedRun, folder: Path) -> dict[str, Call]:
        """Load the export; quantize the float model."""
        from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_

        own = float_model(run)
        quantize_(own, Int8DynamicActivationInt8WeightConfig())
        models = {"exported": load_torchao(folder / "export")[0], "float": float_model(run), "int8": own}
        return {name: in_torch(model) for name, model in models.items()}


class Transformers(Engine):
    """transformers with compressed-tensors, in eager PyTorch."""

    title, format = "transformers + compressed-tensors", "compressed-tensors"
    packages: ClassVar = {"transformers": "transformers", "compressed_tensors": "compressed-tensors"}
    why_no_int8 = "has none: a file format"

    def write(self, run: FinishedRun, folder: Path) -> None:
        """Nothing: the float model is made of the run's weights when it is loaded."""

    def calls(self, run: FinishedRun, folder: Path) -> dict[str, Call]:
        """Load the export with from_pretrained."""
        models = {"exported": load_compressed(run, folder / "export").eval(), "float": float_model(run)}
        return {name: in_torch(model) for name, model in models.items()}


class LlamaCpp(Engine):
    """llama.cpp; its float is F16, its int8 Q8_0 by its own quantizer."""

    title, format = "llama.cpp", "gguf"
    packages: ClassVar = {"gguf": "gguf", "llama_cpp": "llama-cpp-python"}

    def write(self, run: FinishedRun, folder: Path) -> None:
        """Write float.gguf and int8.gguf."""
        import llama_cpp
        from transformers import AutoTokenizer

        from eval.export.gguf_model import gguf_contents, write_gguf

        tokenizer = AutoTokenizer.from_pretrained(run.folder / "model", trust_remote_code=False)
        with in_float(run.modules):
            contents = gguf_contents(run.model, run.modules)  # type: ignore[arg-type]
            write_gguf(folder / "float.gguf", run.model, contents, tokenizer, "float")  # type: ignore[arg-type]
        parameters = llama_cpp.llama_model_quantize_default_params()
        parameters.ftype = llama_cpp.LLAMA_FTYPE_MOSTLY_Q8_0
        source, target = (str(folder / name).encode() for name in ("float.gguf", "int8.gguf"))
        if llama_cpp.llama_model_quantize(source, target, parameters):
            raise UserError("llama.cpp could not write its Q8_0")

    def calls(self, run: FinishedRun, folder: Path) -> dict[str, Call]:
        """Load the three files."""
        paths = {"exported": folder / "export" / GGUF, "float": folder / "float.gguf", "int8": folder / "int8.gguf"}
        return {name: llama_cpp_call(path, run.config.max_length) for name, path in paths.items()}


def llama_cpp_call(path: Path, length: int) -> Call:
    """The logits of every token of a file in llama.cpp."""
    import llama_cpp

    made = llama_cpp.Llama(
        str(path), n_ctx=length, n_batch=length, n_threads=1, n_threads_batch=1, logits_all=True, verbose=False
    )

    def call(inputs: Arrays) -> np.ndarray:
        rows = []
        for tokens in inputs["input_ids"]:
            made.reset()
            made.eval(tokens.tolist())
            rows.append(made.scores[: len(tokens)].copy())
        return np.stack(rows)

    return call


class Executorch(Engine):
    """ExecuTorch with XNNPACK; its int8: XNNPACKQuantizer, per channel, inputs static for images, else dynamic."""

    title, format = "ExecuTorch", "executorch"
    packages: ClassVar = {"executorch": "executorch"}
    why_no_int8 = "none of texts: its quantizer rounds the indices of embeddings"

    def write(self, run: FinishedRun, folder: Path) -> None:
        """Write float.pte and, of image models, int8.pte."""
        inputs = {name: x if x.shape[0] > 1 else x.repeat(2, *(1,) * (x.dim() - 1)) for name, x in example(run).items()}
        images = run.inputs.pixels is not None
        shapes = tuple(dynamic_shapes(inputs, None if images else run.config.max_length))
        rows = tuple(inputs.values())

        plain = _Logits(float_model(run), list(inputs))
        program = torch.export.export(plain, rows, dynamic_shapes=(shapes,), strict=False)  # of *inputs
        lower(program, folder / "float.pte")
        if images:
            batches = [tuple(batch[name] for name in inputs) for batch in training_batches(run)]
            quantized = quantized_by_xnnpack(program.module(), batches)
            lower(torch.export.export(quantized, rows, dynamic_shapes=shapes, strict=False), folder / "int8.pte")

    def calls(self, run: FinishedRun, folder: Path) -> dict[str, Call]:
        """Load the three programs, in one thread."""
        from executorch.extension.pybindings.portable_lib import _unsafe_reset_threadpool

        _unsafe_reset_threadpool(1)
        names = json.loads((folder / "export" / INPUT_NAMES).read_text())
        paths = {"exported": folder / "export" / PTE, "float": folder / "float.pte", "int8": folder / "int8.pte"}
        models = {name: ExecutorchModel(p, run.plan.data.kind, names) for name, p in paths.items() if p.is_file()}
        return {name: in_torch(model) for name, model in models.items()}


class _Logits(OfOrderedInputs):
    """A model as a function of its inputs in order that returns its logits."""

    def forward(self, *inputs: Tensor) -> Tensor:
        """Return the logits."""
        logits: Tensor = super().forward(*inputs)["logits"]
        return logits


def quantized_by_xnnpack(graph: nn.Module, batches: Iterable[tuple[Tensor, ...]]) -> nn.Module:
    """Quantize an exported graph to int8 as ExecuTorch's documentation does."""
    from executorch.backends.xnnpack.quantizer.xnnpack_quantizer import (
        XNNPACKQuantizer,
        get_symmetric_quantization_config,
    )
    from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e

    settings = get_symmetric_quantization_config(is_per_channel=True)
    prepared = prepare_pt2e(graph, XNNPACKQuantizer().set_global(settings))
    with torch.no_grad():
        for batch in batches:
            prepared(*batch)
    made: nn.Module = convert_pt2e(prepared)
    return made


ENGINES: dict[str, Engine] = {
    "onnxruntime": OnnxRuntime(),
    "openvino": OpenVino(),
    "torchao": Torchao(),
    "transformers": Transformers(),
    "llama.cpp": LlamaCpp(),
    "executorch": Executorch(),
}
"""Name of the flag --engine -> engine."""
