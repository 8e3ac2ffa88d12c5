"""Processor time of a search by phase, against uniform training for the same steps; for benchmarks/RESULTS.md.

    python -m benchmarks.search_time --shared ../shared [--rows resnet20-3] [--seed 0] [--several 2.5,3,4]

Model, data, budget and steps are those of rows of benchmarks.quality. All runs happen in this process, on one thread;
processor seconds count no time in which other programs ran.
"""

from __future__ import annotations

import argparse
import shlex
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from benchmarks.quality import Row, common_flags, parse_for_rows, rows
from eval.config.parser import parse
from eval.run.plan import make_plan
from eval.run.progress import RunProgress, make_console
from eval.run.trainer import make_trainer


class PhaseTimes(RunProgress):
    """Adds up the processor seconds of each phase, as a run reports them."""

    def __init__(self) -> None:
        super().__init__(make_console(sys.stderr, quiet=True))
        self.restart()

    def restart(self) -> None:
        """Forget the phases so far."""
        self.seconds: dict[str, float] = {}
        self._timed, self._since = "preparing", time.process_time()

    def __call__(self, phase: str, done: int = 0, total: int | None = None, what: str = "") -> None:
        """Listen to the progress of a run, as `RunProgress`."""
        now = time.process_time()
        self.seconds[self._timed] = self.seconds.get(self._timed, 0.0) + now - self._since
        self._timed, self._since = f"{phase} ({what})" if phase == "training" and what else phase, now
        super().__call__(phase, done, total, what)

    @property
    def total(self) -> float:
        """Seconds of all phases."""
        return sum(self.seconds.values())


def phase_times(flags: Sequence[str]) -> PhaseTimes:
    """Prepare and train a run; return the times of its phases from the first calibration on."""
    times = PhaseTimes()
    trainer = make_trainer(make_plan(parse(list(flags)), times), progress=times)[0]
    times.restart()
    trainer.train()
    times("end")
    return times


def table(name: str, row: Row, shared: Path, output: Path, seed: int, several: str | None) -> list[str]:
    """Lines of Markdown of a row; several: target bits of a further search, for all of them at once."""
    common = [*common_flags(name, row, shared, output), "--quiet", "--seed", str(seed)]
    search = [*common, *shlex.split(row.budget), "--search"]
    runs = {
        "search": [*search, "--run_id", f"search-time-s{seed}"],
        "uniform": [*common, "--bits", row.uniform[0], "--run_id", f"uniform-time-s{seed}"],
    }
    if several is not None:
        runs[f"search for {several} bits"] = [*search, "--target_bits", several, "--run_id", f"several-time-s{seed}"]
    times = {told: phase_times(flags) for told, flags in runs.items()}
    lines = [f"\n**{name}**: `{row.budget}`\n", f"| phase | {' | '.join(f'{told} [s]' for told in times)} |"]
    lines.append("|---" * (len(times) + 1) + "|")
    for phase in dict.fromkeys(phase for own in times.values() for phase in own.seconds):
        cells = [f"{own.seconds[phase]:.1f}" if phase in own.seconds else "" for own in times.values()]
        lines.append(f"| {phase} | {' | '.join(cells)} |")
    lines.append(f"| **all** | {' | '.join(f'{own.total:.1f}' for own in times.values())} |")
    one, uniform, *more = (own.total for own in times.values())
    lines.append(f"\nA search takes {one / uniform:.2f} of the uniform run's time.")
    return lines + [
        f"The search for several budgets takes {all_of_them / one:.2f} of the time of one." for all_of_them in more
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--several", help="target bits of a third run, one search for all of them: 2.5,3,4")
    arguments = parse_for_rows(parser, "resnet20-3")
    torch.set_num_threads(1)
    for name in arguments.rows:
        row = rows()[name]
        lines = table(name, row, arguments.shared, arguments.output_root_dir, arguments.seed, arguments.several)
        print("\n".join(lines), flush=True)


if __name__ == "__main__":
    main()
