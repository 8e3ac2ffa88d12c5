"""Several budgets and limits in one run, a drop instead of a budget, and the same run twice."""

import re

import pytest

from tests.journeys.conftest import record_of

RUN = (
    "python eval/eval_run.py --task digits --model convnet --train_batch_size 64 --learning_rate 1e-2 "
    "--device cpu --quiet"
)
SEARCH = "--from_scratch --search --search_space 2,4,8 --max_steps 24"


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """(root, folder of a float run)."""
    import subprocess

    from tests.journeys.conftest import ROOT, environment, words_of

    root = tmp_path_factory.mktemp("budgets")
    line = f"{RUN} --from_scratch --method float --max_steps 40 --run_id float --output_root_dir {root}"
    done = subprocess.run(words_of(line), cwd=ROOT, env=environment(), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return root, root / "digits" / "default" / "float"


def test_two_budgets_and_two_limits_are_kept_at_once(command, trained):
    root, start = trained
    given = f"{RUN} --load_model_path {start} {SEARCH}"
    limits = "--target_bits 4,6 --max_memory 0.018 --max_compute 0.008"
    done = command(f"{given} {limits} --run_id both --output_root_dir {root}")
    whole = root / "digits" / "default" / "both"
    smaller, larger = record_of(whole / "4b"), record_of(whole)
    assert done.out.count("record: ") == 2 and f"record: {whole / '4b' / 'result.json'}" in done.out
    assert smaller["cost_target"] < larger["cost_target"]
    for record in (smaller, larger):
        assert record["cost"] <= record["cost_target"]
        assert [limit["name"] for limit in record["limits"]] == ["memory", "compute"]
        assert all(limit["value"] <= limit["limit"] for limit in record["limits"])
    assert re.search(r"^memory: [\d.]+ MiB \(limit 0\.018\)$", done.out, re.MULTILINE)


def test_a_drop_is_kept_or_said_not_to_be_and_the_same_run_gives_the_same_record(command, trained):
    root, start = trained
    given = f"{RUN} --load_model_path {start} {SEARCH} --max_drop 0.05"
    records = []
    for name in ("one", "two"):
        done = command(f"{given} --run_id {name} --output_root_dir {root}")
        record = record_of(root / "digits" / "default" / name)
        contest = record["contest"]
        kept = contest["held_out_quality"] >= contest["float_quality"] - 0.05
        assert contest["within_drop"] is kept
        assert re.search(rf"held-out quality: .*: {'within' if kept else 'NOT within'} 0\.05$", done.out, re.MULTILINE)
        records.append({**record, "wall_seconds": 0, "run_id": ""})
    assert records[0] == records[1]
