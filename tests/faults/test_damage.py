"""A launch that goes on with a run whose newest checkpoint is damaged: told in the terminal, run.log and the record."""

import json
import os
import signal
import subprocess
import sys
import time

from tests.faults.launches import PATIENCE, ROOT
from trainer.training.checksums import flaw, numbered

RUN = "--task digits --model convnet --from_scratch --method float --device cpu --report_to none --run_id one "
RUN += "--train_batch_size 64 --max_train_samples 128 --max_steps 60"


def test_a_launch_goes_on_from_the_older_checkpoint_and_says_so(tmp_path):
    flags = [*RUN.split(), "--output_root_dir", str(tmp_path)]
    run = tmp_path / "digits" / "default" / "one"
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(
        [sys.executable, "eval/eval_run.py", *flags, "--quiet"], cwd=ROOT, env=environment
    ) as started:
        deadline = time.monotonic() + PATIENCE
        while len(numbered(run / "checkpoints")) < 3 and time.monotonic() < deadline:  # two, and one in the making
            time.sleep(0.01)
        started.send_signal(signal.SIGKILL)
    assert not (run / "result.json").exists()
    whole = [path for path in numbered(run / "checkpoints") if flaw(path) is None]
    weights = whole[0] / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])

    command = [sys.executable, "eval_parallel.py", *flags, "--num_cpus", "1", "--cpus_per_trial", "1"]
    done = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=PATIENCE, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    said = f"{whole[0].name} was damaged (model.safetensors is not what was written)"
    said += f": the run went on from {whole[1].name}"
    record = json.loads((run / "result.json").read_text())
    assert said in record["notes"] and record["steps"] == 60
    assert said in (run / "run.log").read_text()
    assert said in done.stdout
