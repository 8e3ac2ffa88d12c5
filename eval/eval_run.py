"""Executes one run, from flags to a record: `python eval/eval_run.py --task digits --model convnet --search ...`.

load data and model -> quantize its layers -> cost and budget -> train (and search) -> evaluate once -> record
"""

from __future__ import annotations

import sys
from pathlib import Path

if __name__ == "__main__":  # Python puts the folder of a script, not the repository, on the path
    sys.path[0] = str(Path(__file__).resolve().parent.parent)
    from eval.commands import require_packages

    require_packages()

import json
import logging
import math
import os
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import yaml

from eval.config.parser import entry, flags_given, parse, to_yaml
from eval.config.run_config import GRID_FLAGS, RUN_FILE, RunConfig
from eval.export.reach import engines_in_reach, export_reach
from eval.launch.state import set_aside
from eval.report.records import Excluded, read_run
from eval.run.chosen_architecture import chosen_plan
from eval.run.full_disk import is_full_disk
from eval.run.lock import exclusive_lock
from eval.run.plan import Plan, make_plan
from eval.run.progress import RunProgress, make_console
from eval.run.record import LOSS_ROSE, cache_costs, costs_of, describe, outcome, searched_architecture
from eval.run.resolve import resolve, write_decisions
from eval.run.schema import LOSS_RISE, loss_rise
from eval.run.stopwatch import MEASURED, stopwatch
from eval.run.tracking import tracked
from eval.run.trainer import evaluate, make_trainer
from quant.errors import UserError
from quant.formats import FLOAT, Format
from trainer.training.checksums import numbered

if TYPE_CHECKING:  # importing torch and the Trainer takes seconds; flags are checked without them
    from quant.quant_module import QuantModule
    from trainer.reinforce_trainer import ReinforceTrainer

DYING = 5.0
"""Seconds to wait for the lock of the run folder, which a process that is about to end may still hold."""
MAY_CHANGE = {
    *GRID_FLAGS,
    *("task", "model_path", "data_dir", "load_model_path", "output_root_dir", "exp_name", "run_id", "config", "resume"),
    *("save_model_path", "save_strategy", "log_dir", "log_steps", "report_to", "quiet", "verify_retrain", "eval_steps"),
    *("eval_batch_size", "num_beams", "max_eval_samples", "num_workers", "device", "compile", "cuda_visible_devices"),
    *("num_cpus", "num_gpus", "cpus_per_trial", "gpus_per_trial", "ray_address", "dry_run", "asha", "hpo"),
}
"""Flags that may change on resume: locations, hardware, evaluation and logging."""


def run(
    config: RunConfig, on_step: Callable[[dict[str, Any]], None] | None = None, patience: float = DYING
) -> dict[str, Any]:
    """Train, search and evaluate according to `config`.

    Resumes from the last complete checkpoint in the folder of the run. Locks that folder, both for the command line
    and for the launcher.

    Args:
        config: Flags of the run.
        on_step: Called with each step's entry of history.jsonl.
        patience: Seconds to wait for the lock.

    Returns:
        The record, as written to result.json. Its status is 'failed' if training diverged.

    Raises:
        UserError: The input is invalid; raised before anything is written.
        FolderInUse: Another process holds the lock.
    """
    started = time.monotonic()
    refuse_other_flags(config)
    with ExitStack() as stack:
        quiet = config.quiet or not first_process()
        progress = stack.enter_context(RunProgress(make_console(sys.stderr, quiet)).shown())
        progress("loading PyTorch and transformers")
        plan = make_plan(config, progress)
        if first_process():
            stack.enter_context(exclusive_lock(config.run_folder, "run", "--run_id", patience))
            stack.enter_context(tracked(config))
            progress.write_to(config.run_folder)
        return execute(plan, on_step, progress, started)


