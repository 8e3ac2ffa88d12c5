"""What a launch is made of: the runs of the grid, and how far each of them already is."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from eval.flags import RUN_FILE, complete, read_values, read_yaml
from eval.report_records import PLACE_SETTINGS, Excluded, Run, read_run
from eval.run_config import GRID_FLAGS, LauncherFlags, RunConfig, is_path
from quant.errors import UserError

_FOLDERS = ("data_dir", "model_path", "load_model_path", "save_model_path", "output_root_dir", "log_dir")
_FREE = (PLACE_SETTINGS - {"seed", "data_dir"}) | {"train_batch_size", "gradient_accumulation_steps"}
"""settings in which a relaunch may differ; of the last two only the product counts (see `launch_trial`)"""


def expand(config: RunConfig) -> list[RunConfig]:
    """Every run that the launcher flags ask for, complete and checked, with absolute paths, each in its own folder.

    Raises UserError for the first run that is wrong, for a grid flag beside its single form, and for two runs that
    would share a folder.
    """
    runs = list(dict.fromkeys(complete(_absolute(run)) for run in _grid(config)))
    if len(runs) > 1:
        for flag in ("run_id", "save_model_path"):
            if (value := getattr(config, flag)) is not None:
                raise UserError(f"--{flag} {value} names one run, and the grid has {len(runs)}: leave it out")
        runs = [r.updated(log_dir=str(Path(r.log_dir) / r.run_name)) if r.log_dir else r for r in runs]
    seen: dict[Path, RunConfig] = {}
    for run in runs:
        if twin := seen.get(run.run_folder):
            differ = ", ".join(f"--{name} {mine} and {other}" for name, mine, other in differences(twin, run))
            raise UserError(f"two runs would share the folder {run.run_folder}: {differ}")
        seen[run.run_folder] = run
    return runs


def _grid(config: RunConfig) -> Iterator[RunConfig]:
    lists = {name: _items(config, name) for name in GRID_FLAGS}
    plain = config.updated(config=None, **{f.name: f.default for f in fields(LauncherFlags)})
    for name, single in GRID_FLAGS.items():
        default = next(f.default for f in fields(RunConfig) if f.name == single)
        if lists[name] is not None and getattr(config, single) != default:
            raise UserError(f"--{name} contradicts --{single} {getattr(config, single)}: give one of them")
    axes = {GRID_FLAGS[name]: values for name, values in lists.items() if values is not None}
    if "target_bits" in axes:
        axes["target_bits"] = [str(bits) for bits in axes["target_bits"]]
    for values in itertools.product(*axes.values()):
        run = plain.updated(**dict(zip(axes, values, strict=True)))
        yield _fit_method(run) if "method" in axes else run


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
            raise UserError(f"--{name} {text}: {item.strip()!r} is no {'whole ' * (kind is int)}number") from None
    if "" in items or len(set(items)) < len(items):
        raise UserError(f"--{name} {text} has an empty entry or names one twice")
    return items


def _fit_method(run: RunConfig) -> RunConfig:
    """In a grid over methods the flags of one method are not errors for the others: each run keeps what it uses."""
    no_search: dict[str, Any] = {"search": False, "block_search": None, "single_decision": False, "fuse_groups": False}
    no_target: dict[str, Any] = {"cost_target": None, "target_bits": None}
    no_bits: dict[str, Any] = {"bits": None, "weight_bits": None, "activation_bits": None}
    if run.method == "float":
        return run.updated(**no_search, **no_target, **no_bits)
    if run.method == "uniform":
        bits_given = any(getattr(run, name) is not None for name in no_bits)
        if not bits_given and run.target_bits is not None:
            run = run.updated(bits=str(int(run.target_list[0])))  # the widest uniform format within the target
        return run.updated(**no_search, **no_target)
    return run.updated(**no_bits)


def _absolute(run: RunConfig) -> RunConfig:
    """`run` with absolute paths: a trial works in a folder of its own."""
    paths = {name: value for name in _FOLDERS if (value := getattr(run, name)) is not None}
    paths |= {name: value for name in ("task", "model") if (value := getattr(run, name)) and is_path(value)}
    return run.updated(**{name: str(Path(value).expanduser().resolve()) for name, value in paths.items()})


STOPPED = "stopped early"
"""how the reason of a run begins that --asha gave up"""


@dataclass(frozen=True)
class Progress:
    """How far a run is on disk."""

    config: RunConfig
    run: Run | None
    """its finished record"""
    reason: str | None
    """why it does not count as finished, where it was started"""

    @property
    def finished(self) -> bool:
        return self.run is not None

    @property
    def failed(self) -> bool:
        """Whether it ended with a record that says why there is no result."""
        return self.reason is not None and self.reason.startswith("failed") and not self.stopped

    @property
    def stopped(self) -> bool:
        """Whether --asha gave it up."""
        return self.reason is not None and STOPPED in self.reason


def look_up(config: RunConfig) -> Progress:
    """What the run's folder holds. Raises UserError if it belongs to a run with other flags."""
    folder = config.run_folder
    if (folder / RUN_FILE).exists() and (differ := differences(read_config(folder), config)):
        changes = ", ".join(f"--{name} {now} (there: {before})" for name, before, now in differ)
        raise UserError(f"{folder} holds a run with other flags: {changes}; choose another --exp_name")
    if not folder.exists():
        return Progress(config, None, None)
    found = read_run(folder)
    return Progress(config, None, found.reason) if isinstance(found, Excluded) else Progress(config, found, None)


def read_config(folder: Path) -> RunConfig:
    """The flags of the run in `folder`. Raises UserError where its config.yaml is damaged."""
    return read_values(read_yaml(folder / RUN_FILE, "--exp_name"), f"{folder / RUN_FILE}")


def differences(first: RunConfig, second: RunConfig) -> list[tuple[str, Any, Any]]:
    """Of two runs: (flag, first's value, second's value) of what makes a different result."""
    names = [f.name for f in fields(RunConfig) if f.name not in _FREE]
    pairs: list[tuple[str, Any, Any]] = [(name, getattr(first, name), getattr(second, name)) for name in names]
    first_batch, second_batch = (run.train_batch_size * run.gradient_accumulation_steps for run in (first, second))
    pairs.append(("train_batch_size", first_batch, second_batch))
    return [(name, a, b) for name, a, b in pairs if a != b]


def experiment_folders(runs: Sequence[RunConfig]) -> list[Path]:
    """The folders that hold the runs' folders, each once."""
    return list(dict.fromkeys(run.experiment_folder for run in runs))


def launch_folder(runs: Sequence[RunConfig]) -> Path:
    """Where the launch keeps its own files: beside the runs, or `<root>/a+b/<exp_name>` for tasks a and b."""
    folders = experiment_folders(runs)
    if len(folders) == 1:
        return folders[0]
    return folders[0].parents[1] / "+".join(folder.parent.name for folder in folders) / folders[0].name
