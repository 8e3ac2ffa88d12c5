"""The launcher around a run that needs no torch model: `python tests/fake_launcher.py FLAGS`.

The fake counts to --max_steps, writes a checkpoint at every step and resumes from it, so that its record (a hash over the
steps) shows whether any was lost or done twice. What goes wrong is said by --exclude: "fail", "oom", "full", or
"wait" (slow steps, for tests that kill something).
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))


def run(config, on_step=None):
    """Stands in for `eval.eval_run.run`."""
    from eval.flags import to_yaml
    from quant.errors import UserError

    folder = config.run_folder
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.yaml").write_text(to_yaml(config))
    faults = (config.exclude or "").split(",")
    state_file = folder / "checkpoints" / "state.json"
    state_file.parent.mkdir(exist_ok=True)
    state = {"step": 0, "digest": config.seed}
    if state_file.exists():
        state = json.loads(state_file.read_text())
    (folder / f"pid-{os.getpid()}").touch()
    while state["step"] < config.max_steps:
        state = {"step": state["step"] + 1, "digest": (31 * state["digest"] + state["step"]) % 1_000_003}
        if "wait" in faults:
            time.sleep(0.1)
        if "fail" in faults and config.seed == 1 and state["step"] == 2:
            raise UserError("--data_dir: row 7 of train.csv has no label")
        if "oom" in faults and config.train_batch_size > 16:
            raise MemoryError("8 GiB")
        entry = {"step": state["step"], "phase": "train", "loss": 1 / state["step"], "reward": None, "quality": None}
        entry |= {"cost": 1.5, "entropy": None, "learning_rate": 1e-3, "time": 0.1 * state["step"]}
        with (folder / "history.jsonl").open("a") as history:
            history.write(json.dumps(entry) + "\n")
        if "full" in faults:
            (folder / f"ballast-{state['step']}").write_bytes(b"x" * (1 << 20))
        temporary = state_file.with_suffix(".tmp")
        temporary.write_text(json.dumps(state))
        temporary.replace(state_file)
        if on_step:
            on_step(entry)
    record = {
        "schema_version": 1,
        "status": "finished",
        "reason": None,
        "task": config.task_name,
        "model": config.model_name,
        "method": config.method,
        "seed": config.seed,
        "run_id": config.run_name,
        "cost_type": config.cost_type,
        "cost_target": 2.0 if config.method == "search" else None,
        "cost": 1.5,
        "cost_range": [1.0, 4.0],
        "cost_unit": "MiB",
        "costs": {"memory": 1.5, "compute": 2.0, "overhead": 0.0, "unsearched": 0.0, "total": 1.5},
        "metrics": {"validation": {"accuracy": state["digest"] / 1_000_003, "loss": 0.1, "n": 10}},
        "metric": "accuracy",
        "float_metrics": None,
        "assignment": {"fc": ["int4", "int4"]},
        "search_space": ["int4", "int8"] if config.method == "search" else None,
        "layers": [{"name": "fc", "macs": 10, "params": 10}],
        "steps": state["step"],
        "wall_seconds": 1.0,
        "versions": {},
        "commit": None,
        "device": "cpu",
        "notes": [],
    }
    temporary = folder / "result.tmp"
    temporary.write_text(json.dumps(record))
    temporary.replace(folder / "result.json")
    return record


if __name__ == "__main__":
    import eval_parallel
    from eval.flags import entry

    entry(lambda argv: eval_parallel.main(argv, run))
