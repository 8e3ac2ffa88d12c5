"""How long the report of 2,000 runs takes: `python -m benchmarks.report`."""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
from itertools import product
from pathlib import Path

from benchmarks.synthetic_runs import write_run

RUNS = 2000
LIMIT_S = 10


def main() -> int:
    """Make the runs, report on them in a fresh process, print the seconds; 1 when they exceed LIMIT_S."""
    with tempfile.TemporaryDirectory() as folder:
        grid = product(("digits", "cifar10"), ("search", "greedy", "fisher", "random"), range(25), range(10))
        for task, method, step, seed in grid:
            target = 0.02 + 0.005 * step
            write_run(Path(folder), method, seed, (2, 4, 8), target, task=task, cost=target * (1 - 0.01 * seed))
        start = time.perf_counter()
        command = [sys.executable, "eval/eval_parse.py", folder, "--format", "csv"]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        seconds = time.perf_counter() - start
    print(f"{RUNS} runs in {len(done.stdout.splitlines()) - 1} configurations: parsed and plotted in {seconds:.1f} s")
    return int(seconds > LIMIT_S)


if __name__ == "__main__":
    sys.exit(main())
