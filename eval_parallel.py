"""The launcher: executes one run or a grid of runs as resumable Ray Tune trials, on one machine or a cluster.

python eval_parallel.py --task mrpc --model bert --block_search --search_space 4,8
python eval_parallel.py --task digits --model resnet20 --methods search,uniform,float --targets 4.5,5 --seeds 0,1,2
"""

from __future__ import annotations

if __name__ == "__main__":  # before the imports that need the packages
    from eval.commands import require_packages

    require_packages()

import glob
import os
import shlex
import signal
import sys
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, redirect_stderr, redirect_stdout
from pathlib import Path

from rich.console import Console

from cost.units import UNITS
from eval.commands import again, command, installed
from eval.config.parser import INTERRUPTED, entry
from eval.config.run_config import TUNE_FOLDER, RunConfig
from eval.config.validation import refuse_link
from eval.launch.estimates import RunEstimate, estimate_runs
from eval.launch.grid import RunState, by_name, expand, experiment_folders, launch_folder, read_state
from eval.launch.hyperparameters import best, check_tuning, early_stopping, hyperparameter_search, tried
from eval.launch.plan_table import print_plan
from eval.launch.progress import Watch, note_lines, result_table, waiting, watching
from eval.launch.ray_cluster import Share, check_request, disk_is_full, fit, join, ray_session
from eval.launch.state import locked, read_launch, set_aside, write_launch
from eval.launch.trial import TUNED, Runner
from eval.run.progress import make_console
from eval.run.record import outcome


def main(argv: Sequence[str], runner: Runner | None = None) -> int:
    """Execute the launch that the command line describes.

    Args:
        argv: Words of the command line.
        runner: Replaces `eval.eval_run.run`; the data and models of the runs are then not checked in advance.

    Returns:
        Exit code: 0, 1 if any run failed, 130 after Ctrl-C.

    Raises:
        UserError: A flag is invalid, or the launch cannot start.
    """
    config = read_launch(argv)
    runs = expand(config)
    share = check_request(config, len(runs) if config.hpo is None else config.hpo)
    check_tuning(config, runs)
    if config.cuda_visible_devices is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = config.cuda_visible_devices
    if config.dry_run:
        return show_plan(config, by_name(runs), share)
    folder = launch_folder(runs)
    for place in (folder, folder / TUNE_FOLDER):
        refuse_link("--exp_name", place, runs[0].output_root_dir)
    console = make_console(sys.stderr, config.quiet)
    with locked(list(dict.fromkeys([folder, *experiment_folders(runs)]))):
        states = run_states(config, runs)
        missing = {name: state.config for name, state in states.items() if not is_over(config, state)}
        estimates: dict[str, RunEstimate] = {}
        if runner is None and (missing or config.hpo):
            estimates = check_runs(missing or by_name(runs[:1]), console)
        if (kept := write_launch(folder, config, runs)) is not None:
            make_console(sys.stderr).print(f"An earlier launch here is not finished; go on with it by --resume {kept}")
        set_aside(missing.values())
        died: dict[str, str] = {}
        try:
            if missing or config.hpo:
                died = launch(config, runs, missing, estimates, share, runner)
        except KeyboardInterrupt:
            pass  # the report lists the unfinished runs
        return report(config, run_states(config, runs), folder, died)


def run_states(config: RunConfig, runs: Sequence[RunConfig]) -> dict[str, RunState]:
    """Read the states of the runs by name; with --hpo, of the runs that were tried so far."""
    if config.hpo:
        return {state.config.run_name: state for state in tried(runs[0])}
    return {name: read_state(run) for name, run in by_name(runs).items()}


def is_over(config: RunConfig, state: RunState) -> bool:
    """Whether a run need not be executed: it is finished, --asha stopped it, or it failed with settings of --hpo."""
    return state.finished or (config.asha and state.stopped) or (config.hpo is not None and state.failed)


def launch(
    config: RunConfig,
    runs: Sequence[RunConfig],
    missing: Mapping[str, RunConfig],
    estimates: Mapping[str, RunEstimate],
    share: Share | None,
    runner: Runner | None,
) -> dict[str, str]:
    """Execute the missing runs on Ray, then the remaining trials of --hpo. The output of Ray goes to launch.log.

    Args:
        config: Flags of the launch.
        runs: All runs of the launch.
        missing: Runs to execute, by name.
        estimates: Their estimates, by name.
        share: Resources of each run; None to ask the cluster for them.
        runner: Replaces `eval.eval_run.run`.

    Returns:
        Name -> reason, for the runs whose process ended without a record.

    Raises:
        KeyboardInterrupt: After Ctrl-C or SIGTERM.
    """
    folder = launch_folder(runs)
    console = make_console(sys.stderr, config.quiet)
    steps = [estimate.steps for estimate in estimates.values()] or [run.max_steps for run in runs]
    settings = early_stopping(steps) if config.asha else {}
    with ExitStack() as stack:
        log = stack.enter_context((folder / "launch.log").open("a"))
        with waiting(console, "starting Ray" if config.ray_address is None else f"joining Ray at {config.ray_address}"):
            stack.enter_context(redirect_stdout(log))
            stack.enter_context(redirect_stderr(log))
            dashboard = stack.enter_context(ray_session(config))
        # Replaces Ray's handler: SIGTERM from a job manager has the same effect as Ctrl-C.
        signal.signal(signal.SIGTERM, lambda number, frame: signal.raise_signal(signal.SIGINT))
        share = share or join(config, folder, runs)
        if dashboard:
            token = f"{installed('ray')} get-auth-token"
            console.print(f"Dashboard: http://{dashboard} while runs are at work; its token: {token}")
        with watching(watch(config, runs[0], missing, estimates), console):
            died = {}
            if missing:
                died = fit(missing, share, folder / TUNE_FOLDER, console, runner, **settings)
                if any(not (r.run_folder / "result.json").exists() for name, r in missing.items() if name not in died):
                    raise KeyboardInterrupt  # after Ctrl-C, Tune returns normally
            if config.hpo and (search := hyperparameter_search(runs[0], config.hpo)):
                died |= fit(by_name(runs), share, folder / TUNE_FOLDER, console, runner, **search, **settings)
    return died


