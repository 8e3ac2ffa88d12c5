"""Launches of real processes, and what may happen to them: each ends with every record once, or says what is wrong.

Minutes of starting Ray, so not part of `make test`: python -m pytest benchmarks/test_faults*.py

Ray is real, the runs are those of `fake_launcher.py`: they need no model, and their accuracy shows any step that was
lost or done twice. The last test has real runs.
"""

import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PATIENCE = 240.0
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

    def wait_for(self, seed: int, attempt: int) -> None:
        """Until a process has begun its `attempt` at the run of `seed`."""
        deadline = time.monotonic() + PATIENCE
        while self.attempts(seed) < attempt:
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


def test_failures_a_dead_worker_and_memory_that_ran_out_stop_nobody(tmp_path):
    launch = Launch(tmp_path, seeds="0,1,2,3")
    checkpoint = launch.folder_of(3) / "checkpoints" / "state.json"
    checkpoint.parent.mkdir(parents=True)
    checkpoint.write_text('{"step": 2, "val')
    code, out, err = launch.run(faults="fail1,die0,oom2")
    assert code == 1, err
    launch.assert_undisturbed(0, 2)
    assert re.search(r"resnet20-float-s3 +failed: JSONDecodeError", out)
    assert launch.attempts(0) == 2 and "resnet20-float-s0: its process died" in err
    assert "failed: --data_dir: row 7 of train.csv has no label" in out
    assert "2 of 4 runs failed: resnet20-float-s1, resnet20-float-s3" in out
    assert "--train_batch_size 32" in json.loads((launch.folder_of(2) / "result.json").read_text())["notes"][0]
    assert not list(tmp_path.rglob("*.pkl")), "no pickle is left behind"
    assert list(launch.folder.glob("tune/*/*/events.out.tfevents.*"))

    # The same command again, after a record was cut off: what is missing is made up, the rest is left alone.
    checkpoint.unlink()
    record = launch.folder_of(2) / "result.json"
    record.write_text(record.read_text()[:100])
    before = launch.attempts(0)
    code, out, err = launch.run()
    assert code == 0, err
    launch.assert_undisturbed(0, 1, 2, 3)
    assert launch.attempts(0) == before


def test_interrupted_refused_killed_and_resumed(tmp_path):
    launch = Launch(tmp_path, seeds="0,1")
    first = launch.start(faults="hold")
    launch.wait_for(0, 1)
    code, _, err = launch.run()
    assert code == 2 and "another launch is at work" in err and len(err.splitlines()) == 1
    first.send_signal(signal.SIGINT)
    out, err = first.communicate(timeout=PATIENCE)
    assert first.returncode == 130, err
    resume = shlex.split(out.strip().splitlines()[-1])
    assert resume[-2:] == ["--resume", str(launch.folder)]

    second = launch.start(faults="hold", command=resume)
    launch.wait_for(0, 2)
    second.kill()
    second.communicate()
    code, out, err = launch.run(command=resume)
    assert code == 0, err
    launch.assert_undisturbed(0, 1)
    assert launch.attempts(0) == 3


def test_a_full_disk_is_named(tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "none", disk], capture_output=True, check=False)
    if mounted.returncode:
        pytest.skip("mounting a small file system is not allowed here")
    try:
        code, out, err = Launch(disk, seeds="0,1").run(faults="full0,full1")
    finally:
        subprocess.run(["umount", "-l", disk], check=True)
    assert code == 1, err
    assert "the disk is full" in out and "make room first" in out


def test_hopeless_runs_are_stopped_early_and_are_no_failures(tmp_path):
    launch = Launch(tmp_path, "--asha", seeds="0,1,2,3", steps=30)
    code, out, err = launch.run(faults="slow")
    assert code == 0, err + out
    stopped = re.findall(r"(resnet20-float-s\d) +failed: stopped early at step \d+", out)
    assert stopped and "resnet20-float-s0" not in stopped  # the loss grows with the seed
    finished = [seed for seed in range(4) if f"resnet20-float-s{seed}" not in stopped]
    launch.assert_undisturbed(*finished)


def test_settings_are_tried_by_optuna_and_taken_up_again(tmp_path):
    pytest.importorskip("optuna")
    launch = Launch(tmp_path, "--search", "--hpo", "2", seeds="0")
    code, out, err = launch.run()
    assert code == 0, err
    assert len(list(launch.folder.glob("resnet20-search-6b-s0-beta*-lr*-entropy*/result.json"))) == 2
    assert "Best on the validation split" in out and "--cost_beta" in out
    tried = sorted(path.name for path in launch.folder.glob("resnet20-search-*"))
    launch.flags[launch.flags.index("--hpo") + 1] = "3"
    code, out, err = launch.run()
    assert code == 0, err
    now = sorted(path.name for path in launch.folder.glob("resnet20-search-*"))
    assert len(now) == 3 and set(tried) < set(now)


def test_a_real_run_that_was_killed_gives_the_record_of_an_undisturbed_one(tmp_path):
    flags = ["--model", "convnet", "--from_scratch", "--search", "--search_space", "2,4,8", "--device", "cpu"]
    flags += ["--max_train_samples", "72", "--policy_prior", "none"]  # two steps an epoch, a checkpoint after each
    launch = Launch(tmp_path / "killed", *flags, "--num_cpus", "1", seeds="0,1")
    code, out, err = launch.run(faults="real,die1")
    assert code == 0, err + out
    killed = launch.folder / "convnet-search-5b-s1"
    assert (killed / "killed").exists() and f"{killed.name}: its process died" in err

    import torch

    from eval.eval_run import run
    from eval.flags import read_flags
    from eval.launch_grid import expand

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        alone = run(expand(read_flags([*launch.flags, "--output_root_dir", str(tmp_path / "alone")]))[1])
    finally:
        torch.set_num_threads(threads)
    record = json.loads((killed / "result.json").read_text())
    assert {**record, "wall_seconds": 0} == {**json.loads(json.dumps(alone)), "wall_seconds": 0}
