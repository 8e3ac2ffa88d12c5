"""What a launch shows: a table that follows the runs while they work, and one with their results at the end."""

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

from eval.launch.estimates import Facts
from eval.launch.grid import Progress
from eval.report.records import Excluded, Run, read_run
from eval.run.outcome import COUNTED, FILE, file_sizes
from eval.run.progress import TRAINING, describe, duration, number, read_progress
from eval.run.schema import loss_rise

PLAIN_SECONDS = 2.0
"""how often the state is looked at where there is no terminal"""
NEWS_SECONDS = 30.0
"""how often a run that stays in one phase is told of"""
TAIL_BYTES = 1 << 16
NAMED = 3
"""runs that a note names"""


class Watch:
    """Follows runs through their own files, so that it does not matter which machine they are on.

    Args:
        folders: the runs' folders by name, asked again at every look.
        facts: what is known of a run by its name, if anything.
        total: how many runs there will be.
        unit: of their costs.
    """

    def __init__(
        self,
        folders: Callable[[], Mapping[str, Path]],
        facts: Callable[[str], Facts | None],
        total: int,
        unit: str,
    ) -> None:
        self._folders, self._facts, self._total, self._unit = folders, facts, total, unit
        self._started = time.time()
        self._first: dict[str, tuple[float, int]] = {}
        """run -> (clock in seconds, step) when it was first seen at work"""
        self._told: dict[str, tuple[str, float]] = {}
        """run -> the state that `news` has last told of it, and when [clock in seconds]"""

    def render(self) -> Table:
        """One line for each run that is at work, and a line for the rest."""
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
        """A line for each run that has started, entered another phase or ended since the last call."""
        lines = []
        now = time.monotonic()
        for name, folder in self._folders().items():
            state, detail = self._state(name, folder)
            told, when = self._told.get(name, ("", now))
            over = (folder / "result.json").exists()
            if state and (state != told or (not over and now - when >= NEWS_SECONDS)):
                self._told[name] = state, now
                lines.append(f"{name}: {state}{detail}")
        return lines

    def _state(self, name: str, folder: Path) -> tuple[str, str]:
        """(what the run is doing, more about it); empty before it has started."""
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
            facts = self._facts(name)
            return str(entry.get("phase", "train")), f", step {entry['step']}/{facts.steps if facts else '?'}"
        log = folder / "run.log"
        begun = log.exists() and log.stat().st_mtime >= self._started
        return ("started", ": reading data and model") if begun else ("", "")

    def _cells(self, name: str, entry: Mapping[str, Any]) -> list[str]:
        facts = self._facts(name)
        cost = ""
        if entry.get("cost") is not None:
            target = f"/{number(facts.cost_target)}" if facts and facts.cost_target is not None else ""
            cost = f"{number(entry['cost'])}{target} {self._unit}"
        pace = self._pace(name, entry["step"])
        left = (facts.steps - entry["step"]) / pace if facts and pace else None
        return [
            f"{entry['step']}/{facts.steps if facts else '?'} {entry.get('phase', '')}",
            number(entry.get("loss")),
            number(entry.get("reward")),
            cost,
            number(entry.get("entropy")),
            duration(left),
        ]

    def _pace(self, name: str, step: int) -> float:
        """Steps in a second since the run was first seen; 0 before there is a pace."""
        clock, first = self._first.setdefault(name, (time.monotonic(), step))
        return (step - first) / max(time.monotonic() - clock, 1e-9)

    def _all_left(self, at_work: Mapping[str, Mapping[str, Any]], waiting: int) -> str:
        """'about 12 min left', if those that wait are like those at work."""
        paces = [self._pace(name, entry["step"]) for name, entry in at_work.items()]
        steps = [(facts.steps, entry["step"]) for name, entry in at_work.items() if (facts := self._facts(name))]
        if not steps or not all(paces):
            return ""
        left = sum(total - step for total, step in steps) + max(0, waiting) * sum(t for t, _ in steps) / len(steps)
        return f"about {duration(left / sum(paces))} left"


def last_entry(path: Path, since: float = 0.0) -> dict[str, Any]:
    """The last whole line of a history file; empty where nothing was written since then [seconds since the epoch]."""
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
    """Say what is waited for while the block runs; a spinner turns in a terminal."""
    if console.is_terminal and not console.quiet:
        with console.status(what):
            yield
    else:
        console.print(what)
        yield


@contextmanager
def watching(watch: Watch, console: Console) -> Iterator[None]:
    """Show `watch` while the block runs: a live table in a terminal, elsewhere a line for each change of a run's state,
    nothing if quiet."""
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
        ended = stop.wait(PLAIN_SECONDS)  # what happened last is told as well
        for line in watch.news():
            console.print(line)


def result_table(runs: Mapping[str, Progress], died: Mapping[str, str]) -> Table:
    """One line a run: its metric and cost, or why there is none (`died`: the reason of runs without a record)."""
    table = Table(box=None, pad_edge=False)
    table.add_column("run", overflow="fold")
    table.add_column("result", overflow="fold")
    for title in ("cost", "target", "file", "time"):
        table.add_column(title, justify="right", no_wrap=True)
    for name, known in runs.items():
        if known.run is None:
            table.add_row(name, died.get(name) or known.reason or "not started")
            continue
        for folder in known.config.smaller_targets.values():
            part = read_run(folder)
            table.add_row(f"{name}/{folder.name}", *([part.reason] if isinstance(part, Excluded) else _result(part)))
        table.add_row(name, *_result(known.run))
    if any(known.run for known in runs.values()):
        table.caption = f"{COUNTED}\n{FILE}"
        table.caption_justify = "left"
    return table


def note_lines(runs: Mapping[str, Progress]) -> list[str]:
    """What the records of the finished runs note, each once, with the runs that it holds for if these are not all."""
    noted: dict[str, list[str]] = {}
    for name, known in runs.items():
        for note in known.run.record.get("notes", ()) if known.run else ():
            noted.setdefault(note, []).append(name)
    lines = []
    for note, names in noted.items():
        shown = ", ".join(names[:NAMED]) + (f" and {len(names) - NAMED} more" if len(names) > NAMED else "")
        lines.append(f"note: {note}" if len(names) == len(runs) else f"note: {note} ({shown})")
    return lines


def _result(run: Run) -> list[str]:
    """Its metric, cost, target and time."""
    record = run.record
    target, contest = record["cost_target"], record.get("contest") or {}
    sizes = file_sizes(record)
    lost = "" if contest.get("within_drop", True) else f" (NOT within {contest['max_drop']:g} of float)"
    risen = f" (loss ROSE from {rise})" if (rise := loss_rise(record)) else ""
    return [
        f"{record['metric']} {run.quality:.4f}{lost}{risen}",
        f"{number(record['cost'])} {record['cost_unit']}",
        "" if target is None else f"{number(target)} {record['cost_unit']}",
        "" if sizes is None else f"{number(sizes[0])} MiB",
        duration(record["wall_seconds"]),
    ]
