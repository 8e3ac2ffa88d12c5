"""A real run on a disk that fills up: one line, nothing half-written, and it goes on once there is room."""

import json
import subprocess
import sys

import pytest

from tests.faults.launches import ROOT

RUN = "--task digits --model convnet --from_scratch --method float --device cpu --quiet --report_to none --run_id one"
SHORT = "--max_train_samples 128 --train_batch_size 64 --max_steps 8"


def small_disk(folder, size):
    folder.mkdir(exist_ok=True)
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={size}", "none", folder], capture_output=True, check=False
    )
    if mounted.returncode:
        pytest.skip("mounting a small file system is not allowed here")


def eval_run(folder):
    command = [sys.executable, "eval/eval_run.py", *RUN.split(), *SHORT.split(), "--output_root_dir", str(folder)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600, check=False)


def test_a_run_by_hand_ends_in_one_line_and_goes_on_with_more_room(tmp_path):
    disk = tmp_path / "disk"
    small_disk(disk, "700k")  # room for one checkpoint of about 480 kB
    try:
        full = eval_run(disk)
        run = disk / "digits" / "default" / "one"
        assert full.returncode == 1, full.stderr
        (line,) = full.stderr.strip().splitlines()
        assert line.startswith(f"failed: the disk of {run} is full; make room, and give the same command again")
        assert not full.stdout and not (run / "result.json").exists()
        assert [path.name for path in (run / "checkpoints").iterdir()] == ["checkpoint-2"]
        assert not [path for path in run.rglob(".*") if path.name != ".lock"], "no temporary file is left"
        lines = (run / "history.jsonl").read_text().splitlines()
        steps_before = [json.loads(line)["step"] for line in lines]
        assert steps_before[:2] == [1, 2]
        elsewhere = tmp_path / "roomy"
        subprocess.run(["cp", "-r", disk, elsewhere], check=True)
    finally:
        subprocess.run(["umount", "-l", disk], check=True)
    again = eval_run(elsewhere)
    assert again.returncode == 0, again.stderr
    run = elsewhere / "digits" / "default" / "one"
    record = json.loads((run / "result.json").read_text())
    assert record["status"] == "finished" and record["steps"] == 8
    steps = [json.loads(line)["step"] for line in (run / "history.jsonl").read_text().splitlines()]
    assert steps == list(range(1, 9))
    assert not [note for note in record["notes"] if "damaged" in note]
