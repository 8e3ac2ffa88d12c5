"""The launcher: one run or a grid of runs as Ray Tune trials, resumable, on one machine or a cluster.

python eval_parallel.py --task mrpc --model bert --block_search --search_space 4,8
python eval_parallel.py --task digits --model resnet20 --methods search,uniform,float --targets 4.5,5 --seeds 0,1,2
"""

from __future__ import annotations

import os
import shlex
import shutil
import signal
import sys
from collections.abc import Mapping, Sequence
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

from rich.console import Console

from eval.flags import entry
from eval.launch_grid import expand, experiment_folders, launch_folder, look_up
from eval.launch_progress import Watch, result_table, watching
from eval.launch_ray import check_request, cluster_nodes, fit, plan_share, ray_session
from eval.launch_state import locked, read_launch, set_aside, write_launch
from eval.launch_trial import Runner
from eval.run_config import RunConfig

INTERRUPTED = 130
"""exit code after Ctrl-C, as shells know it"""
LOW_DISK = 16 << 20
"""bytes; with less free space a failure is the full disk's"""


def main(argv: Sequence[str], runner: Runner | None = None) -> int:
    """Run what `argv` asks for. Returns the exit code: 0, 1 if any run failed, 130 after Ctrl-C; raises UserError.

    `runner` stands in for `eval.eval_run.run`.
    """
    config = read_launch(argv)
    runs = expand(config)
    check_request(config)
    if config.cuda_visible_devices is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = config.cuda_visible_devices
    folder = launch_folder(runs)
    with locked(list(dict.fromkeys([folder, *experiment_folders(runs)]))):
        missing = [known for known in map(look_up, runs) if not known.finished]
        write_launch(folder, config)
        set_aside(missing)
        try:
            died = launch(config, [known.config for known in missing], folder, runner) if missing else {}
        except KeyboardInterrupt:
            died = {}
    return report(config, runs, folder, died)


def launch(config: RunConfig, runs: Sequence[RunConfig], folder: Path, runner: Runner | None) -> dict[str, str]:
    """Run the trials on Ray. Returns, for runs whose process died without a record, why."""
    console = Console(file=sys.stderr, quiet=config.quiet)
    with (folder / "launch.log").open("a") as log, redirect_stdout(log), redirect_stderr(log), ray_session(config):
        # Ray sets a handler of its own; a job manager that ends us means the same as Ctrl-C.
        signal.signal(signal.SIGTERM, lambda number, frame: signal.raise_signal(signal.SIGINT))
        share = plan_share(config, cluster_nodes(), len(runs))
        with watching(Watch(runs), console):
            return fit({run.run_name: run for run in runs}, share, folder / "tune", console, runner)


def report(config: RunConfig, runs: Sequence[RunConfig], folder: Path, died: Mapping[str, str]) -> int:
    """Print every run's result or why there is none, and what to do next. Returns the exit code."""
    console = Console(soft_wrap=True)
    known = [look_up(run) for run in runs]
    console.print(result_table(known, died))
    failed = [one for one in known if one.failed or one.config.run_name in died]
    unfinished = [one for one in known if not one.finished and one not in failed]
    free = shutil.disk_usage(folder).free
    if not (failed or unfinished):
        console.print(f"\nTables and figures: python eval/eval_parse.py {shlex.quote(str(folder))}")
        console.print(f"Curves:             tensorboard --logdir {shlex.quote(str(folder))}")
        return 0
    if free < LOW_DISK:
        console.print(f"\nThe disk of {folder} is full ({free >> 20} MiB left): make room first.")
    if failed:
        console.print(f"\n{len(failed)} of {len(runs)} runs failed: {', '.join(one.config.run_name for one in failed)}")
    resume = [sys.executable, str(Path(__file__).resolve()), "--resume", str(folder)]
    console.print(
        f"\n{'Run what is missing' if unfinished else 'Try the failed runs again'} with:\n{shlex.join(resume)}"
    )
    return 1 if failed else INTERRUPTED


if __name__ == "__main__":
    entry(main)
