"""A run inside a Ray worker: output redirection, reports to Tune, and the handling of failures."""

from __future__ import annotations

import gc
import math
import time
import traceback
from collections.abc import Callable, Mapping
from contextlib import redirect_stderr, redirect_stdout
from functools import partial
from typing import Any

from eval.config.run_config import RunConfig
from eval.report.records import lower_is_better
from eval.run.lock import FolderInUse
from eval.run.schema import SCHEMA_VERSION
from quant.errors import UserError

Runner = Callable[..., dict[str, Any]]
"""`eval.eval_run.run` or a replacement for it: (config, on_step=...) -> record."""

REPORT_SECONDS = 1.0
"""Minimum interval between two reports to Tune, because each report waits for the driver."""
LOCK_SECONDS = 60.0
"""Time to wait for the lock of a run folder, which the process of a killed launch may hold for some seconds more."""
MEASURES = ("loss", "reward", "quality", "cost", "entropy")
TUNED = {"cost_beta": "beta", "rl_learning_rate": "lr", "max_entropy_beta": "entropy"}
"""Setting that --hpo tunes -> its short form in the names of runs."""


def trial(params: Mapping[str, Any], runs: Mapping[str, RunConfig], runner: Runner | None = None) -> None:
    """Trainable of Tune: execute the run named `params["run"]`, from its last checkpoint if it has one.

    Returns at once if the run has a record. Tune may start such a run again after a failure.

    Args:
        params: Parameters of the trial: the name of the run and, with --hpo, settings to try.
        runs: Runs by name.
        runner: Replaces `eval.eval_run.run`.
    """
    from ray import tune

    config = with_settings(runs[params["run"]], params)
    folder = config.run_folder
    if (folder / "result.json").exists():
        return
    _use_threads(tune.get_context().get_trial_resources().required_resources.get("CPU", 1))
    folder.mkdir(parents=True, exist_ok=True)
    with (
        (folder / "run.log").open("a", buffering=1) as log,
        redirect_stdout(log),
        redirect_stderr(log),
        _FailureRecorder(config),
    ):
        reporter = Reporter(tune.report)
        reporter.finish(_run_within_memory(runner or _real_run(), config, reporter))


def _real_run() -> Runner:
    from eval.eval_run import run  # a slow import, needed only in the process of a trial

    return partial(run, patience=LOCK_SECONDS)


def with_settings(config: RunConfig, params: Mapping[str, Any]) -> RunConfig:
    """Return `config` with the settings that --hpo sampled, and a folder named after them."""
    settings = {name: float(f"{params[name]:.4g}") for name in TUNED if params.get(name) is not None}
    if not settings:
        return config
    name = "-".join([config.run_name, *(f"{TUNED[key]}{value:g}" for key, value in settings.items())])
    return config.updated(run_id=name, **settings)


def objective(record: Mapping[str, Any]) -> float:
    """Return the objective of --hpo: the metric of the first evaluated split, negated if lower is better."""
    value = _number(next(iter(record["metrics"].values()), {}).get(record["metric"]))
    return -value if lower_is_better(record["metric"]) else value


class Reporter:
    """Reports the steps of a run to Tune, always with the same keys, because Tune aborts if one is missing."""

    def __init__(self, report: Callable[[dict[str, float]], None]) -> None:
        self._report, self._last, self._score = report, -math.inf, math.nan

    def __call__(self, step: Mapping[str, Any]) -> None:
        """Update the score with an entry of history.jsonl, and report it every REPORT_SECONDS."""
        measures = {name: _number(step.get(name)) for name in MEASURES}
        # Mean probability of the correct answer: on held-out examples in a search, otherwise on the training batch.
        score = measures["quality"] if not math.isnan(measures["quality"]) else math.exp(-abs(measures["loss"]))
        self._score = score if math.isnan(self._score) else 0.8 * self._score + 0.2 * score
        if time.monotonic() - self._last >= REPORT_SECONDS:
            self._last = time.monotonic()
            self._report({"step": int(step["step"]), "score": self._score, "objective": math.nan, **measures})

    def finish(self, record: Mapping[str, Any]) -> None:
        """Report the metric and the cost of a finished run, which TensorBoard shows next to its settings."""
        if record["status"] == "finished":
            last = dict.fromkeys(MEASURES, math.nan) | {"cost": record["cost"], "objective": objective(record)}
            self._report({"step": record["steps"], "score": self._score, **last})


def _number(value: Any) -> float:
    return math.nan if value is None else float(value)


def _run_within_memory(runner: Runner, config: RunConfig, on_step: Reporter) -> dict[str, Any]:
    """Execute a run; if memory runs out, repeat it with half the batch size and twice the accumulation steps."""
    try:
        return runner(config, on_step=on_step)
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error) or config.train_batch_size % 2:
            raise
    gc.collect()
    _empty_gpu_cache()
    batch, accumulation = config.train_batch_size // 2, config.gradient_accumulation_steps * 2
    note = (
        f"out of memory with --train_batch_size {config.train_batch_size}: "
        f"run with {batch} and --gradient_accumulation_steps {accumulation}"
    )
    print(note)
    halved = config.updated(train_batch_size=batch, gradient_accumulation_steps=accumulation)
    return amend_record(config, runner(halved, on_step=on_step), note)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error means that a GPU or the CPU ran out of memory; for the CPU torch raises a RuntimeError."""
    return (
        isinstance(error, MemoryError)
        or type(error).__name__ == "OutOfMemoryError"
        or "not enough memory" in str(error)
    )


def amend_record(config: RunConfig, record: dict[str, Any], note: str) -> dict[str, Any]:
    """Add a note to `record`, and write it to the run's result.json."""
    from trainer.training.checkpoint import write_json

    record = {**record, "notes": [*record.get("notes", ()), note]}
    write_json(config.run_folder / "result.json", record)
    return record


def record_failure(config: RunConfig, reason: str) -> None:
    """Write a result.json with the reason of a failure, unless the run has written its own."""
    from trainer.training.checkpoint import write_json

    path = config.run_folder / "result.json"
    if not path.exists():
        names = {"task": config.task_name, "model": config.model_name, "method": config.method, "seed": config.seed}
        record = {"schema_version": SCHEMA_VERSION, "status": "failed", "reason": reason, **names}
        record["run_id"] = config.run_name
        write_json(path, record)


class _FailureRecorder:
    """Context manager that records the reason of a failure, and passes the error on to Tune."""

    def __init__(self, config: RunConfig) -> None:
        self._config = config

    def __enter__(self) -> None: ...

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: Any) -> None:
        if isinstance(error, FolderInUse):
            return  # the record in the folder belongs to the other process
        if isinstance(error, Exception):
            traceback.print_exception(error)
            record_failure(self._config, one_line(error))


def one_line(error: BaseException) -> str:
    """Format an exception as one line: its message, preceded by its type unless it is a UserError."""
    message = " ".join(str(error).split())[:500]
    return message if isinstance(error, UserError) else f"{type(error).__name__}: {message}".rstrip(": ")


def _use_threads(cpus: float) -> None:
    """Use one thread per core of the trial. Tune reuses processes, so this is set for every trial."""
    import torch

    torch.set_num_threads(max(1, int(cpus)))


def _empty_gpu_cache() -> None:
    import torch

    if torch.cuda.is_available():
        torch.cuda.empty_cache()
