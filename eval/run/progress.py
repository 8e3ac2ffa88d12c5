"""What a run shows while it works: its phase, how much of that is done, about how long the rest takes.

A line that moves in a terminal; elsewhere, and in run.log, lines at intervals; and `progress.json` in the run's
folder, from which the launcher shows the same. No torch here: there is something to see from the first second on.
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
"""how often the file is written anew, but at each new phase"""
LINE_SECONDS = 20.0
"""how often a long phase is told of where there is no terminal; first as soon as its time is known"""
WORTH_TELLING = 5.0
"""seconds left that are told of at once when they are known"""
TELLING = 3, 2.0
"""parts that must be done, and seconds passed, before the time left is worth telling"""
WIDE = 200
"""characters of a line that no terminal folds"""
LEFT_OUT = ("grad_norm", "epoch", "_runtime", "_per_second", "learning_rate", "total_flos")
"""what the Trainer logs and no one looks at while waiting"""


class RunProgress:
    """Hears how far a run is (`trainer.training.progress.Listener`) and shows it on `console`."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._file: Path | None = None
        self._phase, self._done, self._total, self._what = "", 0, None, ""  # type: str, int, int | None, str
        self._began = self._written = self._told = 0.0
        self._live: Live | None = None

    def __call__(self, phase: str, done: int = 0, total: int | None = None, what: str = "") -> None:
        now = time.monotonic()
        new = phase != self._phase or done < self._done
        if new:
            self._began = self._told = now
        self._phase, self._done, self._total, self._what = phase, done, total, what
        if self._live is None and (new or self._worth_a_line(now)):
            self._told = now
            if not (new and phase == TRAINING):  # its own lines follow at once
                self._console.print(self.line())
        if self._file is not None and (new or now - self._written >= WRITE_SECONDS):
            self._written = now
            self._write(self._file)

    def keep_in(self, folder: Path) -> None:
        """From now on also write `folder`/progress.json, which goes when the run is over."""
        self._file = folder / PROGRESS_FILE
        self._write(self._file)

    def log(self, logs: Mapping[str, Any]) -> None:
        """The Trainer's measures, as one line."""
        told = {
            name.removeprefix("search/"): value
            for name, value in logs.items()
            if isinstance(value, (int, float)) and not name.endswith(LEFT_OUT)
        }
        if told and "train_loss" not in told:
            measures = "  ".join(f"{name} {number(value)}" for name, value in told.items())
            self._told = time.monotonic()
            head = self.line() if self._phase == TRAINING else self._phase
            self._console.print(f"{head}:  {measures}")

    def line(self) -> str:
        """'measuring: layer 12 of 36, about 40 s left'."""
        return describe(**self._state())

    @contextmanager
    def shown(self) -> Iterator[RunProgress]:
        """Show the line while the block runs, if the console is a terminal; without `keep_in`'s file afterwards."""
        try:
            if self._console.is_terminal and not self._console.quiet:
                moving = Live(get_renderable=self._render, console=self._console, refresh_per_second=4, transient=True)
                with moving as self._live:
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
        """Seconds that the rest of the phase takes, if its parts go on as they did; None where that is not known."""
        least, seconds = TELLING
        passed = time.monotonic() - self._began
        if not self._total or self._done < least or passed < seconds:
            return None
        return passed / self._done * (self._total - self._done)

    def _worth_a_line(self, now: float) -> bool:
        first_known = self._told == self._began and (self._left() or 0) >= WORTH_TELLING
        return self._phase != TRAINING and (first_known or now - self._told >= LINE_SECONDS)

    def _write(self, path: Path) -> None:
        temporary = path.with_suffix(".tmp")
        temporary.write_text(json.dumps(self._state()))
        temporary.replace(path)

    def _state(self) -> dict[str, Any]:
        """What `describe` takes, and progress.json holds."""
        told = {"phase": self._phase, "done": self._done, "total": self._total, "what": self._what}
        return {**told, "seconds_left": self._left()}


def describe(
    phase: str, done: int = 0, total: int | None = None, what: str = "", seconds_left: float | None = None
) -> str:
    """How far a phase is, in one line."""
    if phase == TRAINING:
        of = f"step {done}/{total}" + (f" {what}" if what and what != "train" else "")
    else:
        of = f"{phase}: {what}" if what else phase
    return f"{of}, about {duration(seconds_left)} left" if seconds_left is not None and done != total else of


def read_progress(folder: Path, since: float = 0.0) -> dict[str, Any]:
    """What a run's progress.json says; empty where nothing was written since then [seconds since the epoch]."""
    path = folder / PROGRESS_FILE
    try:
        return dict(json.loads(path.read_text())) if path.stat().st_mtime >= since else {}
    except (OSError, ValueError):  # not there, or gone by now
        return {}


def number(value: float | None) -> str:
    return "" if value is None else f"{value:.4g}"


def duration(seconds: float | None) -> str:
    """'about' as people say it: 45 s, 12 min, 3.2 h."""
    if seconds is None:
        return ""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 90 * 60 else f"{seconds / 3600:.1f} h"


def make_console(file: TextIO, quiet: bool = False) -> Console:
    """A terminal's own width; elsewhere wide enough for one line a run. Names and reasons are shown as they are."""
    plain: dict[str, Any] = {"markup": False, "emoji": False, "highlight": False}
    return Console(file=file, quiet=quiet, soft_wrap=True, width=None if file.isatty() else WIDE, **plain)
