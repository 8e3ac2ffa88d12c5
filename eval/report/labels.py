"""Labels of runs: settings that distinguish runs of the same method and target."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from eval.report.records import Run

LONGEST = 20
"""Maximum number of characters of a value in a label."""


def differing(settings: Sequence[Mapping[str, Any]]) -> list[str]:
    """Sorted names of the settings whose values are not the same in all of `settings`."""
    first = settings[0]
    names = {name for own in settings for name in own}
    return sorted(name for name in names if any(own.get(name) != first.get(name) for own in settings))


def distinct_labels(runs: Sequence[Run]) -> list[Run]:
    """Give each configuration a label of its own, with as few settings in it as possible."""
    alike: dict[tuple[str, ...], list[Run]] = {}
    for run in runs:
        alike.setdefault((run.record["task"], run.record["model"], run.name), []).append(run)
    apart: dict[Path, tuple[str, ...]] = {}
    for members in alike.values():
        details = _details([{"formats": run.formats, **run.settings} for run in members])
        apart |= {run.folder: own for run, own in zip(members, details, strict=True)}
    return [replace(run, details=apart[run.folder]) if apart[run.folder] else run for run in runs]


def short_names(names: Sequence[str]) -> list[str]:
    """Layer names without the dotted prefix that all of them share."""
    parts = [name.split(".") for name in names]
    shared = 0
    while len(names) > 1 and all(len(p) > shared + 1 and p[shared] == parts[0][shared] for p in parts):
        shared += 1
    return [".".join(p[shared:]) for p in parts]


def _details(facts: Sequence[Mapping[str, Any]]) -> list[tuple[str, ...]]:
    """For each of `facts`, the texts that distinguish it from the others, without superfluous ones."""
    texts = {name: [_text(name, own.get(name)) for own in facts] for name in differing(facts)}
    chosen: list[str] = []
    distinct = 1
    # Names that all of them have come first (older runs lack newer settings); among these, names with many values.
    for name in sorted(texts, key=lambda name: (any(name not in own for own in facts), -len(set(texts[name])), name)):
        wider = [*chosen, name]
        count = len(set(zip(*(texts[one] for one in wider), strict=True)))
        if count > distinct:
            chosen, distinct = wider, count
    return [tuple(texts[name][place] for name in sorted(chosen)) for place in range(len(facts))]


def _text(name: str, value: Any) -> str:
    """Text such as 'max_steps=400'; of long values, such as paths, only the end."""
    shown = str(value) if len(str(value)) <= LONGEST else f"…{str(value)[1 - LONGEST :]}"
    return shown if name == "formats" else f"{name}={shown}"
