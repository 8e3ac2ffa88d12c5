"""Launches in processes of their own, for the tests of what may happen to them.

Ray is real, the runs are those of `tests/fake_launcher.py`: they need no model, and their accuracy shows any step that
was lost or done twice.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parents[2]
PATIENCE = 600.0
"""seconds until a test gives up on a process"""


class Launch:
    """Launches into one folder, and looks at what is in it."""

    def __init__(self, root: Path, *flags: str, seeds: str = "0,1,2", steps: int = 6) -> None:
        self.root, self.steps = root, steps
        self.folder = root / "digits" / "default"
        self.flags = ["--task", "digits", "--model", "resnet20", "--seeds", seeds, "--max_steps", str(steps)]
        self.flags += ["--output_root_dir", str(root), "--cpus_per_trial", "1", *flags]

    def start(self, *, faults: str = "", command: list[str] | None = None) -> subprocess.Popen:
        command = command or [sys.executable, str(ROOT / "tests" / "fake_launcher.py"), *self.flags]
        environment = {**os.environ, "FAKE": faults, "HF_HUB_OFFLINE": "1"}
        return subprocess.Popen(
            command, cwd=ROOT, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
        )

    def run(self, **how) -> tuple[int, str, str]:
        """(exit code, stdout, stderr) of a launch that is left alone."""
        with self.start(**how) as process:
            try:
                out, err = process.communicate(timeout=PATIENCE)
            finally:
                process.kill()  # a test that gave up leaves no Ray behind
        return process.returncode, out, err

    def folder_of(self, seed: int) -> Path:
        return self.folder / f"resnet20-float-s{seed}"

    def wait_for(self, seed: int, attempt: int, launch: subprocess.Popen) -> None:
        """Until a process of `launch` has begun its `attempt` at the run of `seed`."""
        deadline = time.monotonic() + PATIENCE
        while self.attempts(seed) < attempt:
            if launch.poll() is not None:
                raise RuntimeError(f"the launch has ended: {launch.communicate()}")
            if time.monotonic() > deadline:
                raise TimeoutError(f"no attempt {attempt} at seed {seed}")
            time.sleep(0.05)

    def attempts(self, seed: int) -> int:
        """Processes that have worked on the run."""
        return len(list(self.folder_of(seed).glob("pid-*")))

    def assert_undisturbed(self, *seeds: int) -> None:
        """Every step was done once, and the record is the one of a run that nothing happened to."""
        for seed in seeds:
            value = seed
            for step in range(1, self.steps + 1):
                value = (31 * value + step) % 1_000_003
            record = json.loads((self.folder_of(seed) / "result.json").read_text())
            assert record["metrics"]["validation"]["accuracy"] == value / 1_000_003
            history = (self.folder_of(seed) / "history.jsonl").read_text().splitlines()
            assert [json.loads(line)["step"] for line in history] == list(range(1, self.steps + 1))