def refuse_other_flags(config: RunConfig) -> None:
    """Check that the checkpoints in the run's folder were written with the same flags, except MAY_CHANGE.

    Raises:
        UserError: A flag has changed.
    """
    written = config.run_folder / RUN_FILE
    if not written.exists() or not numbered(config.run_folder / "checkpoints"):
        return
    before, now = _flags_in(written), yaml.safe_load(to_yaml(config))
    for values in (before, now):  # only the product counts, as the launcher halves a batch that does not fit
        values["train_batch_size"] *= values.pop("gradient_accumulation_steps")
    defaults = yaml.safe_load(to_yaml(RunConfig()))  # of flags that are newer than the run
    for name in sorted((before.keys() | now.keys()) - MAY_CHANGE):
        if before.get(name, defaults.get(name)) != now.get(name):
            raise UserError(
                f"--{name} {now.get(name)}: {config.run_folder} holds checkpoints of a run with {before.get(name)}; "
                "give what it was started with to go on from there, or choose another --run_id"
            )


def _flags_in(written: Path) -> dict[str, Any]:
    """Read the flags that a run has written; UserError if the file is damaged."""
    try:
        flags = yaml.safe_load(written.read_bytes())
    except (yaml.YAMLError, UnicodeDecodeError):
        flags = None
    if not isinstance(flags, dict) or not {"train_batch_size", "gradient_accumulation_steps"} <= flags.keys():
        raise UserError(f"{written} is damaged: remove it, and give the flags that the run was started with")
    return flags


def execute(
    plan: Plan, on_step: Callable[[dict[str, Any]], None] | None, progress: RunProgress, started: float
) -> dict[str, Any]:
    """Train, search and evaluate a plan, and write its record.

    Args:
        plan: Plan of the run.
        on_step: Called with each step's entry of history.jsonl.
        progress: Shows the progress.
        started: Start of the run on the monotonic clock, in seconds.

    Returns:
        The record.
    """
    from trainer.reinforce_trainer import TrainingDiverged
    from trainer.training.checkpoint import write_atomically, write_json

    config, folder = plan.config, plan.config.run_folder
    if first_process():
        write_atomically(folder / RUN_FILE, lambda temporary: Path(temporary).write_text(to_yaml(config)))
    trainer, modules, float_metrics = make_trainer(plan, on_step, progress=progress)
    record = describe(plan)
    try:
        if config.max_steps == 0:
            trainer.prepare()
            trainer.finish()
        else:
            trainer.train(resume_from_checkpoint=True)
        for turn, (bits, own_folder) in enumerate(config.smaller_targets.items()):
            own = config.updated(target_bits=f"{bits:g}", save_model_path=None)
            trainer.use(turn)
            complete = record | {"run_id": f"{config.run_name}-{own_folder.name}", "float_metrics": float_metrics}
            write_result(replace(plan, config=own), trainer, modules, complete, own_folder, started, progress)
        if config.smaller_targets:
            trainer.use(len(config.smaller_targets))
        complete = record | {"float_metrics": float_metrics}
        return write_result(plan, trainer, modules, complete, folder, started, progress)
    except TrainingDiverged as error:
        record |= {"status": "failed", "reason": str(error), "notes": [*record["notes"], *trainer.notes]}
        record |= {"wall_seconds": round(time.monotonic() - started, 1)}
        if first_process():
            write_json(folder / "result.json", record)
        return record


