"""Summary rows: the values of each configuration over its seeds, and its differences from float and from the best."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from statistics import mean
from types import MappingProxyType
from typing import Any

from eval.report.labels import differing
from eval.report.paired import Answers, group_answers, half_width
from eval.report.records import TRAINING_SETTINGS, Group, Run, mean_sd
from eval.run.outcome import file_sizes, scope_of
from eval.run.schema import loss_rise


def summary_rows(
    groups: Sequence[Group], answers: Mapping[Path, Answers | None] = MappingProxyType({})
) -> list[dict[str, Any]]:
    """Summarize each group in one row: means and sample standard deviations over its seeds, and their units.

    Args:
        groups: Runs grouped by configuration.
        answers: Run folder -> its answers, if it kept any. Paired differences from the best need them.
    """
    parts = zip(groups, _baselines(groups), _what_differs(groups), _against_best(groups, answers), strict=True)
    return [{**_summary_row(group, baseline, settings), **best} for group, baseline, settings, best in parts]


def _baselines(groups: Sequence[Group]) -> list[float | None]:
    """Score of the float model of each group; None for float runs and if it is unknown.

    If the runs of the group measured their own float model, that is the score. Otherwise it is the mean of the float
    runs of the same task, model and metric. If these differ in their training settings, only float runs with the
    training settings of the group count.
    """
    floats: dict[tuple[str, ...], list[Run]] = {}
    for group in groups:
        if group.record["method"] == "float":
            floats.setdefault(_task_of(group), []).extend(group.runs)
    names = {
        task: [name for name in differing([run.settings for run in runs]) if name in TRAINING_SETTINGS]
        for task, runs in floats.items()
    }
    scores: dict[tuple[str, ...], list[float]] = {}
    for task, runs in floats.items():
        for run in runs:
            scores.setdefault((*task, *_values(run, names[task])), []).append(run.quality)

    def baseline(group: Group) -> float | None:
        if group.record["method"] == "float":
            return None
        # A float run in the table may have had other weights, steps or settings.
        own = [run.float_quality for run in group.runs if run.float_quality is not None]
        task = _task_of(group)
        found = own or scores.get((*task, *_values(group.runs[0], names.get(task, ()))))
        return mean(found) if found else None

    return [baseline(group) for group in groups]


def _task_of(group: Group) -> tuple[str, ...]:
    return tuple(group.record[key] for key in ("task", "model", "metric"))


def _values(run: Run, names: Iterable[str]) -> list[str]:
    return [str(run.settings.get(name)) for name in names]


def _summary_row(group: Group, baseline: float | None, settings: str) -> dict[str, Any]:
    record = group.record
    cost, cost_sd = group.cost(record["cost_type"])
    quality, quality_sd = group.quality
    sizes = [file_sizes(run.record) for run in group.runs]
    return {
        **{key: record[key] for key in ("task", "model", "method")},
        "formats": group.runs[0].formats,
        **{key: record[key] for key in ("cost_type", "cost_unit", "cost_target")},
        "cost_scope": scope_of(record),
        "float_share": record.get("float_share"),
        "cost_mean": cost,
        "cost_sd": cost_sd,
        "file_mib": None if None in sizes else mean([size[0] for size in sizes if size]),
        "metric": record["metric"],
        "quality_mean": quality,
        "quality_sd": quality_sd,
        "minus_float": None if baseline is None else quality - baseline,
        "n": len(group.runs),
        "seeds": " ".join(str(run.record["seed"]) for run in group.runs),
        "feasible": None if record["cost_target"] is None else sum(bool(run.feasible) for run in group.runs),
        "seconds": mean_sd([run.record["wall_seconds"] for run in group.runs])[0],
        "loss_rise": next((rise for run in group.runs if (rise := loss_rise(run.record))), None),
        "settings": settings,
        "run": " ".join(str(run.folder) for run in group.runs),
    }


def _against_best(groups: Sequence[Group], answers: Mapping[Path, Answers | None]) -> list[dict[str, Any]]:
    """Paired difference of each group from the most accurate group of its budget; None if it is the only one."""
    rivals: dict[tuple[Any, ...], list[int]] = {}
    for number, group in enumerate(groups):
        if group.record["cost_target"] is not None and group.record["metric"] == "accuracy":
            keys = ("task", "model", "cost_type", "cost_target")
            same = (scope_of(group.record), *(group.record[key] for key in keys))
            rivals.setdefault(same, []).append(number)
    found = [dict.fromkeys(("minus_best", "minus_best_half_width", "formats_of_best")) for _ in groups]
    for numbers in rivals.values():
        best = max(numbers, key=lambda number: groups[number].quality[0])
        of_best = group_answers(groups[best], answers)
        apart = {
            number: own.right - of_best.right
            for number in numbers
            if of_best and (own := group_answers(groups[number], answers)) and own.examples == of_best.examples
        }
        for number in apart if len(apart) > 1 else ():
            found[number] = {
                "minus_best": float(apart[number].mean()),
                "minus_best_half_width": half_width(apart[number]),
                "formats_of_best": _assignments(groups[number]) == _assignments(groups[best]),
            }
    return found


def _assignments(group: Group) -> set[str]:
    return {json.dumps(run.record["assignment"]) for run in group.runs}


def _what_differs(groups: Sequence[Group]) -> list[str]:
    """For each group, the settings that distinguish it from groups with equal columns, such as 'max_steps=400'."""
    alike: dict[tuple[str, ...], list[Mapping[str, Any]]] = {}
    for group in groups:
        alike.setdefault(group.runs[0].key[:-1], []).append(group.runs[0].settings)
    names = {shared: differing(settings) for shared, settings in alike.items()}
    return [
        " ".join(f"{name}={group.runs[0].settings.get(name)}" for name in names[group.runs[0].key[:-1]])
        for group in groups
    ]
