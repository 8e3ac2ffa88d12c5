"""What --dry_run prints: the data and model of each run, a table of the runs, and about how long they take."""

from __future__ import annotations

from collections.abc import Mapping

from rich.console import Console
from rich.table import Table

from eval.config.run_config import COST_UNITS, RunConfig
from eval.launch.estimates import Facts
from eval.run.progress import duration, number


def print_plan(console: Console, runs: Mapping[str, RunConfig], facts: Mapping[str, Facts]) -> None:
    """The data and model of the runs, each once; a table of the runs; what is held out and left out; about the time."""
    for found in dict.fromkeys(known.found for known in facts.values() if known.found):
        console.print("\n".join(found) + "\n")
    console.print(plan_table(runs, facts))
    for outside in dict.fromkeys(known.outside_cost for known in facts.values() if known.outside_cost):
        console.print(f"outside the cost: {outside}")
    for held in dict.fromkeys(known.held_out for known in facts.values() if known.held_out):
        console.print(f"held out: {held:,} training examples, on which a search judges until it has chosen")
    seconds = sum(known.seconds or 0.0 for known in facts.values())
    console.print(f"\n{len(runs)} runs, one at a time about {duration(seconds)} on this machine")


def plan_table(runs: Mapping[str, RunConfig], facts: Mapping[str, Facts]) -> Table:
    """What --dry_run shows: one line a run, with its steps, the costs it can reach, its target and about its time."""
    table = Table(box=None, pad_edge=False)
    table.add_column("run", overflow="fold")
    for title in ("steps", "cost range", "target", "about"):
        table.add_column(title, justify="right", no_wrap=True)
    for name, run in runs.items():
        known = facts[name]
        low, high = known.cost_range
        unit = COST_UNITS[run.cost_type]
        target = "" if known.cost_target is None else f"{number(known.cost_target)} {unit}"
        reach = f"{number(low)} to {number(high)} {unit}" if run.chooses else ""
        table.add_row(name, str(known.steps), reach, target, duration(known.seconds))
    return table
