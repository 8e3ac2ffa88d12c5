"""Text summary of a plan: its data, its model, and the searched part of the model."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from eval.data.files import Source
    from eval.run.plan import Plan

MAX_CLASSES = 20
"""Maximum number of classes listed by name."""


def summary_of(plan: Plan) -> tuple[str, ...]:
    """Describe the data and the model of a plan, in lines of text."""
    return (*data_lines(plan), *model_lines(plan))


def data_lines(plan: Plan) -> list[str]:
    """Describe the source of each split, its columns and classes, and notes about its preparation."""
    data, config = plan.data, plan.config
    task = data.task
    lines = [f"data: {config.task}, {task.kind}"]
    for name, rows in {"train": data.train, **data.validation}.items():
        lines.append(f"  {name:<12}{len(rows):>9,} rows  {origin(data.sources[name], config)}")
    columns = [f"{', '.join(data.columns)} (in)"]
    if task.kind != "lm":
        columns.append(f"{task.label} (truth)")
    lines.append(f"  {'columns':<12}{' -> '.join(columns)}")
    if data.label_names:
        more = ", ..." if len(data.label_names) > MAX_CLASSES else ""
        lines.append(f"  {'classes':<12}{data.num_labels}: {', '.join(data.label_names[:MAX_CLASSES])}{more}")
    elif task.regression:
        lines.append(f"  {'classes':<12}none: numbers, a regression")
    lines.append(f"  {'metric':<12}{data.metric}")
    return lines + [f"  note: {note}" for note in (*data.notes, *plan.prepared.notes)]


def origin(source: Source, config: Any) -> str:
    """Describe the origin of rows: the first file and the number of others, or the dataset."""
    if not source.files:
        return f"{config.task} ({source.split})"
    first, *others = source.files
    return str(Path(first)) + (f" and {len(others):,} more" if others else "")


def model_lines(plan: Plan) -> list[str]:
    """Describe the size of the model, its searched layers and its inputs."""
    model, inputs = plan.bundle.model, plan.prepared.pixels
    total = sum(parameter.numel() for parameter in model.parameters())
    searched = sum(profile.params for profile in plan.profiles)
    kind = type(getattr(model, "net", getattr(model, "model", model))).__name__
    lines = [
        f"model: {plan.config.model_name}, {kind}, {total:,} weights",
        f"  {'layers':<12}{len(plan.layers)}, with {searched:,} weights ({percent(searched, total)} of the model)",
    ]
    if plan.caches:
        most = f"at most {cache_bytes(plan):.6g} bytes a token"
        told = f"{plan.config.quantize_kv_cache}, {len(plan.caches)} attentions, {most}"
        lines.append(f"  {'cache':<12}{told}")
    if inputs is None:
        shape = f"at most {min(plan.config.max_length, plan.bundle.max_length)} tokens"
    else:
        shape = f"{inputs.channels} x {inputs.size} x {inputs.size}, {colours(inputs.mean, inputs.std)}"
    lines.append(f"  {'input':<12}{shape}")
    return lines + [f"  note: {note}" for note in plan.bundle.notes]


def cache_bytes(plan: Plan) -> float:
    """Return the bytes that a token takes in the cache of keys and values, in the widest format that it may have."""
    return sum(max(map(attention.bits, plan.config.cache_formats)) for attention in plan.caches) / 8


def colours(mean: Sequence[float], std: Sequence[float]) -> str:
    """Format channel statistics: 'mean 0.485, 0.456, 0.406, std 0.229, 0.224, 0.225'."""
    first, second = (", ".join(f"{value:.4g}" for value in values) for values in (mean, std))
    return f"mean {first}, std {second}"


def percent(part: int, whole: int) -> str:
    """Format a share in percent, rounded down, so that only the whole is 100 %."""
    return f"{math.floor(1000 * part / whole) / 10:g} %"
