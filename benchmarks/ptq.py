"""Post-training quantization of a fine-tuned encoder, method by method; the table goes into benchmarks/RESULTS.md.

    python -m benchmarks.ptq --task mrpc --data_dir ../shared/data/glue/mrpc --model_path FOLDER [--planted] --out FILE

`--model_path` holds a fine-tuned model. `--planted` multiplies four channels of every LayerNorm's gamma by 15 to 60 and
divides what reads them, so that the float model stays what it is. Ranges and the ratio of Token-Wise Clipping come from
128 training examples; weights are quantized per channel to their least squared error in every row. The whole validation
split is evaluated. Rows that stand in the file are not run again.
"""

from __future__ import annotations

import argparse
import copy
import json
import time
from pathlib import Path
from typing import Any

import torch
from torch import nn

from eval.config.parser import parse
from eval.run.plan import make_plan
from eval.run.trainer import evaluate, make_trainer
from quant.convert import calibrate, quantize_model, set_formats
from quant.formats import Format, IntFormat
from quant.quant_module import QuantModule
from quant.quant_utils import use_compiled
from quant.quantizers.quantizer import QuantizerConfig
from quant.transforms.graph import find_groups
from quant.transforms.migration import SmoothQuantConfig, gamma_migration, migrate, smooth_quant
from quant.transforms.token_clipping import clip_tokens

INT4, INT6, INT8 = IntFormat(4), IntFormat(6), IntFormat(8)
SETTINGS: dict[str, tuple[Format, Format]] = {"W8A8": (INT8, INT8), "W6A6": (INT6, INT6), "W4A8": (INT4, INT8)}
METHODS: dict[str, dict[str, Any]] = {
    "MinMax": {"observer": "minmax"},
    "percentile": {"observer": "percentile"},
    "MSE": {"observer": "mse_histogram"},
    "entropy": {"observer": "entropy"},
    "SmoothQuant 0.5": {"observer": "minmax", "alpha": 0.5},
    "SmoothQuant auto": {"observer": "minmax", "alpha": "auto"},
    "Gamma Migration": {"observer": "minmax", "gamma": True},
    "Token-Wise Clipping": {"observer": "avg_prune_minmax"},
    "both": {"observer": "avg_prune_minmax", "gamma": True},
    "both + fine stage": {"observer": "avg_prune_minmax", "gamma": True, "fine": True},
}
FACTORS = (15.0, -20.0, 25.0, 60.0)


def plant(model: nn.Module, example: Any) -> None:
    """Outliers in the gammas of every norm that can be compensated for."""
    modules = dict(model.named_modules())
    generator = torch.Generator().manual_seed(0)
    for group in find_groups(model, example):
        if group.normalizes and group.source is not None:
            norm: Any = modules[group.source]
            g = torch.ones(len(norm.weight))
            g[torch.randperm(len(g), generator=generator)[: len(FACTORS)]] = 1 / torch.tensor(FACTORS)
            migrate(norm, [modules[n] for n in group.consumers], [modules[n] for n in group.shortcuts], g)


def run(arguments: argparse.Namespace) -> None:
    """Every row that is missing in the file."""
    flags = f"--task {arguments.task} --data_dir {arguments.data_dir} --model_path {arguments.model_path}"
    flags += f" {arguments.flags} --method float --max_steps 0 --report_to none --quiet --seed 0"
    plan = make_plan(parse([*flags.split(), "--calibration_samples", "128"]))
    trainer, *_ = make_trainer(plan)
    use_compiled("auto")
    for name, split in plan.prepared.validation.items():  # neighbours of one length need little padding
        lengths = [len(tokens) for tokens in split["input_ids"]]
        plan.prepared.validation[name] = split.select(sorted(range(len(lengths)), key=lambda row: lengths[row]))
    batches = list(trainer.calibration.batches())
    if arguments.planted:
        plant(trainer.model, batches[0])
    original: Any = trainer.model
    done = {(r["task"], r["planted"], r["method"], r["setting"]) for r in read(arguments.out)}

    def score(method: str, setting: str, seconds: float, **facts: Any) -> None:
        metrics = evaluate(trainer, plan)["validation"]
        row = {"task": arguments.task, "planted": arguments.planted, "method": method, "setting": setting, **facts}
        row |= {"metrics": metrics, "seconds": round(seconds, 1)}
        print(json.dumps(row), flush=True)
        with arguments.out.open("a") as file:
            file.write(json.dumps(row) + "\n")

    def missing(method: str, setting: str) -> bool:
        return (arguments.task, arguments.planted, method, setting) not in done

    if missing("float", ""):
        score("float", "", 0.0)
    for method in arguments.methods.split(","):
        settings = [name for name in arguments.settings.split(",") if missing(method, name)]
        # Auto alpha depends on the formats; everything else is calibrated for all settings at once.
        together = [[name] for name in settings] if METHODS[method].get("alpha") == "auto" else [settings]
        for names in filter(None, together):
            trainer.model = trainer.model_wrapped = model = copy.deepcopy(original)
            started = time.monotonic()
            modules, facts = quantized(model, METHODS[method], names, plan.layers, batches)
            seconds = time.monotonic() - started
            for name in names:
                set_formats(modules, dict.fromkeys(modules, SETTINGS[name]))
                score(method, name, seconds, **facts.get(name, {}))