def write_result(
    plan: Plan,
    trainer: ReinforceTrainer,
    modules: dict[str, QuantModule],
    record: dict[str, Any],
    folder: Path,
    started: float,
    progress: RunProgress | None = None,
) -> dict[str, Any]:
    """Evaluate the current assignment of the model, and write its files to `folder`, the record last.

    Args:
        plan: Plan of the run.
        trainer: Its trainer.
        modules: Its quantized layers by name.
        record: The part of the record that is known so far.
        folder: Folder to write to.
        started: Start of the run on the monotonic clock, in seconds.
        progress: Shows the progress of --verify_retrain.

    Returns:
        The complete record.

    Raises:
        TrainingDiverged: A metric is not finite.
    """
    from cost.cost import assignment_to_json
    from quant.transforms.half import halve_rest
    from trainer.reinforce_trainer import TrainingDiverged
    from trainer.training.checkpoint import write_atomically, write_json

    answers: dict[str, dict[str, list[Any]]] = {}
    if trainer.architecture:
        whole, plan, modules = plan, chosen_plan(plan), dict(trainer.modules)
        record = record | searched_architecture(whole, plan, trainer.architecture)
    assignment = final_assignment(plan, trainer)
    if plan.config.cost_scope == "file":
        halve_rest(trainer.model, modules)
    metrics = evaluate(trainer, plan, answers)
    for split, values in metrics.items():
        for name, value in values.items():
            if not math.isfinite(value):
                raise TrainingDiverged(f"{name} on {split} is {value} after {trainer.state.global_step} steps")
    record = costs_of(plan, assignment, trainer.calibration.reach) | record
    target = trainer.cost_target if plan.config.chooses else None
    engines = engines_in_reach(plan, modules, assignment, target)
    record |= {"exports": export_reach(plan, modules), "engines": engines}
    record |= cache_costs(plan)
    record["notes"] = [*record["notes"], *trainer.notes]
    history = trainer.step_logger.history
    if history is not None and plan.config.max_steps != 0 and (rise := history.rise()):
        record[LOSS_RISE] = list(rise)
        record["notes"].append(f"{LOSS_ROSE} {loss_rise(record)}")
    if plan.config.chooses:
        record["cost_target"] = trainer.cost_target
    if trainer.contest is not None:
        record["contest"] = trainer.contest
    record |= {
        "metrics": metrics,
        "assignment": assignment_to_json(assignment),
        "steps": trainer.state.global_step,
        "wall_seconds": round(time.monotonic() - started, 1),
    }
    if first_process():
        trainer.tell("saving")
        if folder != plan.config.run_folder:
            write_atomically(folder / RUN_FILE, lambda temporary: Path(temporary).write_text(to_yaml(plan.config)))
        write_json(folder / "assignment.json", record["assignment"])
        write_decisions(trainer, folder)
        if answers:
            write_json(folder / "predictions.json", answers)
        save_result(plan, modules, assignment, folder / "model")
    if plan.config.max_latency is not None and plan.config.chooses and first_process():
        trainer.tell("timing the exported file")
        record[MEASURED] = stopwatch(plan, trainer.model, modules)
    if plan.config.verify_retrain:
        record["retrained"], notes = retrain(plan.config, assignment, folder, progress, trainer.structure)
        record["notes"] += [f"retrained: {note}" for note in notes]
    if first_process():
        write_json(folder / "result.json", record)
    return record


def retrain(
    config: RunConfig,
    assignment: dict[str, tuple[Format, Format]],
    folder: Path,
    progress: RunProgress | None = None,
    structure: Sequence[int] | None = None,
) -> tuple[dict[str, dict[str, float]], list[str]]:
    """Train an assignment without search, from the same float weights and for the same number of steps as the run.

    If the metrics of the run are close to these, the weights of the one-shot search need no retraining.

    Args:
        config: Flags of the run.
        assignment: Layer name -> (weight format, activation format).
        folder: Folder of the run, which gets the sub-folder `retrained`.
        progress: Shows the progress.
        structure: The chosen architecture; None: that of the model.

    Returns:
        The metrics by split, recorded as `retrained`, and the notes of the trainer.
    """
    retrain_config = config.updated(
        run_id=f"{folder.relative_to(config.experiment_folder)}/retrained", save_model_path=None
    )
    plan = make_plan(retrain_config, progress)
    trainer, _, _ = make_trainer(plan, assignment=assignment, progress=progress, structure=structure)
    trainer.train(resume_from_checkpoint=True)
    return evaluate(trainer, plan), trainer.notes


def first_process() -> bool:
    """Whether this process writes files. With torchrun, only the process of rank 0 does, but all return the record."""
    return os.environ.get("RANK", "0") == "0"


def final_assignment(plan: Plan, trainer: ReinforceTrainer) -> dict[str, tuple[Format, Format]]:
    """Return the formats of the layers at the end of a run; float without quantization."""
    return trainer.assignment or dict.fromkeys(plan.layers, (FLOAT, FLOAT))


def save_result(
    plan: Plan, modules: dict[str, QuantModule], assignment: dict[str, tuple[Format, Format]], own: Path
) -> None:
    """Save the trained model in the folder of the run and to --save_model_path; with all budgets, if there are several.

    Args:
        plan: Plan of the run.
        modules: Its quantized layers by name.
        assignment: Layer name -> (weight format, activation format).
        own: Folder of the model within the folder of the run.
    """
    from eval.budgets import write_budgets
    from eval.run.plan import inputs_of
    from eval.saved_model import save_model

    inputs = inputs_of(plan)
    others = {bits: folder / "model" for bits, folder in plan.config.smaller_targets.items()}
    folders: Sequence[str | Path | None] = (own, plan.config.save_model_path)
    for folder in folders:
        if folder is not None:
            save_model(Path(folder), plan.config, plan.bundle, modules, assignment, plan.data.num_labels, inputs)
            if others:
                write_budgets(Path(folder), plan.config.target_list[-1], others)


