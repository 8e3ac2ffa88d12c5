"""Launches that a journey looks at, and disturbs, while they are at work."""

from __future__ import annotations

import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

import psutil

from tests.journeys.conftest import PATIENCE, ROOT, Ended, environment, words_of

T = TypeVar("T")


@contextmanager
def at_work(line: str, log: Path) -> Iterator[subprocess.Popen]:
    """A command while it runs, its output in `log`.out and `log`.err; it does not outlive the block."""
    with log.with_suffix(".out").open("w") as out, log.with_suffix(".err").open("w") as err:
        process = subprocess.Popen(
            words_of(line), cwd=ROOT, env=environment(), stdin=subprocess.DEVNULL, stdout=out, stderr=err
        )
        try:
            yield process
        finally:
            process.kill()
            process.wait()


def ended(process: subprocess.Popen, log: Path) -> Ended:
    """How a command ended."""
    code = process.wait(timeout=PATIENCE)
    return Ended(code, log.with_suffix(".out").read_text(), log.with_suffix(".err").read_text())


def until(process: subprocess.Popen, look: Callable[[], T | None]) -> T:
    """What `look` sees, as soon as it sees something; fails where `process` ends before."""
    deadline = time.monotonic() + PATIENCE
    while time.monotonic() < deadline:
        over = process.poll() is not None
        if found := look():
            return found
        assert not over, "the command has ended before what was waited for"
        time.sleep(0.02)
    raise TimeoutError(f"nothing to see after {PATIENCE:g} s")


def worker_of(launch: subprocess.Popen, run: Path) -> psutil.Process | None:
    """The process of a launch that works on a run: it holds the run's lock."""
    for process in psutil.Process(launch.pid).children(recursive=True):
        try:
            if any(opened.path == str(run / ".lock") for opened in process.open_files()):
                return process
        except psutil.Error:  # it has ended, or is not ours to look into
            continue
    return None


def checkpoints(run: Path) -> list[str]:
    """The names of the complete checkpoints of a run."""
    return [path.parent.name for path in run.glob("checkpoints/checkpoint-*/trainer_state.json")]


def worker_behind_a_checkpoint(launch: subprocess.Popen, run: Path, not_these: list[str]) -> psutil.Process:
    """The process of a run once that has a checkpoint besides some others."""
    until(launch, lambda: set(checkpoints(run)) - set(not_these))
    return until(launch, lambda: worker_of(launch, run))


def interrupt(launch: subprocess.Popen) -> None:
    """Ctrl-C."""
    launch.send_signal(signal.SIGINT)
