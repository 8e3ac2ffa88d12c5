"""The models of `benchmarks.engines`: the flags of their runs, one for each engine."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from benchmarks.export import CIFAR10, DIGITS, MRPC, SST2
from benchmarks.quality import LITE0, LITE0_START, encoder_folder
from eval.config.parser import parse
from eval.export.finished_run import FinishedRun, finished_run

EXPERIMENT = "engines"
COMMON = f"--save_strategy no --report_to none --quiet --exp_name {EXPERIMENT}"
LIMITS = {
    "onnxruntime": "{method} --search_space 4,8 --engine onnxruntime",
    "openvino": "{method} --search_space 4,8 --engine openvino",
    "torchao": "{method} --search_space 4,8 --engine torchao --per_token",
    "transformers": "{method} --search_space 4,8 --engine transformers --weight_only_search --fuse_groups",
    "executorch": "--method uniform --max_steps 0 --bits 8 --engine executorch",
}
"""Engine -> flags of a run for it; ExecuTorch stores 8 bits alone."""
AT_ONCE = "--method measured --max_steps 0 --sensitivity_examples 16"
"""Formats by the effect of each layer in each format, and no training."""
IMAGES = ("onnxruntime", "openvino", "executorch")
TEXTS = (*IMAGES, "torchao", "transformers")


@dataclass(frozen=True)
class Model:
    """A model of the table."""

    flags: str
    """Flags of its runs."""
    float: str = ""
    """Flags of the float training that they start from; empty: `flags` names trained weights."""
    engines: tuple[str, ...] = IMAGES
    """Engines with a run of their own; the others are given the run of the first."""
    method: str = AT_ONCE


TINY = SST2.replace(" --from_scratch", "")
MODELS = {
    "ResNet-20": Model(
        f"{CIFAR10} --model_path {{shared}}/models/resnet20-cifar10 --train_batch_size 128",
        method="--search --max_steps 40",
    ),
    "EfficientNet-Lite0": Model(
        f"{LITE0} --model_path {{float}}",
        f"{LITE0_START} --seed 0",
    ),
    "MiniLM": Model(
        f"{MRPC} --model_path {{float}} --train_batch_size 16 --learning_rate 5e-5",
        f"{MRPC} --model_path {{encoder}} --max_steps 230 --learning_rate 1e-4 --seed 0",
        TEXTS,
    ),
    "SmolLM2": Model(
        "--task {smollm2}/text --model_path {smollm2}/model --max_length 128 --train_batch_size 4 --eval_batch_size 4 "
        "--calibration_samples 32 --max_steps 0 --weight_bits int4g32 --cost_scope file --seed 0",
        engines=(),
    ),
    "bert-tiny": Model(f"{TINY} --model_path {{float}}", f"{SST2} --model bert-tiny --max_steps 400", TEXTS),
    "GPT-2, 2 layers x 128": Model(f"{TINY} --model_path {{float}}", f"{SST2} --model {{gpt2}} --max_steps 300", TEXTS),
    "MobileNetV2": Model(
        f"{DIGITS} --model mobilenetv2 --model_path {{float}}",
        f"{DIGITS} --model mobilenetv2 --from_scratch --max_steps 300",
    ),
}


def short(name: str) -> str:
    """Return a model's name as part of a file's name."""
    return name.split(",")[0].lower()


def run_of(name: str, engine: str, shared: Path, root: Path) -> FinishedRun:
    """Return a model's run for an engine, trained unless that is done."""
    model = MODELS[name]
    own = engine if engine in model.engines else "onnxruntime"
    limits = LIMITS[own].format(method=model.method) if model.engines else ""  # without: one run for all engines
    flags, known = flags_of(name, shared, root)
    return finished_run(train(f"{flags} {limits}", known, root, f"{short(name)}-{own}"))


def flags_of(name: str, shared: Path, root: Path) -> tuple[str, dict[str, str]]:
    """Return the flags of a model's runs, and the folders that stand in them; trains the float model if needed."""
    model = MODELS[name]
    known = {"shared": str(shared), "encoder": str(encoder_folder())} | _written(name, shared, root)
    if model.float:
        known["float"] = str(train(f"{model.float} --method float", known, root, f"{short(name)}-float") / "model")
    return model.flags, known


def _written(name: str, shared: Path, root: Path) -> dict[str, str]:
    """Write what a model's flags read, once; return its folders."""
    if name.startswith("GPT-2"):
        from transformers import GPT2Config

        folder = root / "architectures" / "gpt2"
        GPT2Config(n_layer=2, n_embd=128, n_head=2, n_positions=128).save_pretrained(folder)
        return {"gpt2": str(folder)}
    if name == "SmolLM2":
        from benchmarks.decoder import prepare

        if not (root / "smollm2/model").exists():
            (root / "smollm2").mkdir(parents=True, exist_ok=True)
            prepare(root / "smollm2", shared)
        return {"smollm2": str(root / "smollm2")}
    return {}


def train(flags: str, known: Mapping[str, str], root: Path, name: str) -> Path:
    """Return the folder of a run, trained unless that is done."""
    from eval.eval_run import run

    config = parse(f"{flags.format(**known)} {COMMON} --output_root_dir {root} --run_id {name}".split())
    if not (config.run_folder / "result.json").is_file():
        run(config)
    return config.run_folder
