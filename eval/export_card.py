"""The model card of an export: what it is, what it costs, how good it is, how to run it."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from eval.export_run import FinishedRun


def model_card(run: FinishedRun, verdict: dict[str, Any], folder: Path, usage: str) -> str:
    """README.md of the export folder, Markdown."""
    from eval.export import summary

    record = run.record
    layers = verdict["layers"].values()
    pairs = Counter(" / ".join(layer["exported"]) for layer in layers)
    widened = [f"- `{name}`: {'; '.join(layer['why'])}" for name, layer in verdict["layers"].items() if layer["why"]]
    searched = "" if record["search_space"] is None else f" over {', '.join(record['search_space'])}"
    lines = [
        f"# {record['model']} on {record['task']}, {verdict['format']}",
        "",
        f"Quantized by a {record['method']} run{searched} (seed {record['seed']}, run `{record['run_id']}`).",
        "",
        *(f"- {line}" for line in summary(verdict)),
        "",
        "## Formats",
        "",
        "| weights / activations | layers |",
        "|---|---|",
        *(f"| {pair} | {count} |" for pair, count in pairs.most_common()),
        "",
        "Every layer stands in `export.json`." + (" Not as chosen:" if widened else " All are as chosen."),
        *(["", *widened] if widened else []),
        "",
        "## How to run it",
        "",
        "```python",
        usage.format(folder=folder, inputs=example_call(run), architecture=type(run.model).__name__),
        "```",
    ]
    return "\n".join(lines) + "\n"


def example_call(run: FinishedRun) -> str:
    """How the model is called, by keyword."""
    from eval.tasks import find_task

    try:
        image = find_task(run.config.task or "").kind == "image"
    except ValueError:  # a local folder that is gone by now
        image = not (run.folder / "model" / "tokenizer.json").is_file()
    return "pixel_values=images" if image else "**tokenizer(texts, return_tensors='pt')"
