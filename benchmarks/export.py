"""Exports of searched models, each read back and evaluated: `python -m benchmarks.export --shared ../shared [NAME...]`.

Searches over 4 and 8 bits (one mixes integers and a minifloat) are run where they are not finished yet, then exported.
A row an export: size against float32, accuracy before and after, logits. `--times` measures ONNX Runtime instead.
"""

from __future__ import annotations

import json
import sys
from argparse import ArgumentParser
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks.quality import encoder_folder
from eval.config.parser import parse
from eval.export.__main__ import export
from eval.export.finished_run import FinishedRun, finished_run
from eval.export.formats import EXPORT_FORMATS
from eval.latency import model_latencies
from quant.errors import UserError

COMMON = "--save_strategy no --report_to none --quiet --exp_name export"
SEARCH = "--search --cost_type memory --search_space"
CIFAR10 = "--task cifar10 --data_dir {shared}/data/cifar10 --model resnet20 --optimizer sgd --learning_rate 0.001"
RESNET20 = f"{CIFAR10} --model_path {{shared}}/models/resnet20-cifar10 --train_batch_size 128 {SEARCH}"
DIGITS = "--task digits --image_size 32 --train_batch_size 64 --learning_rate 0.02 --optimizer sgd"
SST2 = "--task sst2 --data_dir {shared}/data/glue/sst2 --learning_rate 1e-3 --from_scratch --max_train_samples 8000"
MRPC = "--task mrpc --data_dir {shared}/data/glue/mrpc --max_length 64 --eval_batch_size 64"
RUNS = {
    "resnet20": f"{RESNET20} 4,8 --max_steps 40",
    "resnet20-mixed": f"{RESNET20} int4,e4m3,int8 --max_steps 16",
    "resnet18": f"{DIGITS} --model resnet18 --from_scratch --max_steps 200 {SEARCH} 4,8",
    "resnet18-cifar10": (
        "--task cifar10 --data_dir {shared}/data/cifar10 --model resnet18 --from_scratch --image_size 32 "
        f"--train_batch_size 64 --max_steps 200 --learning_rate 1e-3 {SEARCH} 4,8"
    ),
    "mobilenetv2-float": f"{DIGITS} --model mobilenetv2 --from_scratch --max_steps 300 --method float",
    "mobilenetv2": (
        f"{DIGITS} --model mobilenetv2 --model_path {{root}}/digits/export/mobilenetv2-float/model --max_steps 200 "
        f"{SEARCH} 4,8"
    ),
    "efficientnet-lite0": (
        "--task cifar10 --data_dir {shared}/data/cifar10 --model timm:tf_efficientnet_lite0 "
        "--model_path {shared}/models/efficientnet-lite0 --image_size 96 --train_batch_size 32 --max_steps 40 "
        f"--learning_rate 1e-3 {SEARCH} 4,8"
    ),
    "bert-tiny": f"{SST2} --model bert-tiny --max_steps 400 --fuse_groups {SEARCH} 4,8",
    "gpt2": f"{SST2} --model {{root}}/architectures/gpt2 --max_steps 300 {SEARCH} 4,8",
    "minilm-float": f"{MRPC} --model_path {{minilm}} --max_steps 230 --learning_rate 1e-4 --seed 0 --method float",
    "minilm": (
        f"{MRPC} --model_path {{root}}/mrpc/export/minilm-float/model --max_steps 16 --train_batch_size 16 "
        f"--max_eval_samples 200 --learning_rate 5e-5 --weight_only_search --fuse_groups {SEARCH} 4,8"
    ),
    "minilm-file": (
        f"{MRPC} --model_path {{root}}/mrpc/export/minilm-float/model --max_steps 16 --train_batch_size 16 "
        f"--learning_rate 5e-5 --fuse_groups {SEARCH} 4,8 --cost_scope file --max_memory 16.8"
    ),
}
"""flags of each run; its folder shows whether it is finished"""
NEEDS = {"minilm": "minilm-float", "minilm-file": "minilm-float", "mobilenetv2": "mobilenetv2-float"}
"""what a run starts from"""
EXPORTS = {
    "packed": ("packed", False),
    "onnx": ("onnx", None),
    "onnx --no_round_outputs": ("onnx", False),
    "onnx --round_outputs": ("onnx", True),
    "torchao": ("torchao", False),
    "compressed-tensors": ("compressed-tensors", False),
}
COLUMNS = (
    "run",
    "export",
    "as chosen",
    "file / float32",
    "accuracy before -> after [%]",
    "logits: mean, largest difference",
)