def quantized(
    model: nn.Module, method: dict[str, Any], settings: list[str], layers: list[str], batches: list[Any]
) -> tuple[dict[str, QuantModule], dict[str, dict[str, Any]]]:
    """`model` quantized in place for all `settings`, and what there is to say of each."""
    groups = [group for group in (group.only(layers) for group in find_groups(model, batches[0])) if group.consumers]
    if method.get("gamma"):
        gamma_migration(model, groups)
    if "alpha" in method:
        smooth_quant(model, groups, batches, SmoothQuantConfig(alpha=method["alpha"]), formats=SETTINGS[settings[0]])
    clips, fine = method["observer"] == "avg_prune_minmax", "fine" in method
    modules = quantize_model(
        model,
        include=layers,
        formats=dict.fromkeys(format for name in settings for format in SETTINGS[name]),
        weight=QuantizerConfig(range="calibrated", granularity="channel", observer="mse"),
        activation=QuantizerConfig(
            range="learned" if fine else "calibrated",
            observer=method["observer"],
            symmetric=False,
            learned_offset=fine,
            ignore_padding=True,
        ),
    )
    calibrate(model, modules, batches)
    if not clips:
        return modules, {}
    found = {
        format: clip_tokens(model, modules, batches, format, fine)
        for format in dict.fromkeys(SETTINGS[name][1] for name in settings)
    }
    return modules, {name: {"ratio": found[SETTINGS[name][1]]} for name in settings}


def read(path: Path) -> list[dict[str, Any]]:
    """The rows of a file, none if there is no file."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def table(rows: list[dict[str, Any]], metric: str) -> str:
    """Method x setting, in points, as Markdown."""
    settings = [name for name in SETTINGS if any(row["setting"] == name for row in rows)]
    lines = ["| method | " + " | ".join(settings) + " |", "|---|" + "---|" * len(settings)]
    for method in ["float", *METHODS]:
        found = {row["setting"]: row["metrics"][metric] for row in rows if row["method"] == method}
        cells = [found.get(name, found.get("")) for name in settings]
        lines.append(f"| {method} | " + " | ".join("" if c is None else f"{100 * c:.2f}" for c in cells) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", required=True)
    parser.add_argument("--data_dir", required=True)
    parser.add_argument("--model_path", required=True)
    parser.add_argument("--planted", action="store_true", help="with outliers in the gammas, compensated for")
    parser.add_argument("--settings", default=",".join(SETTINGS), help="comma list of bit widths")
    parser.add_argument("--methods", default=",".join(METHODS), help="comma list of rows")
    parser.add_argument("--flags", default="--max_length 64 --eval_batch_size 64", help="more flags of the run")
    parser.add_argument("--out", type=Path, default=Path("output/ptq.jsonl"), help="rows, one JSON object a line")
    arguments = parser.parse_args()
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    run(arguments)
    rows = [r for r in read(arguments.out) if (r["task"], r["planted"]) == (arguments.task, arguments.planted)]
    print(table(rows, "accuracy"))


if __name__ == "__main__":
    main()
