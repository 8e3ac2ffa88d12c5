"""Output of --dry_run: data and model of each run, a table of the runs and their approximate duration."""

from __future__ import annotations

from collections.abc import Mapping

from rich.console import Console
from rich.table import Table

from cost.units import UNITS
from eval.config.run_config import RunConfig
from eval.launch.estimates import RunEstimate
from eval.run.outcome import COUNTED
from eval.run.progress import duration, number


def print_plan(console: Console, runs: Mapping[str, RunConfig], estimates: Mapping[str, RunEstimate]) -> None:
    """Print the plan of a launch. What several runs have in common is printed once.

    Args:
        console: Where to print.
        runs: Runs by name.
        estimates: Their estimates by the same names.
    """
    for summary in dict.fromkeys(estimate.summary for estimate in estimates.values() if estimate.summary):
        console.print("\n".join(summary) + "\n")
    console.print(plan_table(runs, estimates))
    if any(run.cost_scope == "file" for run in runs.values()):
        console.print(COUNTED["file"])
    for outside in dict.fromkeys(estimate.outside_cost for estimate in estimates.values() if estimate.outside_cost):
        console.print(f"outside the cost: {outside}")
    for held in dict.fromkeys(estimate.held_out for estimate in estimates.values() if estimate.held_out):
        console.print(f"held out: {held:,} training examples, on which a search judges until it has chosen")
    seconds = sum(estimate.seconds or 0.0 for estimate in estimates.values())
    console.print(f"\n{len(runs)} runs, one at a time about {duration(seconds)} on this machine")


def plan_table(runs: Mapping[str, RunConfig], estimates: Mapping[str, RunEstimate]) -> Table:
    """Make a table with one row per run: steps, reachable costs, target and approximate duration."""
    table = Table(box=None, pad_edge=False)
    table.add_column("run", overflow="fold")
    for title in ("steps", "cost range", "target", "about"):
        table.add_column(title, justify="right", no_wrap=True)
    for name, run in runs.items():
        estimate = estimates[name]
        low, high = estimate.cost_range
        unit = UNITS[run.cost_type]
        target = "" if estimate.cost_target is None else f"{number(estimate.cost_target)} {unit}"
        reach = f"{number(low)} to {number(high)} {unit}" if run.chooses else ""
        table.add_row(name, str(estimate.steps), reach, target, duration(estimate.seconds))
    return table
