"""Launches of real processes: killed drivers, a full disk, early stopping, Optuna, a real run that is killed."""

import json
import re
import shlex
import signal
import subprocess

import pytest

from tests.faults.launches import PATIENCE, Launch


def test_interrupted_refused_killed_and_resumed(tmp_path):
    launch = Launch(tmp_path, seeds="0,1")
    first = launch.start(faults="hold")
    launch.wait_for(0, 1, first)
    code, _, err = launch.run()
    assert code == 2 and "another launch is at work" in err and len(err.splitlines()) == 1
    first.send_signal(signal.SIGINT)
    out, err = first.communicate(timeout=PATIENCE)
    assert first.returncode == 130, err
    resume = shlex.split(out.strip().splitlines()[-1])
    assert resume[-2:] == ["--resume", str(launch.folder)]

    second = launch.start(faults="hold", command=resume)
    launch.wait_for(0, 2, second)
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

    from eval.config.parser import read_flags
    from eval.eval_run import run
    from eval.launch.grid import expand

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        alone = run(expand(read_flags([*launch.flags, "--output_root_dir", str(tmp_path / "alone")]))[1])
    finally:
        torch.set_num_threads(threads)
    record = json.loads((killed / "result.json").read_text())
    assert {**record, "wall_seconds": 0} == {**json.loads(json.dumps(alone)), "wall_seconds": 0}
