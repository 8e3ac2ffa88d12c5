"""A launch whose worker is killed, that is interrupted, whose driver is killed: the records of a quiet one."""

import shlex

import pytest

from tests.journeys.conftest import PATIENCE, record_of
from tests.journeys.launches import at_work, checkpoints, ended, interrupt, until, worker_behind_a_checkpoint, worker_of

STEPS = 160
LAUNCH = (
    "python eval_parallel.py --task digits --model convnet --from_scratch --search --search_space 4,8 "
    f"--policy_prior none --train_batch_size 64 --max_train_samples 300 --max_steps {STEPS} --seeds 0,1 "
    "--device cpu --num_cpus 1 --cpus_per_trial 1 --output_root_dir"
)
RUNS = ("convnet-search-6b-s0", "convnet-search-6b-s1")


@pytest.fixture(scope="module")
def quiet(tmp_path_factory):
    """The folder of a launch that nothing happens to."""
    root = tmp_path_factory.mktemp("quiet")
    with at_work(f"{LAUNCH} {root}", root / "log") as launch:
        done = ended(launch, root / "log")
    assert done.code == 0, done.out + done.err
    return root / "digits" / "default"


def timeless(record):
    return {key: value for key, value in record.items() if key != "wall_seconds"}


def test_what_happens_to_a_launch_does_not_show_in_its_records(quiet, tmp_path):
    folder = tmp_path / "digits" / "default"
    first, second = (folder / name for name in RUNS)

    log = tmp_path / "one"
    with at_work(f"{LAUNCH} {tmp_path}", log) as launch:
        killed = worker_behind_a_checkpoint(launch, first, [])
        killed.kill()
        before = checkpoints(first)
        until(launch, lambda: (found := worker_of(launch, first)) and found.pid != killed.pid)
        worker_behind_a_checkpoint(launch, first, before)
        interrupt(launch)
        done = ended(launch, log)
    assert done.code == 130, done.out + done.err
    assert f"{RUNS[0]}: its process died; it starts again from its last checkpoint" in done.err
    assert not (first / "result.json").exists(), "it was interrupted too late"
    resume = done.last_line
    assert shlex.split(resume)[-2:] == ["--resume", str(folder)]

    log = tmp_path / "two"
    before = checkpoints(first)
    with at_work(resume, log) as launch:
        worker = worker_behind_a_checkpoint(launch, first, before)
        launch.kill()
        assert ended(launch, log).code == -9
    # It may reach its last step in the moment before it notices that its launch is gone.
    worker.wait(PATIENCE)
    assert not (second / "result.json").exists()

    left = [name for name in RUNS if not (folder / name / "result.json").exists()]
    log = tmp_path / "three"
    with at_work(resume, log) as launch:
        done = ended(launch, log)
    assert done.code == 0, done.out + done.err
    assert all(f"{name}: finished" in done.err for name in left)
    for name in RUNS:
        assert timeless(record_of(folder / name)) == timeless(record_of(quiet / name))
        assert (folder / name / "history.jsonl").read_text().count("\n") == STEPS
