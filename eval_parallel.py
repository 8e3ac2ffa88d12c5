"""The launcher: one run or a grid of runs as Ray Tune trials, resumable, on one machine or a cluster.

python eval_parallel.py --task mrpc --model bert --block_search --search_space 4,8
python eval_parallel.py --task digits --model resnet20 --methods search,uniform,float --targets 4.5,5 --seeds 0,1,2
"""

from __future__ import annotations

if __name__ == "__main__":  # before all that needs them
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

from eval.commands import again, command, installed
from eval.config.parser import INTERRUPTED, entry
from eval.config.run_config import COST_UNITS, TUNE_FOLDER, RunConfig
from eval.config.validation import refuse_link
from eval.launch.estimates import Facts, learn
from eval.launch.grid import Progress, by_name, expand, experiment_folders, launch_folder, look_up
from eval.launch.hyperparameters import best, check_tuning, early_stopping, hyperparameter_search, tried
from eval.launch.plan_table import print_plan
from eval.launch.progress import Watch, note_lines, result_table, waiting, watching
from eval.launch.ray_cluster import Share, check_request, disk_is_full, fit, join, ray_session
from eval.launch.state import locked, read_launch, set_aside, write_launch
from eval.launch.trial import TUNED, Runner
from eval.run.progress import make_console
from eval.run.record import outcome


