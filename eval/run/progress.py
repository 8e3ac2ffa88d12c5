"""Progress of a run: its phase, the completed part of it, and the estimated time left.

In a terminal a live line, elsewhere (also in run.log) a line at intervals. The launcher reads the same state from
`progress.json` in the folder of the run. This module does not import torch, so that output starts immediately.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

from rich.console import Console
from rich.live import Live
from rich.text import Text

PROGRESS_FILE = "progress.json"
TRAINING = "training"
WRITE_SECONDS = 1.0
"""Minimum interval between two writes of the file within one phase."""
LINE_SECONDS = 20.0
"""Interval between two lines of one phase without a terminal."""
PART_SECONDS = {"rounding": 1.0}
"""Interval for phases whose parts, blocks of a model, get a line each if they take that long."""
LONG_SECONDS = 5.0
"""Time left from which a phase gets a line as soon as the time left can be estimated."""
MIN_DONE, MIN_SECONDS = 3, 2.0
"""Completed parts and elapsed time that an estimate of the time left needs."""
WIDTH = 200
"""Characters per line of a console that is not a terminal."""
HIDDEN = ("grad_norm", "epoch", "_runtime", "_per_second", "learning_rate", "total_flos")
"""Endings of the names of logged values that are not printed."""


class RunProgress:
    """Listener (`trainer.training.progress.Listener`) that shows the progress of a run on a console.

    Args:
        console: A terminal shows a live line; any other console gets lines at intervals.
    """

    def __init__(self, console: Console) -> None:
        self._console = console
        self._file: Path | None = None
        self._phase, self._done, self._total, self._what = "", 0, None, ""  # type: str, int, int | None, str
        self._began = self._written = self._printed = 0.0
        self._live: Live | None = None

    def __call__(self, phase: str, done: int = 0, total: int | None = None, what: str = "") -> None:
        """Update the state, and print and write it if due; see `Listener.__call__` for the arguments."""
        now = time.monotonic()
        new = phase != self._phase or done < self._done
        if new:
            self._began = self._printed = now
        self._phase, self._done, self._total, self._what = phase, done, total, what
        if self._live is None and (new or self._worth_a_line(now)):
            self._printed = now
            if not (new and phase == TRAINING):  # training logs its own lines
                self._console.print(self.line())
        if self._file is not None and (new or now - self._written >= WRITE_SECONDS):
            self._written = now
            self._write(self._file)

    def write_to(self, folder: Path) -> None:
        """Also write the state to `folder`/progress.json from now on, until `shown` exits and removes the file."""
        self._file = folder / PROGRESS_FILE
        self._write(self._file)

    def log(self, logs: Mapping[str, Any]) -> None:
        """Print values that the Trainer logs as one line."""
        values = {
            name.removeprefix("search/"): value
            for name, value in logs.items()
            if isinstance(value, (int, float)) and not name.endswith(HIDDEN)
        }
        if values and "train_loss" not in values:
            measures = "  ".join(f"{name} {number(value)}" for name, value in values.items())
            self._printed = time.monotonic()
            head = self.line() if self._phase == TRAINING else self._phase
            self._console.print(f"{head}:  {measures}")

    def line(self) -> str:
        """Return the state as text: 'measuring: layer 12 of 36, about 40 s left'."""
        return describe(**self._state())

    @contextmanager
    def shown(self) -> Iterator[RunProgress]:
        """Show the live line while the block runs, if the console is a terminal; remove progress.json on exit."""
        try:
            if self._console.is_terminal and not self._console.quiet:
                live = Live(get_renderable=self._render, console=self._console, refresh_per_second=4, transient=True)
                with live as self._live:
                    yield self
            else:
                yield self
        finally:
            self._live = None
            if self._file is not None:
                self._file.unlink(missing_ok=True)

    def _render(self) -> Text:
        return Text(self.line(), no_wrap=True, overflow="ellipsis")

    def _left(self) -> float | None:
        """Estimate the seconds left in the phase, at its speed so far; None until that can be estimated."""
        passed = time.monotonic() - self._began
        if not self._total or self._done < MIN_DONE or passed < MIN_SECONDS:
            return None
        return passed / self._done * (self._total - self._done)

    def _worth_a_line(self, now: float) -> bool:
        first_estimate = self._printed == self._began and (self._left() or 0) >= LONG_SECONDS
        interval = PART_SECONDS.get(self._phase, LINE_SECONDS)
        return self._phase != TRAINING and (first_estimate or now - self._printed >= interval)

    def _write(self, path: Path) -> None:
        temporary = path.with_suffix(".tmp")
        temporary.write_text(json.dumps(self._state()))
        temporary.replace(path)

    def _state(self) -> dict[str, Any]:
        """Return the arguments of `describe`, which are also the content of progress.json."""
        state = {"phase": self._phase, "done": self._done, "total": self._total, "what": self._what}
        return {**state, "seconds_left": self._left()}


def describe(
    phase: str, done: int = 0, total: int | None = None, what: str = "", seconds_left: float | None = None
) -> str:
    """Format the progress of a phase as one line.

    Args:
        phase: Name of the phase.
        done: Completed parts.
        total: Number of parts; None if unknown.
        what: The part that was completed last.
        seconds_left: Estimated time left; None if unknown.
    """
    if phase == TRAINING:
        text = f"step {done}/{total}" + (f" {what}" if what and what != "train" else "")
    else:
        text = f"{phase}: {what}" if what else phase
    return f"{text}, about {duration(seconds_left)} left" if seconds_left is not None and done != total else text


def read_progress(folder: Path, since: float = 0.0) -> dict[str, Any]:
    """Read the progress.json of a run.

    Args:
        folder: Folder of the run.
        since: Seconds since the epoch; a file that was last modified earlier counts as missing.

    Returns:
        Its content, the arguments of `describe`; empty if the file is missing.
    """
    path = folder / PROGRESS_FILE
    try:
        return dict(json.loads(path.read_text())) if path.stat().st_mtime >= since else {}
    except (OSError, ValueError):  # missing, or removed in the meantime
        return {}


def number(value: float | None) -> str:
    """Format a number with four significant digits; None as an empty string."""
    return "" if value is None else f"{value:.4g}"


def duration(seconds: float | None) -> str:
    """Format a duration: '45 s', '12 min', '3.2 h'; None as an empty string."""
    if seconds is None:
        return ""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 90 * 60 else f"{seconds / 3600:.1f} h"


def make_console(file: TextIO, quiet: bool = False) -> Console:
    """Make a console without markup, as wide as the terminal, or WIDTH characters wide if `file` is no terminal."""
    plain: dict[str, Any] = {"markup": False, "emoji": False, "highlight": False}
    return Console(file=file, quiet=quiet, soft_wrap=True, width=None if file.isatty() else WIDTH, **plain)
