"""Time and peak memory of measured + knapsack on a decoder of 1.1 billion weights; for benchmarks/RESULTS.md.

    python -m benchmarks.large_decoder [--shared ../shared] [--folder FOLDER] [--examples 2] [--max_memory 650]
        [--offload_weights] [--blocks 22]

The model has the shape of TinyLlama and random weights, saved in bfloat16 as published ones are; times and memory do
not depend on their values. The text is MRPC's: training sentences are measured on, test sentences evaluated. Peak
memory is told twice: resident, and of this what no file holds (anonymous), which a system without swap cannot take
back. Linux only.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from benchmarks.smollm2 import sentences
from eval.transformer_utils import SCRATCH_VOCABULARY, train_tokenizer

SHAPE = {"hidden_size": 2048, "num_hidden_layers": 22, "intermediate_size": 5632, "vocab_size": 32000}
SHAPE |= {"num_attention_heads": 32, "num_key_value_heads": 4, "max_position_embeddings": 2048}
LENGTH = 64


def write_text(shared: Path, folder: Path) -> list[str]:
    """Write train.txt and validation.txt to `folder`; return the training sentences."""
    folder.mkdir(parents=True, exist_ok=True)
    lines: dict[str, list[str]] = {}
    for name, split, count in (("train", "train", 2000), ("validation", "test", 400)):
        lines[name] = sentences(shared, split, count)
        (folder / f"{name}.txt").write_text("\n".join(lines[name]))
    return lines["train"]


def write_model(corpus: list[str], folder: Path, blocks: int) -> int:
    """Write a model with random weights in bfloat16 and a tokenizer; return the number of its weights."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    model = LlamaForCausalLM(LlamaConfig(**{**SHAPE, "num_hidden_layers": blocks}))
    torch.set_default_dtype(torch.float32)
    model.save_pretrained(folder)
    train_tokenizer(corpus, SCRATCH_VOCABULARY, False).save_pretrained(folder)
    return sum(parameter.numel() for parameter in model.parameters())


def command(folder: Path, examples: int, max_memory: float) -> list[str]:
    """Return the flags of the run."""
    flags = f"--task {folder}/text --model_path {folder}/model --method measured --weight_only_search --fuse_groups"
    flags += f" --search_space 4,8 --cost_scope file --max_memory {max_memory:g} --observer minmax --max_steps 0"
    flags += f" --max_length {LENGTH} --max_train_samples {examples} --calibration_samples {examples}"
    flags += f" --max_eval_samples 4 --train_batch_size {examples} --eval_batch_size 2 --report_to none"
    return [*flags.split(), "--output_root_dir", f"{folder}/runs", "--run_id", "run"]


def peaks(process: subprocess.Popen[bytes]) -> Counter[str]:
    """Watch a process to its end; return the largest RssAnon and VmRSS seen, in bytes."""
    found: Counter[str] = Counter()
    while process.poll() is None:
        for line in Path(f"/proc/{process.pid}/status").read_text().splitlines():
            if line.startswith(("RssAnon", "VmRSS")):
                name, size = line.split(":")
                found |= Counter({name: 1024 * int(size.split()[0])})
        time.sleep(0.1)
    if process.returncode:
        raise SystemExit(f"the run ended with exit code {process.returncode}")
    return found


def main() -> None:
    """Write model and text, tell the time by --dry_run, run, and print time and peak memory."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shared", type=Path, default=Path("../shared"))
    parser.add_argument("--folder", type=Path, help="where model and run are kept; default: a temporary folder")
    parser.add_argument("--examples", type=int, default=2, help=f"examples of {LENGTH} tokens that are measured on")
    parser.add_argument("--max_memory", type=float, default=650.0, help="MiB of the whole file")
    parser.add_argument("--offload_weights", action="store_true", help="keep the weights in mapped files")
    parser.add_argument("--blocks", type=int, default=SHAPE["num_hidden_layers"], help="of 44 million weights each")
    arguments = parser.parse_args()
    with TemporaryDirectory() as temporary:
        folder = arguments.folder or Path(temporary)
        corpus = write_text(arguments.shared, folder / "text")
        print(f"{write_model(corpus, folder / 'model', arguments.blocks):,} weights", flush=True)
        run = [sys.executable, "-m", "eval.eval_run", *command(folder, arguments.examples, arguments.max_memory)]
        run += ["--offload_weights"] if arguments.offload_weights else []
        subprocess.run([*run, "--dry_run"], check=True)
        started = time.monotonic()
        peak = {name: size / 2**30 for name, size in peaks(subprocess.Popen(run)).items()}
        record = json.loads((folder / "runs/text/default/run/result.json").read_text())
        print(
            f"{(time.monotonic() - started) / 60:.0f} min, cost {record['cost']:.1f} MiB, at most "
            f"{peak['VmRSS']:.2f} GiB resident, {peak['RssAnon']:.2f} GiB anonymous"
        )


if __name__ == "__main__":
    main()
