"""Digits from a launch to the file that is deployed: search, report, exports, latencies, a search within a latency."""

import csv
import json

import numpy as np
import pytest

from tests.journeys.conftest import record_of

GRID = "--task digits --model convnet --from_scratch --device cpu --cost_type compute --cpus_per_trial 1"
FEW = "--max_steps 12 --max_train_samples 300 --train_batch_size 32 --learning_rate 1e-2"
TARGET = "--search_space 4,8 --target_bits 6"
"""formats that ONNX stores"""


@pytest.fixture(scope="module")
def launched(tmp_path_factory, command):
    """The output of a launch, two methods by two seeds, and the folder that holds its runs."""
    root = tmp_path_factory.mktemp("launch")
    line = f"python eval_parallel.py {GRID} {FEW} {TARGET} --methods search,measured --seeds 0,1"
    return command(f"{line} --output_root_dir {root}"), root / "digits" / "default"


@pytest.fixture(scope="module")
def exports(launched, command):
    """Format -> the folder of the searched run's export."""
    run = searched(launched[1])
    for form in ("packed", "onnx"):
        command(f"python -m eval.export {run} --format {form}")
    return {form: run / "export" / form for form in ("packed", "onnx")}


def searched(folder):
    return next(path for path in sorted(folder.glob("*s0")) if record_of(path)["method"] == "search")


def test_the_report_holds_every_run_of_the_launch(launched, command):
    ended, folder = launched
    records = [json.loads(path.read_text()) for path in folder.glob("*/result.json")]
    assert sorted((record["method"], record["seed"], record["status"]) for record in records) == [
        (method, seed, "finished") for method in ("measured", "search") for seed in (0, 1)
    ]
    assert all(record["cost"] <= record["cost_target"] for record in records)
    (told,) = [line for line in ended.out.splitlines() if line.startswith("Tables and figures: ")]
    shown = command(f"{told.partition(': ')[2]} --html {folder}/page.html")
    assert "search" in shown.out and "measured" in shown.out and "left out" not in shown.err
    with (folder / "report" / "summary.csv").open() as file:
        rows = {row["method"]: row for row in csv.DictReader(file)}
    for method, row in rows.items():
        own = [record["metrics"]["validation"]["accuracy"] for record in records if record["method"] == method]
        assert int(row["n"]) == 2 and float(row["quality_mean"]) == pytest.approx(np.mean(own))
    assert (folder / "report" / "pareto.png").stat().st_size > 1000
    assert (folder / "page.html").read_text().count("<svg") >= 4


def test_exports_predict_what_the_run_predicted(launched, exports):
    import onnxruntime
    import torch

    from eval.export.finished_run import finished_run
    from eval.packed_model import load_packed

    folder = searched(launched[1])
    answers = json.loads((folder / "predictions.json").read_text())["validation"]
    rows = finished_run(folder).plan.prepared.validation["validation"]
    images = torch.stack([row["pixel_values"] for row in rows])
    with torch.no_grad():
        packed = load_packed(exports["packed"])(pixel_values=images).logits
    assert packed.argmax(1).tolist() == answers["predicted"]
    session = onnxruntime.InferenceSession(exports["onnx"] / "model.onnx")
    name = session.get_inputs()[0].name
    onnx = np.concatenate([session.run(None, {name: images[i : i + 1].numpy()})[0] for i in range(len(images))])
    # Sums of float32 in another order: an image whose two best classes are as good as equal may turn over.
    assert (onnx.argmax(1) != np.array(answers["predicted"])).sum() <= 1
    np.testing.assert_allclose(onnx, packed.numpy(), atol=0.05 * packed.abs().max())
    verdicts = {form: json.loads((place / "export.json").read_text()) for form, place in exports.items()}
    assert verdicts["packed"]["metrics"]["exported"]["validation"] == record_of(folder)["metrics"]["validation"]


def test_a_search_keeps_to_the_latencies_that_were_measured(launched, command, tmp_path):
    folder = searched(launched[1])
    table = tmp_path / "latency.csv"
    command(f"python -m eval.latency {folder} --output {table} --repeats 5")
    with table.open() as file:
        rows = list(csv.DictReader(file))
    rows = [row for row in rows if row["weight_format"] == row["activation_format"] != "float"]  # the search's pairs
    layers = {row["layer"] for row in rows}
    assert layers == set(record_of(folder)["assignment"])
    slow, fast = (
        sum(pick(float(r["ms"]) for r in rows if r["layer"] == name) for name in layers) for pick in (max, min)
    )
    limit = (slow + fast) / 2
    line = f"python eval/eval_run.py {GRID.replace('--cpus_per_trial 1', '')} {FEW} --search --search_space 4,8"
    command(f"{line} --max_latency {table} --latency_target {limit} --run_id timed --output_root_dir {tmp_path}")
    record = record_of(tmp_path / "digits" / "default" / "timed")
    times = {(row["layer"], row["weight_format"], row["activation_format"]): float(row["ms"]) for row in rows}
    assert sum(times[layer, *pair] for layer, pair in record["assignment"].items()) <= limit * (1 + 1e-9)