def refuse_finished(config: RunConfig) -> None:
    """Check that the run has no valid record. A damaged record or that of a failure is renamed to result.json.old.

    Raises:
        UserError: The run is finished.
    """
    result = config.run_folder / "result.json"
    if not result.exists():
        return
    found = read_run(config.run_folder)
    if not isinstance(found, Excluded):
        raise UserError(f"--run_id {config.run_name}: {result} exists already; choose another --exp_name or --run_id")
    set_aside([config])
    print(f"{result}: {found.reason}; it is kept as {result.name}.old, and the run goes on", file=sys.stderr)


RESOLVE_FLAGS = {"resolve", "target_bits", "data_dir", "quiet"}
"""Flags that --resolve goes with; all others are those of the search."""


def resolve_budget(given: dict[str, Any]) -> int:
    """Choose formats for another budget of a finished search, for --resolve, and print the outcome.

    Args:
        given: Flag -> value, of the command line alone.

    Returns:
        The exit code.

    Raises:
        UserError: For other flags, a budget that is no number, or a folder that is no finished search.
    """
    folder = Path(given["resolve"])
    if others := sorted(given.keys() - RESOLVE_FLAGS):
        raise UserError(
            f"--{others[0]} contradicts --resolve {folder}: all flags but --target_bits are those of its run"
        )
    try:
        bits = float(given.get("target_bits", "none is given"))
    except ValueError as error:
        raise UserError(f"--resolve {folder}: needs one --target_bits: {error}") from None
    quiet = bool(given.get("quiet"))
    logging.basicConfig(level=logging.WARNING if quiet else logging.INFO, format="%(message)s")
    with ExitStack() as stack:
        progress = stack.enter_context(RunProgress(make_console(sys.stderr, quiet)).shown())
        if folder.is_dir():  # else `resolve` says so
            stack.enter_context(exclusive_lock(folder, "run", "--resolve", DYING))
        record, own = resolve(folder, bits, write_result, progress, given.get("data_dir"))
    print("\n".join([*outcome(record, own), f"record: {own / 'result.json'}"]))
    return 0


def show_plan(config: RunConfig) -> int:
    """Print the same plan as --dry_run of the launcher. Returns the exit code."""
    from eval.launch.estimates import estimate_runs
    from eval.launch.plan_table import print_plan
    from eval.run.progress import make_console

    runs = {config.run_name: config}
    print_plan(make_console(sys.stdout), runs, estimate_runs(runs, measure=True))
    return 0


def main(argv: list[str]) -> int:
    """Execute a run and print its summary and the path of its record. Returns the exit code."""
    if any(word.split("=")[0] == "--resolve" for word in argv):
        return resolve_budget(flags_given(argv))
    config = parse(argv)
    if config.cuda_visible_devices is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = config.cuda_visible_devices
    quiet = config.quiet or not first_process()
    logging.basicConfig(level=logging.WARNING if quiet else logging.INFO, format="%(message)s")
    if config.dry_run:
        return show_plan(config)
    if first_process():
        refuse_finished(config)
        resumes = any(word.split("=")[0] == "--resume" for word in argv)
        if resumes and not numbered(config.run_folder / "checkpoints"):
            print(f"{config.run_folder} holds no checkpoint: the run starts from its first step", file=sys.stderr)
    try:
        record = run(config)
    except Exception as error:
        if not is_full_disk(error):
            raise
        print(
            f"failed: the disk of {config.run_folder} is full; make room, and give the same command again: "
            "the run goes on from its last checkpoint",
            file=sys.stderr,
        )
        return 1
    if not first_process():
        return 0
    if record["status"] != "finished":
        print(f"failed: {record['reason']}", file=sys.stderr)
        return 1
    for folder in [*config.smaller_targets.values(), config.run_folder]:
        path = folder / "result.json"
        print("\n".join([*outcome(json.loads(path.read_text()), folder), f"record: {path}"]))
    return 0


if __name__ == "__main__":
    entry(main)
