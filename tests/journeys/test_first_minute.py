"""What a user sees of a search: each phase by name and count while it works, and at the end what was chosen and why."""

import json
import re

RUN = "--task digits --model convnet --from_scratch --search --target_bits 6 --max_steps 8 --device cpu"


def test_a_search_tells_its_phases_and_its_last_lines_say_what_was_chosen(command, tmp_path):
    ended = command(f"python eval/eval_run.py {RUN} --log_steps 4 --output_root_dir {tmp_path}")
    phases = ["reading data", "building the model", "calibrating", "measuring", "choosing", "evaluating", "saving"]
    told = [next(n for n, line in enumerate(ended.err.splitlines()) if line.startswith(phase)) for phase in phases]
    assert told == sorted(told)
    assert re.search(r"^measuring: 5 layers in 2 formats on \d+ examples$", ended.err, re.MULTILINE)
    assert re.search(r"^step 4/8 \w+.*:  loss \S+", ended.err, re.MULTILINE)
    assert "grad_norm" not in ended.out + ended.err
    (folder,) = (path.parent for path in tmp_path.rglob("result.json"))
    record = json.loads((folder / "result.json").read_text())
    lines = {line.split(":")[0]: line for line in ended.out.splitlines()}
    assert lines["chosen"].startswith(f"chosen: {record['contest']['winner']}, of {record['contest']['compared']} ")
    assert f"(target {record['cost_target']:.6g})" in lines["cost"] and "% of float's" in lines["cost"]
    assert record["exports"]["packed"] is None and "packed" in lines["runs as chosen in"]
    assert "eval.export" in lines["export"] and str(folder) in lines["export"]
    assert not (folder / "progress.json").exists()


def test_the_launcher_tells_the_same(command, tmp_path):
    ended = command(f"python eval_parallel.py {RUN} --output_root_dir {tmp_path} --cpus_per_trial 1")
    assert "checking the run: reading data" in ended.err and "starting Ray" in ended.err
    assert "reading data and model" in ended.err or "calibrating" in ended.err or "measuring" in ended.err
    (log,) = tmp_path.rglob("run.log")
    assert "measuring: 5 layers" in log.read_text() and "choosing" in log.read_text()
    assert "chosen: " in ended.out and "file: the whole model" in ended.out
