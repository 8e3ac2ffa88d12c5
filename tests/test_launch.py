"""A launch as a user starts it: real processes, real Ray, the real run. What disturbs it is in tests/faults."""

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_a_launch_starts_its_runs_finishes_them_and_reports(tmp_path):
    flags = (
        "--task digits --model convnet --from_scratch --methods search,float --search_space 4,8 --policy_prior none "
    )
    flags += "--target_bits 6 --max_train_samples 128 --train_batch_size 64 --max_steps 4 --device cpu "
    flags += "--num_cpus 1 --cpus_per_trial 1"
    done = subprocess.run(
        [sys.executable, "eval_parallel.py", *flags.split(), "--output_root_dir", str(tmp_path)],
        cwd=ROOT,
        env={**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    folder = tmp_path / "digits" / "default"
    for name in ("convnet-search-6b-s42", "convnet-float-s42"):
        record = json.loads((folder / name / "result.json").read_text())
        assert (record["status"], record["steps"], record["run_id"]) == ("finished", 4, name)
        assert f"{name}: finished: accuracy {record['metrics']['validation']['accuracy']:.4f}" in done.stderr
        (row,) = [line for line in done.stdout.splitlines() if line.startswith(f"{name} ")]
        assert f"accuracy {record['metrics']['validation']['accuracy']:.4f}" in row
        assert (folder / name / "model" / "model.safetensors").is_file()
        assert "Traceback" not in (folder / name / "run.log").read_text()
    assert "eval_parse.py" in done.stdout and "--resume" not in done.stdout
    assert not list(tmp_path.rglob("*.pkl")), "no pickle is left behind"
