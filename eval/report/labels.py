"""What tells runs apart whose methods and targets are the same: the settings that differ."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from eval.report.records import Run

LONGEST = 20
"""characters of a value in a label"""


def differing(settings: Sequence[Mapping[str, Any]]) -> list[str]:
    """Names of the values that are not the same in all of `settings`, in order."""
    first = settings[0]
    names = {name for own in settings for name in own}
    return sorted(name for name in names if any(own.get(name) != first.get(name) for own in settings))


def told_apart(runs: Sequence[Run]) -> list[Run]:
    """`runs` with labels that no two configurations share; each names as few settings as that takes."""
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
    """For each of `facts` the texts that tell it from others: no name in them that adds nothing."""
    texts = {name: [_text(name, own.get(name)) for own in facts] for name in differing(facts)}
    chosen: list[str] = []
    told = 1
    # Those that all have come first (older runs lack newer settings), and of them those of many values.
    for name in sorted(texts, key=lambda name: (any(name not in own for own in facts), -len(set(texts[name])), name)):
        wider = [*chosen, name]
        count = len(set(zip(*(texts[one] for one in wider), strict=True)))
        if count > told:
            chosen, told = wider, count
    return [tuple(texts[name][place] for name in sorted(chosen)) for place in range(len(facts))]


def _text(name: str, value: Any) -> str:
    """'max_steps=400'; of long values, such as paths, the end."""
    shown = str(value) if len(str(value)) <= LONGEST else f"…{str(value)[1 - LONGEST :]}"
    return shown if name == "formats" else f"{name}={shown}"
