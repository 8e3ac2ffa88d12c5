"""Reads run folders: which hold a valid result, which do not and why, and which repeat the same configuration.

Every number of a report comes from here. A folder whose record is missing, damaged, of another schema, a duplicate or
not finite becomes an `Excluded` with its reason and enters no mean.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

import yaml

from eval.config.run_config import (
    LAUNCH_FILE,
    RUN_FILE,
    TUNE_FOLDER,
    DataFlags,
    LauncherFlags,
    OutputFlags,
    TrainingFlags,
)
from eval.run.schema import BUDGETS, FIELDS, NUMBER, SCHEMA_VERSION
from quant.errors import UserError
from quant.formats import parse_format

T = TypeVar("T")

RUN_FILES = frozenset({"result.json", RUN_FILE, "history.jsonl"})
"""A folder with any of these files is a run."""
INNER_FOLDERS = {
    **dict.fromkeys(RUN_FILES, frozenset({"model", "plots", "tensorboard", "checkpoints", "retrained"})),
    LAUNCH_FILE: frozenset({TUNE_FOLDER}),
}
"""File -> sub-folders to skip next to it. They hold no run records: Ray Tune, too, names its files result.json."""
PLACE_SETTINGS = frozenset(
    {entry.name for group in (LauncherFlags, OutputFlags) for entry in fields(group)} - {"load_model_path"}
    | {"seed", "data_dir", "device", "log_steps"}
)
"""Settings of place, hardware and seed. Runs that differ in these alone repeat the same configuration."""
TRAINING_SETTINGS = frozenset(
    {entry.name for group in (DataFlags, TrainingFlags) for entry in fields(group)} | {"load_model_path"}
)
"""Settings that may change the quality of a float model; all others concern quantization."""
LOWER_IS_BETTER = frozenset({"loss", "perplexity"})


@dataclass(frozen=True)
class Excluded:
    """A folder or file that the report does not count, and the reason."""

    path: Path
    reason: str


class DamagedFile(UserError):
    """An unreadable file next to a record. The run still counts, without what the file holds."""

    def __init__(self, path: Path, reason: str) -> None:
        super().__init__(f"{path}: {reason}")
        self.excluded = Excluded(path, f"{reason}; its run counts without it")


@dataclass(frozen=True)
class Run:
    """One finished, valid run."""

    folder: Path
    record: Mapping[str, Any]
    settings: Mapping[str, Any]
    """The run's config.yaml without PLACE_SETTINGS."""
    details: tuple[str, ...] = ()
    """Settings that its label needs so that no other configuration has the same label."""

    @property
    def quality(self) -> float:
        """The main metric on the evaluated split, or on the first split if there are several."""
        return float(_evaluated(self.record["metrics"])[self.record["metric"]])

    @property
    def float_quality(self) -> float | None:
        """The main metric of the float model; None if the run did not measure it."""
        return _evaluated(self.record.get("float_metrics") or {}).get(self.record["metric"])

    @property
    def feasible(self) -> bool | None:
        """Whether the cost is within the target; None without a target."""
        target = self.record["cost_target"]
        return None if target is None else is_within(self.record["cost"], target)

    @cached_property
    def costs(self) -> Mapping[str, float]:
        """Cost type -> cost [MiB or GBOPs]: the run's own type, in its own scope, and all others in its record."""
        noted = {name: float(cost) for name, cost in self.record["costs"].items() if isinstance(cost, NUMBER)}
        return {**noted, self.record["cost_type"]: float(self.record["cost"])}

    @cached_property
    def formats(self) -> str:
        """The search space, or the fixed formats of the run: "int2,int4,int8" or "w int4 a int8"."""
        if self.record["search_space"]:
            return ",".join(self.record["search_space"])
        pairs = [tuple(pair) for pair in self.record["assignment"].values()]
        weights, activations = (",".join(sort_formats({pair[side] for pair in pairs})) for side in (0, 1))
        return weights if weights == activations else f"w {weights} a {activations}"

    @property
    def name(self) -> str:
        """Series and target; formats in place of the target if there is none."""
        target = self.record["cost_target"]
        aim = self.formats if target is None else f"≤ {target:.4g} {self.record['cost_unit']}"
        return f"{self.series} {aim}"

    @property
    def series(self) -> str:
        """Runs that share a colour and a front: those of a method, apart if one training served several budgets."""
        budgets = self.record.get(BUDGETS)
        method: str = self.record["method"]
        return f"{method} for {len(budgets)} budgets" if isinstance(budgets, list) else method

    @property
    def label(self) -> str:
        """Short name: method, target or formats, distinguishing settings, seed."""
        return " · ".join([self.name, *self.details, f"seed {self.record['seed']}"])

    @cached_property
    def key(self) -> tuple[str, ...]:
        """Key of the configuration: equal for runs that differ only in their seed and PLACE_SETTINGS."""
        shown = (self.record[name] for name in ("task", "model", "metric", "cost_type", "cost_target"))
        return (self.series, *map(str, shown), self.formats, json.dumps(self.settings, sort_keys=True, default=str))

    def history(self) -> list[dict[str, Any]]:
        """Read the lines of history.jsonl, without a last line that was cut off while it was written.

        Raises:
            DamagedFile: The file is not readable, or one of its lines is not a step.
        """
        path = self.folder / "history.jsonl"
        try:
            lines = path.read_bytes().splitlines(keepends=True)
        except FileNotFoundError:
            return []
        except OSError as error:
            raise DamagedFile(path, f"not readable: {error.strerror}") from None
        steps = []
        for number, line in enumerate(lines, start=1):
            try:
                step = json.loads(line)
            except ValueError:  # no JSON, or no text
                if line.endswith(b"\n"):
                    raise DamagedFile(path, f"damaged: line {number} is not JSON") from None
                continue
            if not isinstance(step, dict) or not isinstance(step.get("step"), NUMBER):
                raise DamagedFile(path, f"damaged: line {number} has no step")
            steps.append(step)
        return steps


