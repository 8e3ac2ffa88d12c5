"""Layer coverage of every model known by name: `python -m benchmarks.coverage [NAME ...]`.

Architectures are built as published, on the meta device: no weights, no network. GBOPs are those of the searched
layers, for one image of the model's own size or 128 tokens.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from types import SimpleNamespace

from torch import nn
from transformers.pytorch_utils import Conv1D

from cost.cost import compute_cost
from cost.profile import profile_model
from eval.layers.coverage import searched_layers
from eval.models import MODELS, published
from quant.convert import find_layers
from quant.formats import parse_format

BITS = (4, 8, 16)


@dataclass(frozen=True)
class Coverage:
    """What is searched of a model with default flags."""

    model: str
    linear: int
    conv2d: int
    conv1d: int
    searched: int
    excluded: tuple[str, ...]
    gbops: tuple[float, ...]
    """at each of BITS, for weights and activations alike"""


def coverage(name: str) -> Coverage:
    """Count the layers of a published architecture, straight from its modules, and those that are searched."""
    model, example = published(name)
    searched = searched_layers(model, MODELS[name], SimpleNamespace())
    profiles = profile_model(model, example, searched)
    formats = [parse_format(f"int{bits}") for bits in BITS]
    modules = list(model.modules())
    return Coverage(
        name,
        *(sum(isinstance(module, kind) for module in modules) for kind in (nn.Linear, nn.Conv2d, Conv1D)),
        searched=len(searched),
        excluded=tuple(layer for layer in find_layers(model) if layer not in searched),
        gbops=tuple(compute_cost(profiles, dict.fromkeys(searched, (format, format))) for format in formats),
    )


def table(rows: Sequence[Coverage]) -> str:
    """The rows as a Markdown table."""
    titles = ("model", "Linear", "Conv2d", "Conv1D", "searched", "excluded", *(f"GBOPs at {bits}" for bits in BITS))
    lines = [titles, ("---",) * len(titles)]
    for row in rows:
        numbers = map(str, (row.linear, row.conv2d, row.conv1d, row.searched))
        lines.append((row.model, *numbers, ", ".join(row.excluded) or "none", *(f"{cost:.5g}" for cost in row.gbops)))
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


if __name__ == "__main__":
    print(table([coverage(name) for name in sys.argv[1:] or MODELS]))
