"""The launcher around a run that needs no torch model: `FAKE=faults python tests/fake_launcher.py FLAGS`.

The fake counts to --max_steps, writes a checkpoint at every step and resumes from it; its accuracy is a hash over the
steps, so that a step lost or done twice shows. Its record is one that a real run wrote (`REAL_RECORD` names the file,
without it one is made), with the settings and figures of this run in it.

FAKE is a comma list of what goes wrong: `hold` (every run waits behind its step 2 until the output folder holds a file
`go`), `slow` steps, and for one seed `fail1`, `die1` (kill -9 of its own process, once), `oom1`, `full1` (disk). With
`real` the runs are real, and `die1` kills one behind its step 4.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

sys.path.insert(0, str(Path(__file__).parents[1]))

SMALL = "--task digits --model convnet --from_scratch --max_train_samples 64 --max_steps 4 --device cpu --quiet"
SMALL += " --search --search_space 4,8 --target_bits 6 --policy_prior none --report_to none"


def digest(config) -> float:
    """The accuracy of an undisturbed run."""
    value = config.seed
    for step in range(1, config.max_steps + 1):
        value = (31 * value + step) % 1_000_003
    return value / 1_000_003


def real_record(folder: Path) -> Path:
    """`result.json` of a small search that really ran in `folder`."""
    from eval.config.parser import complete, read_flags
    from eval.eval_run import run

    config = complete(read_flags([*SMALL.split(), "--output_root_dir", str(folder)]))
    run(config)
    return config.run_folder / "result.json"


def run(config, on_step=None, patience=0.0, *, real, faults=()):
    """Replaces `eval.eval_run.run`. real: a record that a real run wrote."""
    from eval.config.parser import to_yaml
    from quant.errors import UserError

    folder = config.run_folder
    (folder / "checkpoints").mkdir(parents=True, exist_ok=True)
    replace(folder / "config.yaml", to_yaml(config))
    checkpoint = folder / "checkpoints" / "state.json"
    state = json.loads(checkpoint.read_text()) if checkpoint.exists() else {"step": 0, "value": config.seed}
    attempts = len(list(folder.glob("pid-*")))
    (folder / f"pid-{os.getpid()}").touch()
    while state["step"] < config.max_steps:
        state = {"step": state["step"] + 1, "value": (31 * state["value"] + state["step"] + 1) % 1_000_003}
        if "slow" in faults:
            time.sleep(0.2)
        while "hold" in faults and state["step"] > 2 and not (Path(config.output_root_dir) / "go").exists():
            time.sleep(0.05)
        if f"oom{config.seed}" in faults and config.train_batch_size > 16:
            raise MemoryError("8 GiB")
        if state["step"] == 3:
            if f"fail{config.seed}" in faults:
                raise UserError("--data_dir: row 7 of train.csv has no label")
            if f"die{config.seed}" in faults and not attempts:
                os.kill(os.getpid(), signal.SIGKILL)
        if f"full{config.seed}" in faults:
            (folder / f"ballast-{state['step']}").write_bytes(b"x" * (1 << 18))
        entry = {"step": state["step"], "phase": "train", "loss": config.seed + 1.0, "reward": None, "cost": 1.5}
        entry |= {"quality": None, "entropy": None, "learning_rate": 1e-3, "time": 0.1 * state["step"]}
        with (folder / "history.jsonl").open("a") as history:
            history.write(json.dumps(entry) + "\n")
        replace(checkpoint, json.dumps(state))
        if on_step:
            on_step(entry)
    searched = config.method == "search"
    own = {
        **{"task": config.task_name, "model": config.model_name, "method": config.method, "seed": config.seed},
        **{"run_id": config.run_name, "cost_type": config.cost_type, "cost_target": 2.0 if searched else None},
        **{"cost": 1.5, "cost_range": [1.0, 4.0], "costs": {**real["costs"], "memory": 1.5}},
        "metrics": {"validation": {"accuracy": state["value"] / 1_000_003, "loss": 0.1, "n": 10}},
        **{"steps": state["step"], "wall_seconds": 1.0},
        **({} if searched else {"search_space": None, "decisions": None}),
    }
    assert own.keys() <= real.keys(), "a key that real runs do not write"
    record = real | own
    replace(folder / "result.json", json.dumps(record))
    return record


def real_run(config, on_step=None, patience=0.0, faults=()):
    """`eval.eval_run.run`, killed once if the faults say so."""
    from eval.eval_run import run

    marker = config.run_folder / "killed"

    def watched(entry):
        if f"die{config.seed}" in faults and entry["step"] >= 4 and not marker.exists():
            marker.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        on_step(entry)

    return run(config, on_step=watched)


def replace(path: Path, text: str) -> None:
    temporary = path.with_suffix(".tmp")
    temporary.write_text(text)
    temporary.replace(path)


if __name__ == "__main__":
    import eval_parallel
    from eval.config.parser import entry

    wanted = tuple(os.environ.get("FAKE", "").split(","))  # of this process: the nodes of a cluster have their own
    if "real" in wanted:
        runner = partial(real_run, faults=wanted)
    else:
        with TemporaryDirectory() as own:
            written = os.environ.get("REAL_RECORD") or real_record(Path(own))
            runner = partial(run, real=json.loads(Path(written).read_text()), faults=wanted)
    entry(lambda argv: eval_parallel.main(argv, runner))