@dataclass(frozen=True)
class Group:
    """Runs of one configuration with different seeds."""

    runs: tuple[Run, ...]

    @property
    def record(self) -> Mapping[str, Any]:
        """The record of the first run, for values that all runs of the group share."""
        return self.runs[0].record

    @property
    def series(self) -> str:
        """The series of its runs."""
        return self.runs[0].series

    @property
    def quality(self) -> tuple[float, float | None]:
        """Mean and standard deviation over the seeds."""
        return mean_sd([run.quality for run in self.runs])

    def has_cost(self, cost_type: str) -> bool:
        """Whether every run of the group has a cost of this type."""
        return all(cost_type in run.costs for run in self.runs)

    def cost(self, cost_type: str) -> tuple[float, float | None]:
        """Mean and standard deviation over the seeds."""
        return mean_sd([run.costs[cost_type] for run in self.runs])


def shown_runs(groups: Sequence[Group], max_runs: int) -> list[Run]:
    """Select the runs with figures of their own: the first seed of the first `max_runs` searched configurations."""
    return [group.runs[0] for group in groups if group.record["search_space"]][:max_runs]


def mean_sd(values: Sequence[float]) -> tuple[float, float | None]:
    """Mean and sample standard deviation; the latter is None for a single value."""
    mean = math.fsum(values) / len(values)
    if len(values) == 1:
        return mean, None
    return mean, math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (len(values) - 1))


def sort_formats(names: Iterable[str]) -> list[str]:
    """Sort format names by bits, then by name, without repetitions."""
    return sorted(set(names), key=lambda name: (parse_format(name).bits, name))


def _evaluated(metrics: Mapping[str, Any]) -> Mapping[str, Any]:
    """Metrics of the first split in {split: metrics}; metrics that are not nested by split are returned as they are."""
    return next((value for value in metrics.values() if isinstance(value, dict)), metrics)


def is_within(cost: float, target: float) -> bool:
    """Whether a cost keeps to its target, up to the rounding of a sum."""
    return cost <= target * (1 + 1e-9)


def evenly_spaced(items: Sequence[T], most: int) -> list[T]:
    """Up to `most` of the items, evenly spaced, the first and the last among them."""
    count = min(most, len(items))
    return [items[round(place * (len(items) - 1) / max(count - 1, 1))] for place in range(count)]


def lower_is_better(metric: str) -> bool:
    """Whether a lower value of the metric is better, as for a loss."""
    return metric in LOWER_IS_BETTER


def read_runs(roots: Sequence[Path]) -> tuple[list[Run], list[Excluded]]:
    """Read every run below `roots`.

    Returns:
        The valid runs, sorted by path, and what was excluded.

    Raises:
        UserError: One of the folders does not exist.
    """
    for root in roots:
        if not root.is_dir():
            raise UserError(f"DIR: no folder {root}")
    runs: list[Run] = []
    excluded: list[Excluded] = []
    seen: dict[tuple[str, ...], Run] = {}
    for folder in sorted({folder.resolve(): folder for root in roots for folder in _run_folders(root)}.values()):
        found = read_run(folder)
        if isinstance(found, Excluded):
            excluded.append(found)
        elif twin := seen.get((*found.key, str(found.record["seed"]))):
            same = "the same result" if twin.quality == found.quality else "another result"
            excluded.append(Excluded(folder, f"duplicate: same settings, seed and {same} as {twin.folder}"))
        else:
            seen[(*found.key, str(found.record["seed"]))] = found
            runs.append(found)
    return runs, excluded