def watch(
    config: RunConfig, base: RunConfig, missing: Mapping[str, RunConfig], estimates: Mapping[str, RunEstimate]
) -> Watch:
    """Make the `Watch` that follows the runs of this launch.

    Args:
        config: Flags of the launch.
        base: Its first run.
        missing: Runs to follow, by name; with --hpo, the trials in the folder of `base` are followed instead.
        estimates: Estimates by name.
    """
    unit = UNITS[base.cost_type]
    if not config.hpo:
        folders = {name: run.run_folder for name, run in missing.items()}
        return Watch(lambda: folders, estimates.get, len(missing), unit)
    pattern = f"{glob.escape(base.run_name)}-*"
    estimate = next(iter(estimates.values()), None)
    return Watch(
        lambda: {path.name: path for path in base.experiment_folder.glob(pattern)},
        lambda name: estimate,
        config.hpo,
        unit,
    )


def check_runs(runs: Mapping[str, RunConfig], console: Console, measure: bool = False) -> dict[str, RunEstimate]:
    """Estimate every run, which raises UserError for invalid data, models or budgets before any run starts."""
    many = f"{len(runs)} runs" if len(runs) > 1 else "the run"
    with waiting(console, f"checking {many}: reading data, building models" + (", timing a step" if measure else "")):
        return estimate_runs(runs, measure)


def show_plan(config: RunConfig, runs: Mapping[str, RunConfig], share: Share | None) -> int:
    """Print the output of --dry_run. Returns the exit code."""
    estimates = check_runs(runs, make_console(sys.stderr, config.quiet), measure=True)
    console = make_console(sys.stdout)
    print_plan(console, runs, estimates)
    if share is not None and share.concurrent > 1:
        console.print(f"{share.concurrent} at a time, each with {share.cpus:g} CPU and {share.gpus:g} GPU")
    return 0


def report(config: RunConfig, states: Mapping[str, RunState], folder: Path, died: Mapping[str, str]) -> int:
    """Print the result of every run, or why it has none, and the commands to go on with.

    Args:
        config: Flags of the launch.
        states: States of its runs by name.
        folder: Folder of the launch.
        died: Name -> reason, for the runs whose process ended without a record.

    Returns:
        Exit code: 0, 1 if any run failed, 130 if any run is unfinished.
    """
    console = make_console(sys.stdout)
    console.print(result_table(states, died))
    for line in note_lines(states):
        console.print(line)
    failed = [name for name, state in states.items() if state.failed or name in died]
    tried_enough = config.hpo is None or len(states) >= config.hpo
    ended = [state.finished or state.failed or state.stopped for state in states.values()]
    unfinished = not (tried_enough and all(ended))
    if config.hpo and (winner := best(list(states.values()))):
        chosen = " ".join(f"--{name} {getattr(winner.config, name):g}" for name in TUNED)
        console.print(f"\nBest on the validation split (so report it on data that chose nothing): {chosen}")
    if failed:
        console.print(f"\n{len(failed)} of {len(states)} runs failed: {', '.join(failed)}")
    if failed or unfinished:
        if disk_is_full(folder):
            console.print(f"The disk of {folder} is full: make room first.")
        resume = again("--resume", folder)
        console.print(f"\n{'Run what is missing' if unfinished else 'Try them again'} with:\n{resume}")
        return 1 if failed else INTERRUPTED
    folders = [str(path) for path in experiment_folders([state.config for state in states.values()])] or [str(folder)]
    above = folders[0] if len(folders) == 1 else str(Path(folders[0]).parents[1])  # tensorboard takes one folder
    if len(states) == 1 and (only := next(iter(states.values()))).run:
        console.print("\n" + "\n".join(outcome(only.run.record, only.run.folder)))
    console.print(f"\nTables and figures: {command('mpq-report', *folders)}")
    console.print(f"Curves:             {shlex.join([installed('tensorboard'), '--logdir', above])}")
    return 0


if __name__ == "__main__":
    entry(main)
