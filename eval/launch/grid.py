"""The grid of a launch: its runs, and which of them are already finished."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from eval.config.effects import without_idle
from eval.config.files import is_path
from eval.config.parser import complete, read_values, read_yaml
from eval.config.quant_yaml import TENSOR_FLAGS
from eval.config.run_config import GRID_FLAGS, RUN_FILE, LauncherFlags, RunConfig
from eval.report.records import PLACE_SETTINGS, Excluded, Run, read_run
from quant.errors import UserError
from quant.formats import parse_search_space

_FOLDERS = ("data_dir", "model_path", "load_model_path", "save_model_path", "output_root_dir", "log_dir")
_FREE = (PLACE_SETTINGS - {"seed", "data_dir"}) | {"train_batch_size", "gradient_accumulation_steps"}
"""Settings that a relaunch may change. Of the last two only the product counts: see `trial._run_within_memory`."""


def expand(config: RunConfig) -> list[RunConfig]:
    """Expand the grid flags to the list of runs, with all defaults filled in and absolute paths.

    Raises:
        UserError: A run is invalid, a grid flag contradicts its single form (--seeds and --seed), or two runs would
            share a folder.
    """
    launcher = {entry.name: entry.default for entry in fields(LauncherFlags)}
    runs = list(dict.fromkeys(complete(_absolute(run)).updated(**launcher) for run in _grid(config)))
    if len(runs) > 1:
        for flag in ("run_id", "save_model_path"):
            if (value := getattr(config, flag)) is not None:
                raise UserError(f"--{flag} {value} names one run, and the grid has {len(runs)}: leave it out")
    seen: dict[Path, RunConfig] = {}
    for run in runs:
        if twin := seen.get(run.run_folder):
            differ = ", ".join(f"--{name} {mine} and {other}" for name, mine, other in differences(twin, run))
            raise UserError(f"two runs would share the folder {run.run_folder}: {differ}")
        seen[run.run_folder] = run
    if len(runs) > 1:  # each run needs its own folder for TensorBoard curves
        named = by_name(runs)
        runs = [r.updated(log_dir=str(Path(r.log_dir) / name)) if r.log_dir else r for name, r in named.items()]
    return runs


def by_name(runs: Iterable[RunConfig]) -> dict[str, RunConfig]:
    """Map names to runs: a run's own name, prefixed by its task if the launch has several tasks."""
    runs = list(runs)
    several = len({run.task_name for run in runs}) > 1
    return {f"{run.task_name}/{run.run_name}" if several else run.run_name: run for run in runs}


def _grid(config: RunConfig) -> Iterator[RunConfig]:
    lists = {name: _items(config, name) for name in GRID_FLAGS}
    plain = config.updated(config=None, resume=None, **dict.fromkeys(GRID_FLAGS))
    for name, single in GRID_FLAGS.items():
        default = next(f.default for f in fields(RunConfig) if f.name == single)
        if lists[name] is not None and getattr(config, single) != default:
            raise UserError(f"--{name} contradicts --{single} {getattr(config, single)}: give one of them")
    axes = {GRID_FLAGS[name]: values for name, values in lists.items() if values is not None}
    if "target_bits" in axes:
        axes["target_bits"] = [f"{bits:.12g}" for bits in axes["target_bits"]]
    for values in itertools.product(*axes.values()):
        run = plain.updated(**dict(zip(axes, values, strict=True)))
        if "method" in axes:
            run = _fit_method(run)
        yield without_idle(run.updated(method=run.own_method)) if {"method", "task"} & axes.keys() else run


def _items(config: RunConfig, name: str) -> list[Any] | None:
    text = getattr(config, name)
    if text is None:
        return None
    kind = {"targets": float, "seeds": int}.get(name, str)
    items = []
    for item in text.split(","):
        try:
            items.append(kind(item.strip()))
        except ValueError:
            expected = "whole number" if kind is int else "number"
            raise UserError(f"--{name} {text}: {item.strip()!r} is no {expected}") from None
    if "" in items or len(set(items)) < len(items):
        raise UserError(f"--{name} {text} has an empty entry or names one twice")
    return items


_SEARCH = ("search", "block_search", "single_decision", "fuse_groups", "fuse_experts")
_BITS = ("bits", "weight_bits", "activation_bits")
_LIMITS = ("max_memory", "max_compute", "max_latency", "latency_target")
_BUDGET = ("cost_target", "target_bits", "max_drop", *_LIMITS, "verify_retrain")
_NOT_IN_FLOAT = (
    "distill",
    "gamma_migration",
    "rotate",
    "smooth_quant",
    "smooth_quant_alpha",
    "high_precision_ops",
    *TENSOR_FLAGS,
)


