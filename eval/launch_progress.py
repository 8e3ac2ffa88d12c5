"""What a launch shows: a table that follows the runs while they work, and one with their results at the end."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.live import Live
from rich.table import Table

from eval.launch_grid import Progress
from eval.run_config import COST_UNITS, RunConfig

PLAIN_SECONDS = 30.0
"""how often the state is printed where there is no terminal"""
TAIL_BYTES = 1 << 16


class Watch:
    """Reads how far each run is from its own files, so that it works for runs on any machine."""

    def __init__(self, runs: Sequence[RunConfig]) -> None:
        self._runs = runs
        self._first: dict[str, tuple[float, int]] = {}
        """run -> (clock in seconds, step) when it was first seen at work, for the time left"""

    def rows(self) -> list[tuple[str, dict[str, Any]]]:
        """(run name, last line of its history; empty before its first) for every run that has no record yet."""
        return [
            (run.run_name, last_entry(run.run_folder / "history.jsonl"))
            for run in self._runs
            if not (run.run_folder / "result.json").exists()
        ]

    def seconds_left(self, name: str, entry: Mapping[str, Any], steps: int | None) -> float | None:
        """Time left of one run at the pace since it was first seen; None before there is a pace."""
        step = entry.get("step")
        if step is None or steps is None:
            return None
        clock, first = self._first.setdefault(name, (time.monotonic(), step))
        pace = (step - first) / max(time.monotonic() - clock, 1e-9)
        return (steps - step) / pace if pace > 0 else None

    def render(self) -> Table:
        """One line a run that is at work, and a line for the rest."""
        table = Table(box=None, pad_edge=False)
        table.add_column("run", overflow="fold")
        for title in ("step", "loss", "reward", "cost", "entropy", "left"):
            table.add_column(title, justify="right", no_wrap=True)
        rows = self.rows()
        configs = {run.run_name: run for run in self._runs}
        for name, entry in rows:
            if not entry:
                continue
            steps = total_steps(configs[name], entry)
            left = self.seconds_left(name, entry, steps)
            table.add_row(
                name,
                f"{entry.get('step', 0)}/{steps or '?'} {entry.get('phase', '')}",
                number(entry.get("loss")),
                number(entry.get("reward")),
                cost_against_target(configs[name], entry),
                number(entry.get("entropy")),
                duration(left),
            )
        waiting = sum(not entry for _, entry in rows)
        table.caption = f"{len(self._runs) - len(rows)} of {len(self._runs)} runs done" + (
            f", {waiting} waiting or starting" if waiting else ""
        )
        return table


def last_entry(path: Path) -> dict[str, Any]:
    """The last whole line of a history file; empty where there is none yet."""
    try:
        with path.open("rb") as file:
            file.seek(max(0, path.stat().st_size - TAIL_BYTES))
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


def total_steps(config: RunConfig, entry: Mapping[str, Any]) -> int | None:
    """How many steps the run will take, where that is known."""
    return entry.get("steps") or (config.max_steps if config.max_steps > 0 else None)


def cost_against_target(config: RunConfig, entry: Mapping[str, Any]) -> str:
    """'3.2/3.5 MiB', as far as it is known."""
    if entry.get("cost") is None:
        return ""
    target = entry.get("cost_target", config.cost_target)
    return f"{number(entry['cost'])}{f'/{number(target)}' if target else ''} {COST_UNITS[config.cost_type]}"


def number(value: float | None) -> str:
    return "" if value is None else f"{value:.4g}"


def duration(seconds: float | None) -> str:
    """'about' as people say it: 45 s, 12 min, 3.2 h."""
    if seconds is None:
        return ""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 90 * 60 else f"{seconds / 3600:.1f} h"


@contextmanager
def watching(watch: Watch, console: Console) -> Iterator[None]:
    """Show `watch` while the block runs: a live table in a terminal, lines now and then elsewhere, nothing if quiet."""
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
        thread = threading.Thread(target=_print_now_and_then, args=(watch, console, stop), daemon=True)
        thread.start()
        try:
            yield
        finally:
            stop.set()
            thread.join()


def _print_now_and_then(watch: Watch, console: Console, stop: threading.Event) -> None:
    while not stop.wait(PLAIN_SECONDS):
        console.print(watch.render())


def result_table(runs: Sequence[Progress], died: Mapping[str, str]) -> Table:
    """One line a run: its metric and cost, or why there is none (`died`: the reason of runs without a record)."""
    table = Table(box=None, pad_edge=False)
    table.add_column("run", overflow="fold")
    table.add_column("result", overflow="fold")
    for title in ("cost", "target", "time"):
        table.add_column(title, justify="right", no_wrap=True)
    for known in runs:
        name = known.config.run_name
        if known.run is None:
            table.add_row(name, died.get(name) or known.reason or "not started")
            continue
        record = known.run.record
        target = record["cost_target"]
        table.add_row(
            name,
            f"{record['metric']} {known.run.quality:.4f}",
            f"{number(record['cost'])} {record['cost_unit']}",
            "" if target is None else f"{number(target)} {record['cost_unit']}",
            duration(record["wall_seconds"]),
        )
    return table
