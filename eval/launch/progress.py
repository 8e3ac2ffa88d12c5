"""Console output of a launch: a live table while runs are in progress, and a table of results at the end."""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.live import Live
from rich.table import Table

from eval.launch.estimates import RunEstimate
from eval.launch.grid import RunState
from eval.report.records import Excluded, Run, read_run
from eval.run.outcome import captions, file_sizes, scope_of
from eval.run.progress import TRAINING, describe, duration, number, read_progress
from eval.run.schema import loss_rise

PLAIN_SECONDS = 2.0
"""Polling interval without a terminal."""
NEWS_SECONDS = 30.0
"""Interval at which the progress of a run within one phase is printed."""
TAIL_BYTES = 1 << 16
"""Bytes read from the end of a history file."""
MAX_NAMES = 3
"""Maximum number of runs named after a note."""


class Watch:
    """Follows runs through the files in their folders, so that it works for runs on other machines as well.

    Args:
        folders: Returns the folders of the runs by name; called at every update.
        estimate: Returns the estimate of a run by its name, or None.
        total: Total number of runs.
        unit: Unit of their costs.
    """

    def __init__(
        self,
        folders: Callable[[], Mapping[str, Path]],
        estimate: Callable[[str], RunEstimate | None],
        total: int,
        unit: str,
    ) -> None:
        self._folders, self._estimate, self._total, self._unit = folders, estimate, total, unit
        self._started = time.time()
        self._first: dict[str, tuple[float, int]] = {}
        """Run -> (clock in seconds, step) when its first step was seen."""
        self._printed: dict[str, tuple[str, str, float]] = {}
        """Run -> (state, line, clock in seconds) of its last line from `news`."""

    def render(self) -> Table:
        """Make a table with one row per run in progress, and a caption about all others."""
        table = Table(box=None, pad_edge=False)
        table.add_column("run", overflow="fold")
        for title in ("step", "loss", "reward", "cost", "entropy", "left"):
            table.add_column(title, justify="right", no_wrap=True)
        folders = self._folders()
        done = [name for name, folder in folders.items() if (folder / "result.json").exists()]
        at_work = {
            name: entry
            for name, folder in folders.items()
            if name not in done and (entry := last_entry(folder / "history.jsonl", since=self._started))
        }
        rows = {name: read_progress(folder, self._started) for name, folder in folders.items() if name not in done}
        rows = {name: state for name, state in rows.items() if state or name in at_work}
        for name, state in rows.items():
            cells = self._cells(name, at_work[name]) if name in at_work else [""] * 6
            if state and state["phase"] != TRAINING:
                doing = describe(state["phase"], what=state["what"])
                cells = [doing, *cells[1:-1], duration(state["seconds_left"])]
            table.add_row(name, *cells)
        rest = self._total - len(done) - len(rows)
        words = [
            f"{len(done)} of {self._total} runs done",
            f"{rest} waiting or starting" if rest > 0 else "",
            self._all_left(at_work, rest),
        ]
        table.caption = ", ".join(word for word in words if word)
        return table

    def news(self) -> list[str]:
        """Return a line for each run that has started, entered another phase or ended since the last call.

        A run that stays in one phase for longer than NEWS_SECONDS gets a line if its progress has changed.
        """
        lines = []
        now = time.monotonic()
        for name, folder in self._folders().items():
            state, detail = self._state(name, folder)
            last_state, last_line, printed_at = self._printed.get(name, ("", "", now))
            line = f"{name}: {state}{detail}"
            if state and (state != last_state or (line != last_line and now - printed_at >= NEWS_SECONDS)):
                self._printed[name] = state, line, now
                lines.append(line)
        return lines

    def _state(self, name: str, folder: Path) -> tuple[str, str]:
        """Return the state of a run and details about it; two empty strings before it has started."""
        if (folder / "result.json").exists():
            found = read_run(folder)
            if isinstance(found, Excluded):
                return found.reason, ""
            record = found.record
            cost = f"{number(record['cost'])} {record['cost_unit']}"
            score = f"{record['metric']} {found.quality:.4f}"
            return "finished", f": {score}, {cost}, {duration(record['wall_seconds'])}"
        state = read_progress(folder, self._started)
        if state and state["phase"] != TRAINING:
            return state["phase"], describe(**state).removeprefix(state["phase"])
        if entry := last_entry(folder / "history.jsonl", since=self._started):
            estimate = self._estimate(name)
            return str(entry.get("phase", "train")), f", step {entry['step']}/{estimate.steps if estimate else '?'}"
        log = folder / "run.log"
        # Between the start of training and its first history entry there is nothing new to report.
        begun = not state and log.exists() and log.stat().st_mtime >= self._started
        return ("started", ": reading data and model") if begun else ("", "")

    def _cells(self, name: str, entry: Mapping[str, Any]) -> list[str]:
        estimate = self._estimate(name)
        cost = ""
        if entry.get("cost") is not None:
            target = f"/{number(estimate.cost_target)}" if estimate and estimate.cost_target is not None else ""
            cost = f"{number(entry['cost'])}{target} {self._unit}"
        pace = self._pace(name, entry["step"])
        left = (estimate.steps - entry["step"]) / pace if estimate and pace else None
        return [
            f"{entry['step']}/{estimate.steps if estimate else '?'} {entry.get('phase', '')}",
            number(entry.get("loss")),
            number(entry.get("reward")),
            cost,
            number(entry.get("entropy")),
            duration(left),
        ]

    def _pace(self, name: str, step: int) -> float:
        """Return the steps per second since the first call for this run; 0 at the first call."""
        clock, first = self._first.setdefault(name, (time.monotonic(), step))
        return (step - first) / max(time.monotonic() - clock, 1e-9)

    def _all_left(self, at_work: Mapping[str, Mapping[str, Any]], waiting: int) -> str:
        """Return text such as 'about 12 min left', assuming that waiting runs are like those in progress."""
        paces = [self._pace(name, entry["step"]) for name, entry in at_work.items()]
        estimates = {name: estimate for name in at_work if (estimate := self._estimate(name))}
        if not estimates or not all(paces):
            return ""
        total = sum(estimate.steps for estimate in estimates.values())
        done = sum(at_work[name]["step"] for name in estimates)
        left = total - done + max(0, waiting) * total / len(estimates)
        return f"about {duration(left / sum(paces))} left"


