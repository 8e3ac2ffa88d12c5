"""A run's folder has one owner at a time, whichever command the run was started by."""

import json

RUN = "--task digits --model convnet --from_scratch --method float --seed 0 --run_id one --device cpu"


def test_the_launcher_and_a_run_by_hand_exclude_each_other(command, tmp_path):
    from filelock import FileLock

    where = f"--output_root_dir {tmp_path}"
    folder = tmp_path / "digits" / "default" / "one"
    folder.mkdir(parents=True)
    with FileLock(folder / ".lock"):
        by_hand = command(f"python eval/eval_run.py {RUN} --max_steps 2 {where}", code=2)
        assert "another run is at work there" in by_hand.err.strip().splitlines()[-1]
        assert by_hand.err.count("another run") == 1 and "Traceback" not in by_hand.err
    assert not (folder / "result.json").exists()
    launched = command(f"python eval_parallel.py {RUN} --max_steps 2 {where} --cpus_per_trial 1")
    assert "finished" in launched.err
    assert json.loads((folder / "result.json").read_text())["status"] == "finished"