def places(shared: Path, root: Path) -> dict[str, str]:
    """What the flags of RUNS leave open."""
    from transformers import GPT2Config

    GPT2Config(n_layer=2, n_embd=128, n_head=2, n_positions=128).save_pretrained(root / "architectures" / "gpt2")
    return {"shared": str(shared), "root": str(root), "minilm": str(encoder_folder())}


def finish(name: str, root: Path, known: dict[str, str]) -> FinishedRun:
    """The run of this name, trained unless that is done."""
    from eval.eval_run import run

    if name in NEEDS:
        finish(NEEDS[name], root, known)
    config = parse(f"{RUNS[name].format(**known)} {COMMON} --output_root_dir {root} --run_id {name}".split())
    if not (config.run_folder / "result.json").is_file():
        run(config)
    return finished_run(config.run_folder)


def export_all(name: str, finished: FinishedRun) -> None:
    """Print a row for each export; those that are there already are read, not made again."""
    for title, (format, rounded) in EXPORTS.items():
        folder = finished.folder / "export" / title.replace(" --", "-")
        one = replace(finished, round_outputs=rounded)
        try:
            there = (folder / "export.json").is_file()
            verdict = json.loads((folder / "export.json").read_text()) if there else export(one, format, folder)
        except UserError as error:
            made = (name, title, str(error).partition(": ")[2], "", "", "")
        else:
            made = (name, title, *cells(verdict), differences(one, EXPORT_FORMATS[format].load(one, folder)))
        print("| " + " | ".join(made) + " |", flush=True)


def cells(verdict: dict[str, Any]) -> tuple[str, ...]:
    """Layers as chosen, size and accuracy of one verdict."""
    layers = verdict["layers"].values()
    before, after = (100 * verdict["metrics"][key]["validation"]["accuracy"] for key in ("record", "exported"))
    chosen = f"{sum(layer['as_chosen'] for layer in layers)} of {len(layers)}"
    return chosen, f"{verdict['size']['ratio']:.3f}", f"{before:.2f} -> {after:.2f}"


def differences(finished: FinishedRun, model: Any) -> str:
    """Mean and largest difference of an export's logits to the run's, as shares of the largest; 64 validation rows."""
    import torch

    rows = finished.plan.prepared.validation["validation"]
    batch = finished.plan.prepared.data_collator([rows[place] for place in range(64)])
    inputs = {key: x for key, x in batch.items() if key != "labels"}
    with torch.no_grad():
        own, other = (net(**inputs)["logits"] for net in (finished.model, model))
    apart = (other - own).abs() / own.abs().max()
    return f"{float(apart.mean()):.1e}, {float(apart.max()):.1e}"


def print_times(name: str, finished: FinishedRun) -> None:
    """A row of ONNX Runtime's times for one example: float, as exported, with rounded outputs; medians of 60 calls."""
    told = []
    for rounded in (False, True):
        try:
            times = model_latencies(replace(finished, round_outputs=rounded), repeats=60)
        except UserError as error:
            told.append(str(error))
        else:
            told.append(f"{times['chosen']:.3f} / {times['float']:.3f} = {times['chosen'] / times['float']:.2f}")
    print(f"| {name} | " + " | ".join(told) + " |", flush=True)


def main() -> int:
    """Print the table."""
    parser = ArgumentParser(prog="python -m benchmarks.export")
    parser.add_argument("names", nargs="*", default=list(RUNS), metavar="NAME")
    parser.add_argument("--shared", type=Path, default=Path("../shared"))
    parser.add_argument("--output", type=Path, default=Path("output/benchmark_export"))
    parser.add_argument("--times", action="store_true", help="ONNX Runtime's times instead")
    flags = parser.parse_args()
    columns = ("run", "exported / float [ms]", "with --round_outputs") if flags.times else COLUMNS
    print("| " + " | ".join(columns) + " |\n|" + "---|" * len(columns), flush=True)
    known = places(flags.shared, flags.output)
    for name in flags.names:
        finished = finish(name, flags.output, known)
        if finished.modules:
            print_times(name, finished) if flags.times else export_all(name, finished)
    return 0


if __name__ == "__main__":
    sys.exit(main())