def _fit_method(run: RunConfig) -> RunConfig:
    """Reset the flags that `run.method` does not use, which would be errors outside a grid over methods."""
    if run.method == "float":
        return _without(run, *_SEARCH, *_BITS, *_BUDGET, *_NOT_IN_FLOAT)
    if run.method == "uniform":
        if all(getattr(run, name) is None for name in _BITS):
            if run.target_bits is None or any(getattr(run, name) is not None for name in _LIMITS):
                return _without(run, *_SEARCH)  # the run itself selects the best uniform format within its budget
            run = run.updated(bits=str(int(run.target_list[0])))  # the widest uniform format within the target
        return _without(run, *_SEARCH, *_BUDGET)
    return _without(run, *_BITS)


def _without(run: RunConfig, *names: str) -> RunConfig:
    """Return `run` with the named flags reset to their defaults."""
    return run.updated(**{entry.name: entry.default for entry in fields(RunConfig) if entry.name in names})


def _absolute(run: RunConfig) -> RunConfig:
    """Return `run` with absolute paths, because a trial has another working directory."""
    paths = {name: value for name in _FOLDERS if (value := getattr(run, name)) is not None}
    paths |= {name: value for name in ("task", "model") if (value := getattr(run, name)) and is_path(value)}
    return run.updated(**{name: str(Path(value).expanduser().resolve()) for name, value in paths.items()})


STOPPED = "stopped early"
"""First words of the recorded reason of a run that --asha stopped."""


@dataclass(frozen=True)
class RunState:
    """State of a run according to its folder."""

    config: RunConfig
    run: Run | None
    """The finished record; None if there is none."""
    reason: str | None
    """Why a run that was started has no finished record."""

    @property
    def finished(self) -> bool:
        """Whether the run has a finished record."""
        return self.run is not None

    @property
    def failed(self) -> bool:
        """Whether the run ended with the record of a failure."""
        return self.reason is not None and self.reason.startswith("failed") and not self.stopped

    @property
    def stopped(self) -> bool:
        """Whether --asha stopped the run."""
        return self.reason is not None and STOPPED in self.reason


def read_state(config: RunConfig) -> RunState:
    """Read the state of a run from its folder.

    Raises:
        UserError: The folder belongs to a run with other flags.
    """
    folder = config.run_folder
    if (folder / RUN_FILE).exists() and (differ := differences(read_config(folder), config)):
        changes = ", ".join(f"--{name} {now} (there: {before})" for name, before, now in differ)
        raise UserError(f"{folder} holds a run with other flags: {changes}; choose another --exp_name")
    if not folder.exists():
        return RunState(config, None, None)
    found = read_run(folder)
    return RunState(config, None, found.reason) if isinstance(found, Excluded) else RunState(config, found, None)


def read_config(folder: Path) -> RunConfig:
    """Read the flags of the run in `folder`.

    Raises:
        UserError: Its config.yaml is damaged.
    """
    return read_values(read_yaml(folder / RUN_FILE, "--exp_name"), f"{folder / RUN_FILE}")


def differences(first: RunConfig, second: RunConfig) -> list[tuple[str, Any, Any]]:
    """List the flags that change the result and differ: tuples of flag, value of `first`, value of `second`."""
    names = [f.name for f in fields(RunConfig) if f.name not in _FREE]
    pairs: list[tuple[str, Any, Any]] = [(name, getattr(first, name), getattr(second, name)) for name in names]
    first_batch, second_batch = (run.train_batch_size * run.gradient_accumulation_steps for run in (first, second))
    pairs.append(("train_batch_size", first_batch, second_batch))
    return [(name, a, b) for name, a, b in pairs if a != b and _normalized(name, a) != _normalized(name, b)]


def _normalized(name: str, value: Any) -> Any:
    """Normalize equivalent values of a flag: search spaces 4,8 and int4,int8, or targets 6 and 6.0."""
    if name == "search_space":
        return parse_search_space(value)
    if name == "target_bits" and value is not None:
        return [float(bits) for bits in value.split(",")]
    return value


def experiment_folders(runs: Sequence[RunConfig]) -> list[Path]:
    """List the distinct parent folders of the runs."""
    return list(dict.fromkeys(run.experiment_folder for run in runs))


def launch_folder(runs: Sequence[RunConfig]) -> Path:
    """Return the folder for the launch's own files: that of the runs, or `<root>/a+b/<exp_name>` for tasks a and b."""
    folders = experiment_folders(runs)
    if len(folders) == 1:
        return folders[0]
    return folders[0].parents[1] / "+".join(folder.parent.name for folder in folders) / folders[0].name