def last_entry(path: Path, since: float = 0.0) -> dict[str, Any]:
    """Read the last complete line of a history file.

    Args:
        path: The history.jsonl of a run.
        since: Seconds since the epoch; a file that was last modified earlier counts as empty.

    Returns:
        The entry; empty if there is none.
    """
    try:
        with path.open("rb") as file:
            status = os.fstat(file.fileno())
            if status.st_mtime < since:
                return {}
            file.seek(max(0, status.st_size - TAIL_BYTES))
            lines = file.read().splitlines(keepends=True)
    except OSError:
        return {}
    for line in reversed(lines):
        if line.endswith(b"\n"):
            try:
                return dict(json.loads(line))
            except (ValueError, TypeError):
                continue
    return {}


@contextmanager
def waiting(console: Console, what: str) -> Iterator[None]:
    """Show `what` while the block runs, with a spinner if the console is a terminal."""
    if console.is_terminal and not console.quiet:
        with console.status(what):
            yield
    else:
        console.print(what)
        yield


@contextmanager
def watching(watch: Watch, console: Console) -> Iterator[None]:
    """Show the progress of the runs while the block runs.

    Shows a live table in a terminal, prints a line for each change of a run's state elsewhere, and nothing if quiet.
    """
    if console.quiet:
        yield
    elif console.is_terminal:
        with Live(
            get_renderable=watch.render,
            console=console,
            refresh_per_second=1,
            transient=True,
            redirect_stdout=False,
            redirect_stderr=False,
        ):
            yield
    else:
        stop = threading.Event()
        thread = threading.Thread(target=_print_news, args=(watch, console, stop), daemon=True)
        thread.start()
        try:
            yield
        finally:
            stop.set()
            thread.join()


def _print_news(watch: Watch, console: Console, stop: threading.Event) -> None:
    ended = False
    while not ended:
        ended = stop.wait(PLAIN_SECONDS)  # after the end, print the last changes once more
        for line in watch.news():
            console.print(line)


def result_table(runs: Mapping[str, RunState], died: Mapping[str, str]) -> Table:
    """Make a table with one row per run: its metric and cost, or the reason why it has none.

    Args:
        runs: States of the runs by name.
        died: Name -> reason, for runs whose process ended without a record.
    """
    table = Table(box=None, pad_edge=False)
    table.add_column("run", overflow="fold")
    table.add_column("result", overflow="fold")
    for title in ("cost", "target", "file", "time"):
        table.add_column(title, justify="right", no_wrap=True)
    for name, state in runs.items():
        if state.run is None:
            table.add_row(name, died.get(name) or state.reason or "not started")
            continue
        for folder in state.config.smaller_targets.values():
            part = read_run(folder)
            table.add_row(f"{name}/{folder.name}", *([part.reason] if isinstance(part, Excluded) else _result(part)))
        table.add_row(name, *_result(state.run))
    if finished := [state.run.record for state in runs.values() if state.run]:
        table.caption = "\n".join(captions(map(scope_of, finished)))
        table.caption_justify = "left"
    return table


def note_lines(runs: Mapping[str, RunState]) -> list[str]:
    """Return each distinct note of the finished runs, with the names of its runs unless all have it."""
    noted: dict[str, list[str]] = {}
    for name, state in runs.items():
        for note in state.run.record.get("notes", ()) if state.run else ():
            noted.setdefault(note, []).append(name)
    lines = []
    for note, names in noted.items():
        shown = ", ".join(names[:MAX_NAMES]) + (f" and {len(names) - MAX_NAMES} more" if len(names) > MAX_NAMES else "")
        lines.append(f"note: {note}" if len(names) == len(runs) else f"note: {note} ({shown})")
    return lines


def _result(run: Run) -> list[str]:
    """Return the cells of a finished run: metric, cost, target, file size and time."""
    record = run.record
    target, contest = record["cost_target"], record.get("contest") or {}
    sizes = file_sizes(record)
    over_drop = "" if contest.get("within_drop", True) else f" (NOT within {contest['max_drop']:g} of float)"
    risen = f" (loss ROSE from {rise})" if (rise := loss_rise(record)) else ""
    return [
        f"{record['metric']} {run.quality:.4f}{over_drop}{risen}",
        f"{number(record['cost'])} {record['cost_unit']}",
        "" if target is None else f"{number(target)} {record['cost_unit']}",
        "" if sizes is None else f"{number(sizes[0])} MiB",
        duration(record["wall_seconds"]),
    ]
