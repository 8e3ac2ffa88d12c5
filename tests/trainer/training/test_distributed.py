"""Two processes on one run (gloo, CPU) end where one process with their batches together ends."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers

from eval.config.parser import parse
from eval.eval_run import run
from trainer.training.distributed import mean_over_processes, of_first_process, own_share, share_buffers

ROOT = Path(__file__).parents[3]
STEPS = 12


@pytest.fixture(scope="module")
def records(tmp_path_factory):
    """The run's folder and record: of one process, of two."""
    folder = tmp_path_factory.mktemp("processes")
    # No batch norm: its statistics are those of a process, as everywhere with DistributedDataParallel.
    size = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    transformers.ViTConfig(**size, image_size=8, patch_size=4).save_pretrained(folder / "vit")
    flags = [
        "--task",
        "digits",
        "--model",
        str(folder / "vit"),
        "--from_scratch",
        "--search",
        "--search_space",
        "2,4,8",
    ]
    flags += [
        "--optimizer",
        "sgd",
        "--learning_rate",
        "0.05",
        "--max_steps",
        str(STEPS),
        "--max_train_samples",
        "480",
        "--seed",
        "1",
        "--device",
        "cpu",
        "--quiet",
    ]
    flags += ["--compile", "off", "--report_to", "none", "--save_strategy", "steps", "--eval_batch_size", "20"]
    alone = parse([*flags, "--train_batch_size", "32", "--output_root_dir", str(folder / "one")])
    run(alone)
    shared = [*flags, "--train_batch_size", "16", "--output_root_dir", str(folder / "two")]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    done = subprocess.run(
        [*command, "eval/eval_run.py", *shared],
        cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("record: ") == 1, "one process tells"
    return [
        (made.run_folder, json.loads((made.run_folder / "result.json").read_text())) for made in (alone, parse(shared))
    ]


def histories(records):
    return [[json.loads(line) for line in (folder / "history.jsonl").read_text().splitlines()] for folder, _ in records]


def test_every_step_is_told_once_with_the_same_draws_and_rewards(records):
    one, two = histories(records)
    assert [entry["step"] for entry in two] == list(range(1, STEPS + 1))
    for alone, shared in zip(one, two, strict=True):
        assert alone.keys() == shared.keys() and alone.get("choice") == shared.get("choice")
        for name in {"loss", "reward", "quality", "cost", "entropy"} & alone.keys():
            assert alone[name] == pytest.approx(shared[name], rel=1e-3), (name, alone["step"])


def test_the_policy_is_the_same(records):
    one, two = (
        np.array([e["probabilities"] for e in history if "probabilities" in e]) for history in histories(records)
    )
    np.testing.assert_allclose(one, two, atol=1e-5)
    assert np.abs(one[-1] - one[0]).max() > 1e-3, "it has learned something"


def test_the_record_is_the_same(records):
    (_, one), (_, two) = records
    metrics = [record.pop("metrics")["validation"] for record in (one, two)]
    contests = [record.pop("contest") for record in (one, two)]
    assert contests[0]["winner"] == contests[1]["winner"]
    assert contests[0]["held_out_harm"] == pytest.approx(contests[1]["held_out_harm"], rel=1e-3)
    assert metrics[0]["loss"] == pytest.approx(metrics[1]["loss"], rel=1e-4)
    assert metrics[0]["accuracy"] == pytest.approx(metrics[1]["accuracy"], abs=2 / 360), "two examples near a tie"
    assert {name for name in one if one[name] != two[name]} <= {"wall_seconds"}


def test_a_checkpoint_has_the_random_state_of_every_process(records):
    folder, _ = records[1]
    newest = max((folder / "checkpoints").iterdir(), key=lambda path: int(path.name.removeprefix("checkpoint-")))
    assert {path.stem for path in newest.glob("random_*")} == {"random_0", "random_1"}


def test_alone_nothing_changes():
    values = torch.rand(3)
    assert mean_over_processes(values, 7.0) is values and of_first_process(values) is values
    assert of_first_process(None) is None and own_share([3, 1, 2]) == [3, 1, 2]
    layer = torch.nn.BatchNorm1d(2)
    share_buffers(layer)
    assert torch.equal(layer.running_var, torch.ones(2))