def read_run(folder: Path) -> Run | Excluded:
    """Read the run in `folder`; an `Excluded` states why it does not count."""
    path = folder / "result.json"
    if not path.exists():
        return Excluded(folder, "unfinished: no result.json")
    try:
        record = json.loads(path.read_text())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        return Excluded(path, f"truncated or damaged: {error}")
    except OSError as error:
        return Excluded(path, f"not readable: {error.strerror}")
    if reason := _wrong(record):
        return Excluded(path, reason)
    try:
        return Run(folder, record, _settings(folder / RUN_FILE))
    except (yaml.YAMLError, UnicodeDecodeError, AttributeError):
        return Excluded(folder / RUN_FILE, "damaged: not a YAML mapping")


def read_each(runs: Iterable[Run], read: Callable[[Run], T]) -> tuple[dict[Path, T], list[Excluded]]:
    """Apply `read` to each run: (folder -> its result, the files that raised DamagedFile)."""
    found: dict[Path, T] = {}
    damaged = []
    for run in runs:
        try:
            found[run.folder] = read(run)
        except DamagedFile as error:
            damaged.append(error.excluded)
    return found, damaged


def group_runs(runs: Iterable[Run]) -> list[Group]:
    """Group repetitions of the same configuration, sorted by task, model and cost."""
    groups: dict[tuple[str, ...], list[Run]] = {}
    for run in runs:
        groups.setdefault(run.key, []).append(run)
    found = [Group(tuple(sorted(members, key=lambda run: run.record["seed"]))) for members in groups.values()]
    return sorted(found, key=lambda g: (g.record["task"], g.record["model"], g.cost(g.record["cost_type"])[0]))


def _run_folders(root: Path) -> Iterator[Path]:
    for folder, names, files in os.walk(root):
        inner = frozenset().union(*(INNER_FOLDERS.get(file, ()) for file in files))
        names[:] = [name for name in names if name not in inner]
        if RUN_FILES & set(files):
            yield Path(folder)


def _settings(path: Path) -> dict[str, Any]:
    if not path.exists():
        return {}
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # ten times as fast, where PyYAML was built with it
    settings = yaml.load(path.read_text(), Loader=loader) or {}
    return {name: value for name, value in settings.items() if name not in PLACE_SETTINGS}


def _wrong(record: Any) -> str | None:
    """Reason why a parsed result.json does not count; None if it counts."""
    if not isinstance(record, dict) or "schema_version" not in record:
        return "foreign: not a result record (no schema_version)"
    if record["schema_version"] != SCHEMA_VERSION:
        return f"foreign: schema_version {record['schema_version']}, this program reads {SCHEMA_VERSION}"
    if record.get("status") != "finished":
        return f"failed: {record.get('reason') or record.get('status')}"
    for name, types in FIELDS.items():
        if not isinstance(record.get(name), types):
            return f"incomplete: {name} is {json.dumps(record.get(name))}"
    if not isinstance(value := _evaluated(record["metrics"]).get(record["metric"]), NUMBER):
        return f"incomplete: the metric {record['metric']} is {json.dumps(value)}"
    for name in _not_finite(record):
        return f"not finite: {name}"
    return _wrong_formats(record)


def _wrong_formats(record: dict[str, Any]) -> str | None:
    pairs = list(record["assignment"].values())
    if not all(isinstance(pair, list) and len(pair) == 2 for pair in pairs):
        return "incomplete: assignment holds something other than [weight format, activation format]"
    for name in {name for pair in pairs for name in pair} | set(record["search_space"] or ()):
        try:
            parse_format(name)
        except ValueError as error:
            return f"foreign: {error}"
    return None


def _not_finite(value: Any, name: str = "") -> Iterator[str]:
    """Yield the dotted names of NaN and infinite numbers in a JSON value."""
    if isinstance(value, float) and not math.isfinite(value):
        yield f"{name} is {value}"
    elif isinstance(value, dict):
        for key, item in value.items():
            yield from _not_finite(item, f"{name}.{key}" if name else key)
    elif isinstance(value, list):
        for index, item in enumerate(value):
            yield from _not_finite(item, f"{name}[{index}]")