def main(argv: Sequence[str], runner: Runner | None = None) -> int:
    """Run what `argv` asks for. Returns the exit code: 0, 1 if any run failed, 130 after Ctrl-C; raises UserError.

    `runner` stands in for `eval.eval_run.run`, and is asked for nothing before the runs start.
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
        missing = {name: known.config for name, known in state(config, runs).items() if not is_over(config, known)}
        facts = look_at(missing or by_name(runs[:1]), console) if runner is None and (missing or config.hpo) else {}
        if (kept := write_launch(folder, config, runs)) is not None:
            make_console(sys.stderr).print(f"An earlier launch here is not finished; go on with it by --resume {kept}")
        set_aside(missing.values())
        died: dict[str, str] = {}
        try:
            if missing or config.hpo:
                died = launch(config, runs, missing, facts, share, runner)
        except KeyboardInterrupt:
            pass  # the report says what is missing
        return report(config, state(config, runs), folder, died)


def state(config: RunConfig, runs: Sequence[RunConfig]) -> dict[str, Progress]:
    """How far the launch is: its runs by name, or with --hpo those that were tried so far."""
    if config.hpo:
        return {known.config.run_name: known for known in tried(runs[0])}
    return {name: look_up(run) for name, run in by_name(runs).items()}


def is_over(config: RunConfig, known: Progress) -> bool:
    """Whether a run needs nothing more: it has a result, or --asha gave it up, or its settings (--hpo) do not work."""
    return known.finished or (config.asha and known.stopped) or (config.hpo is not None and known.failed)


def launch(
    config: RunConfig,
    runs: Sequence[RunConfig],
    missing: Mapping[str, RunConfig],
    facts: Mapping[str, Facts],
    share: Share | None,
    runner: Runner | None,
) -> dict[str, str]:
    """Run the missing runs on Ray, then what --hpo still wants to try. Returns why runs died without a record, by name.

    What Ray prints goes to launch.log; raises KeyboardInterrupt after Ctrl-C or SIGTERM.
    """
    folder = launch_folder(runs)
    console = make_console(sys.stderr, config.quiet)
    steps = [known.steps for known in facts.values()] or [run.max_steps for run in runs]
    settings = early_stopping(steps) if config.asha else {}
    with ExitStack() as stack:
        log = stack.enter_context((folder / "launch.log").open("a"))
        with waiting(console, "starting Ray" if config.ray_address is None else f"joining Ray at {config.ray_address}"):
            stack.enter_context(redirect_stdout(log))
            stack.enter_context(redirect_stderr(log))
            dashboard = stack.enter_context(ray_session(config))
        # Ray sets a handler of its own; a job manager that ends us means the same as Ctrl-C.
        signal.signal(signal.SIGTERM, lambda number, frame: signal.raise_signal(signal.SIGINT))
        share = share or join(config, folder, runs)
        if dashboard:
            token = f"{installed('ray')} get-auth-token"
            console.print(f"Dashboard: http://{dashboard} while runs are at work; its token: {token}")
        with watching(watch(config, runs[0], missing, facts), console):
            died = {}
            if missing:
                died = fit(missing, share, folder / TUNE_FOLDER, console, runner, **settings)
                if any(not (r.run_folder / "result.json").exists() for name, r in missing.items() if name not in died):
                    raise KeyboardInterrupt  # Tune returns as if nothing had happened
            if config.hpo and (search := hyperparameter_search(runs[0], config.hpo)):
                died |= fit(by_name(runs), share, folder / TUNE_FOLDER, console, runner, **search, **settings)
    return died


def watch(config: RunConfig, base: RunConfig, missing: Mapping[str, RunConfig], facts: Mapping[str, Facts]) -> Watch:
    """Where the progress of this launch is to be read; `base`: its first run."""
    unit = COST_UNITS[base.cost_type]
    if not config.hpo:
        folders = {name: run.run_folder for name, run in missing.items()}
        return Watch(lambda: folders, facts.get, len(missing), unit)
    pattern = f"{glob.escape(base.run_name)}-*"
    known = next(iter(facts.values()), None)
    return Watch(
        lambda: {path.name: path for path in base.experiment_folder.glob(pattern)}, lambda name: known, config.hpo, unit
    )


def look_at(runs: Mapping[str, RunConfig], console: Console, measure: bool = False) -> dict[str, Facts]:
    """The facts of every run: what is wrong with data, models or budgets is told before anything starts."""
    many = f"{len(runs)} runs" if len(runs) > 1 else "the run"
    with waiting(console, f"checking {many}: reading data, building models" + (", timing a step" if measure else "")):
        return learn(runs, measure)


def show_plan(config: RunConfig, runs: Mapping[str, RunConfig], share: Share | None) -> int:
    """What --dry_run prints."""
    facts = look_at(runs, make_console(sys.stderr, config.quiet), measure=True)
    console = make_console(sys.stdout)
    print_plan(console, runs, facts)
    if share is not None and share.concurrent > 1:
        console.print(f"{share.concurrent} at a time, each with {share.cpus:g} CPU and {share.gpus:g} GPU")
    return 0


def report(config: RunConfig, known: Mapping[str, Progress], folder: Path, died: Mapping[str, str]) -> int:
    """Print every run's result or why there is none, and what to do next. Returns the exit code."""
    console = make_console(sys.stdout)
    console.print(result_table(known, died))
    for line in note_lines(known):
        console.print(line)
    failed = [name for name, one in known.items() if one.failed or name in died]
    tried_enough = config.hpo is None or len(known) >= config.hpo
    unfinished = not tried_enough or any(not (one.finished or one.failed or one.stopped) for one in known.values())
    if config.hpo and (winner := best(list(known.values()))):
        chosen = " ".join(f"--{name} {getattr(winner.config, name):g}" for name in TUNED)
        console.print(f"\nBest on the validation split (so report it on data that chose nothing): {chosen}")
    if failed:
        console.print(f"\n{len(failed)} of {len(known)} runs failed: {', '.join(failed)}")
    if failed or unfinished:
        if disk_is_full(folder):
            console.print(f"The disk of {folder} is full: make room first.")
        resume = again("--resume", folder)
        console.print(f"\n{'Run what is missing' if unfinished else 'Try them again'} with:\n{resume}")
        return 1 if failed else INTERRUPTED
    folders = [str(path) for path in experiment_folders([one.config for one in known.values()])] or [str(folder)]
    above = folders[0] if len(folders) == 1 else str(Path(folders[0]).parents[1])  # tensorboard takes one
    if len(known) == 1 and (only := next(iter(known.values()))).run:
        console.print("\n" + "\n".join(outcome(only.run.record, only.run.folder)))
    console.print(f"\nTables and figures: {command('mpq-report', *folders)}")
    console.print(f"Curves:             {shlex.join([installed('tensorboard'), '--logdir', above])}")
    return 0


if __name__ == "__main__":
    entry(main)
