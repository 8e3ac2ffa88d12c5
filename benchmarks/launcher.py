"""What the launcher gains and costs: 8 searches on digits, one and two at a time: `python -m benchmarks.launcher`.

Aims on two free cores: two at a time take at most 0.6 of the wall time, and a run costs at most 5 s beside its own.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from argparse import ArgumentParser
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
RUNS = 8
MOST_OF_SERIAL, MOST_OVERHEAD_S = 0.6, 5.0


@dataclass(frozen=True)
class Timing:
    """Of one launch."""

    wall: float
    """[s] from the command to its end"""
    runs: float
    """[s] sum of what the runs say they took"""

    @property
    def overhead(self) -> float:
        """[s] a run, of a launch that works on one at a time."""
        return (self.wall - self.runs) / RUNS


def launch(folder: Path, at_a_time: int, steps: int) -> Timing:
    """Run the searches with so many cores, one each."""
    command = [sys.executable, "eval_parallel.py", "--task", "digits", "--model", "convnet", "--search"]
    command += ["--search_space", "2,4,8", "--max_steps", str(steps), "--policy_prior", "none", "--device", "cpu"]
    command += ["--seeds", ",".join(map(str, range(RUNS))), "--num_cpus", str(at_a_time), "--cpus_per_trial", "1"]
    command += ["--save_strategy", "no", "--report_to", "none", "--quiet", "--output_root_dir", str(folder)]
    started = time.perf_counter()
    subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    wall = time.perf_counter() - started
    records = [json.loads(path.read_text()) for path in folder.rglob("result.json")]
    assert len(records) == RUNS and all(record["status"] == "finished" for record in records)
    return Timing(wall, sum(record["wall_seconds"] for record in records))


def main() -> int:
    """Print both timings and how they stand to the aims; 1 where one is missed."""
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=900, help="of each run")
    steps = parser.parse_args().steps
    with tempfile.TemporaryDirectory() as folder:
        serial, parallel = (launch(Path(folder) / str(n), n, steps) for n in (1, 2))
    share = parallel.wall / serial.wall
    print(
        f"{RUNS} searches of {steps} steps on digits, a core each; load of the last 15 minutes {os.getloadavg()[2]:.1f}"
    )
    print(
        f"one at a time: {serial.wall:.0f} s, the runs alone {serial.runs:.0f} s: {serial.overhead:.1f} s a run beside"
    )
    print(f"two at a time: {parallel.wall:.0f} s: {share:.2f} of one at a time")
    print(f"aims: at most {MOST_OF_SERIAL} and {MOST_OVERHEAD_S:g} s, on {os.cpu_count()} cores that do nothing else")
    return int(share > MOST_OF_SERIAL or serial.overhead > MOST_OVERHEAD_S)


if __name__ == "__main__":
    sys.exit(main())
