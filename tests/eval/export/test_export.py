"""Exports of finished runs: written files, reproduction of the model, and runs that cannot be exported."""

import json
import resource
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from cost.cost import assignment_to_json, memory_cost
from eval.config.parser import parse
from eval.eval_run import run
from eval.export.__main__ import export, main, metric_drop_warnings, print_verdict
from eval.export.finished_run import finished_run
from eval.latency import format_pairs, layer_calls
from eval.latency import main as latency
from eval.packed_model import load_packed
from eval.saved_model import load_model
from quant.convert import get_formats, quantize_model, set_formats
from quant.errors import UserError
from quant.formats import FLOAT, parse_format

ROOT = Path(__file__).parents[3]
SEARCH = (
    "--task digits --model convnet --train_batch_size 64 --learning_rate 1e-2 --report_to none --quiet "
    "--search --search_space int3,e2m1,int8 --target_bits 5 --max_steps 30 --save_strategy no"
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A finished search that mixes integers and a minifloat."""
    config = parse(f"{SEARCH} --output_root_dir {tmp_path_factory.mktemp('runs')}".split())
    run(config)
    return config.run_folder


def images(count=16):
    return torch.rand(count, 1, 8, 8, generator=torch.Generator().manual_seed(0))


def test_a_packed_export_reproduces_the_run(folder, tmp_path, capsys):
    place = tmp_path / "packed"
    assert main([str(folder), "--format", "packed", "--output_dir", str(place)]) == 0
    record = json.loads((folder / "result.json").read_text())
    verdict = json.loads((place / "export.json").read_text())
    with torch.no_grad():
        expected = load_model(folder)(pixel_values=images()).logits
        torch.testing.assert_close(load_packed(place)(pixel_values=images()).logits, expected, rtol=0, atol=0)
    assert verdict["metrics"]["exported"]["validation"]["accuracy"] == record["metrics"]["validation"]["accuracy"]
    assert {name: layer["chosen"] for name, layer in verdict["layers"].items()} == record["assignment"]
    assert all(layer["as_chosen"] and layer["exported"] == layer["chosen"] for layer in verdict["layers"].values())
    size = verdict["size"]
    assert size["file_bytes"] == sum(size["parts"].values()) == (place / "model.safetensors").stat().st_size
    assert size["weights_by_cost"] == round(record["costs"]["memory"] * 2**20)
    assert 0 <= size["weights_beyond_cost"] < len(verdict["layers"])  # codes end at whole bytes
    stated = round(record["costs"]["overhead"] * 2**20)
    assert size["parts"]["scales"] + size["parts"]["zero_points"] == stated
    assert verdict["cost"]["exported"] == pytest.approx(record["cost"]) and size["ratio"] < 0.30
    card = (place / "README.md").read_text()
    assert "convnet on digits" in card and "load_packed(" in card and "accuracy" in card
    told = capsys.readouterr().out
    assert "as chosen" in told and f"export: {place}" in told


def test_the_memory_cost_equals_the_size_in_the_file(folder, tmp_path):
    verdict = export(finished_run(folder), "packed", tmp_path / "p", evaluate=False)
    record = json.loads((folder / "result.json").read_text())
    bits = sum(layer["params"] * verdict["layers"][layer["name"]]["bits"][0] for layer in record["layers"])
    size = verdict["size"]
    assert size["weights_by_cost"] == round(bits / 8)
    assert size["parts"]["codes"] == size["weights_in_file"] == size["weights_by_cost"] + size["weights_beyond_cost"]
    assert verdict["metrics"]["exported"] is None


def test_an_export_over_its_target_is_an_error_and_leaves_no_files(folder, tmp_path, monkeypatch):
    one = finished_run(folder)
    monkeypatch.setitem(one.record, "cost_target", one.record["cost"] * 0.99)
    with pytest.raises(UserError, match=r"--format packed: the exported model costs .* MiB, over the target of"):
        export(one, "packed", tmp_path / "p", evaluate=False)
    assert not list(tmp_path.iterdir())


def test_a_model_that_contradicts_the_record_is_an_error(folder, tmp_path, monkeypatch):
    one = finished_run(folder)
    monkeypatch.setitem(one.record, "cost", one.record["cost"] * 1.01)
    with pytest.raises(UserError, match="its saved model costs"):
        export(one, "packed", tmp_path / "p", evaluate=False)
    assert not list(tmp_path.iterdir())


def test_an_existing_folder_is_never_overwritten(folder, tmp_path):
    with pytest.raises(UserError, match="exists already; choose another or remove it"):
        export(finished_run(folder), "packed", tmp_path, evaluate=False)


@pytest.mark.parametrize("limit", [0, 3_000, 20_000])
def test_a_full_disk_leaves_no_partial_export(limit, folder, tmp_path):
    one = finished_run(folder)
    _ = one.modules, one.plan
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))  # a file that grows beyond is refused, as by a full disk
    try:
        with pytest.raises(UserError, match=rf"--output_dir {tmp_path / 'p'}: cannot be written: "):
            export(one, "packed", tmp_path / "p", evaluate=False)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert not list(tmp_path.iterdir())
    export(one, "packed", tmp_path / "p", evaluate=False)


def unfinished(tmp_path, record=None, model=True):
    (tmp_path / "config.yaml").write_text("task: digits\n")
    if record is not None:
        (tmp_path / "result.json").write_text(record)
    if model:
        (tmp_path / "model").mkdir()
    return tmp_path


@pytest.mark.parametrize(
    ("record", "message"),
    [
        (None, "never finished: it has no result.json"),
        ('{"status": "failed", "reason": "loss is nan at step 3"}', "the run failed: loss is nan at step 3"),
        ('{"status": ', "its result.json is damaged or not a record"),
        ('{"status": "finished"}', r"holds no model/model\.safetensors"),
    ],
    ids=["unfinished", "failed", "damaged", "no model"],
)
def test_only_finished_runs_are_exported(record, message, tmp_path):
    with pytest.raises(UserError, match=message):
        main([str(unfinished(tmp_path, record)), "--format", "packed"])
    assert not (tmp_path / "export").exists()


def test_invalid_names_are_one_line_errors_with_exit_code_2(tmp_path):
    def told(*arguments):
        command = [sys.executable, "-m", "eval.export", *arguments]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
        return done.returncode, done.stderr.strip()

    code, line = told(str(tmp_path), "--format", "tflite")
    assert code == 2 and line.startswith("unknown --format 'tflite'; choices: ") and "\n" not in line
    code, line = told(str(tmp_path / "none"), "--format", "packed")
    assert code == 2 and line == f"RUN_DIR {tmp_path / 'none'}: no such folder"
    assert not list(tmp_path.iterdir())


def test_an_onnx_export_runs_in_onnx_runtime(folder, tmp_path, monkeypatch, capsys):
    pytest.importorskip("onnxruntime")
    place = tmp_path / "onnx"
    one = finished_run(folder)
    monkeypatch.setitem(one.record, "cost_target", None)  # some formats become wider, see the next test
    print_verdict(export(one, "onnx", place))
    verdict = json.loads((place / "export.json").read_text())
    record = json.loads((folder / "result.json").read_text())
    after, before = (verdict["metrics"][name]["validation"]["accuracy"] for name in ("exported", "record"))
    assert before == record["metrics"]["validation"]["accuracy"] and abs(after - before) <= 0.0056  # 2 of 360 examples
    assert verdict["size"]["file_bytes"] == (place / "model.onnx").stat().st_size
    assert verdict["measured"]["float_onnx_bytes"] > verdict["size"]["file_bytes"]
    assert verdict["measured"]["latency_ms"] > 0 and not (place / "float.onnx").exists()
    for name, layer in verdict["layers"].items():
        assert layer["as_chosen"] == (record["assignment"][name] == ["int8", "int8"])
    assert "onnxruntime.InferenceSession" in (place / "README.md").read_text()
    told = capsys.readouterr().out
    assert all(layer["as_chosen"] for layer in verdict["layers"].values()) or "values stored as" in told


def test_an_onnx_export_wider_than_the_target_is_an_error(folder, tmp_path, monkeypatch):
    pytest.importorskip("onnxruntime")
    one = finished_run(folder)
    assert {"int3", "e2m1"} & {format for pair in one.record["assignment"].values() for format in pair}
    monkeypatch.setitem(one.record, "cost_target", one.record["cost"])
    with pytest.raises(UserError, match=r"over the target of .* wider than chosen; --format packed stores"):
        export(one, "onnx", tmp_path / "p")
    assert not list(tmp_path.iterdir())


def test_latencies_are_written_in_the_format_that_the_search_reads(folder, tmp_path, capsys):
    pytest.importorskip("onnxruntime")
    table = tmp_path / "latency.csv"
    assert latency([str(folder), "--output", str(table), "--repeats", "3"]) == 0
    lines = table.read_text().splitlines()
    assert lines[0] == "layer,weight_format,activation_format,ms"
    rows = [line.split(",") for line in lines[1:]]
    layers = list(json.loads((folder / "assignment.json").read_text()))
    formats = ("float", "int3", "e2m1", "int8")
    assert [tuple(row[:3]) for row in rows] == [(layer, f, f) for layer in layers for f in formats]
    assert all(float(row[3]) > 0 for row in rows)
    assert "of float" in capsys.readouterr().out
    with pytest.raises(UserError, match="--repeats must be 1 or more, got 0"):
        latency([str(folder), "--repeats", "0"])


@pytest.mark.parametrize("method", ["search", "measured", "greedy"])
def test_the_pairs_to_measure_are_those_of_the_search_space_whatever_chose(method):
    config = parse(f"--task digits --model convnet --method {method} --search_space 4,8 --target_bits 5".split())
    run = SimpleNamespace(config=config, record={"assignment": {"conv": ["int8", "int8"]}})
    assert [(w.name, a.name) for w, a in format_pairs(run)] == [(n, n) for n in ("float", "int4", "int8")]


def test_a_layer_called_with_keyword_arguments_is_timed_on_its_inputs():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(4, 2)

        def forward(self, x):
            return self.layer(input=2 * x)

    model, x = Net(), torch.randn(1, 4)
    modules = quantize_model(model)
    run = SimpleNamespace(model=model, plan=SimpleNamespace(prepared=SimpleNamespace(example_inputs={"x": x})))
    assert [torch.equal(read, 2 * x) for read in layer_calls(run, modules)["layer"]] == [True]


def test_a_torchao_export_of_which_torchao_runs_nothing_is_an_error_unless_asked_for(folder, tmp_path):
    pytest.importorskip("torchao")
    with pytest.raises(UserError, match=r"torchao runs none of the \d+ quantized layers .*; it runs .*--allow_fake"):
        export(finished_run(folder), "torchao", tmp_path / "ao")
    assert not (tmp_path / "ao").exists()
    verdict = export(replace(finished_run(folder), allow_fake=True), "torchao", tmp_path / "ao")
    assert any("torchao runs 0 of" in note for note in verdict["notes"])
    before, after = (verdict["metrics"][name]["validation"]["accuracy"] for name in ("record", "exported"))
    assert before == after
    assert any("this is a Conv2d" in why for layer in verdict["layers"].values() for why in layer["why"])
    assert verdict["size"]["file_bytes"] == (tmp_path / "ao" / "model.safetensors").stat().st_size


def test_compressed_tensors_requires_a_transformers_model(folder, tmp_path):
    pytest.importorskip("compressed_tensors")
    with pytest.raises(UserError, match="--format compressed-tensors: needs a model of transformers"):
        export(finished_run(folder), "compressed-tensors", tmp_path / "ct")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("metric", "before", "after", "said"),
    [("accuracy", 0.91, 0.905, 0), ("accuracy", 0.91, 0.14, 1), ("perplexity", 20, 20.1, 0), ("perplexity", 20, 30, 1)],
)
def test_a_metric_drop_of_the_export_is_a_warning(metric, before, after, said):
    record = {"metric": metric, "metrics": {"validation": {metric: before, "n": 100}}}
    lines = metric_drop_warnings(record, {"validation": {metric: after, "n": 100}})
    assert len(lines) == said and all(f"{metric} {before:.5g} -> {after:.5g}" in line for line in lines)
    assert len(metric_drop_warnings(record, {"validation": {metric: float("nan"), "n": 100}})) == 1


def test_rounded_outputs_are_for_onnx_only(folder, tmp_path, monkeypatch):
    with pytest.raises(UserError, match="--round_outputs contradicts --format packed"):
        main([str(folder), "--format", "packed", "--round_outputs"])
    one = replace(finished_run(folder), round_outputs=True)
    convolutions = [name for name in one.modules if "conv" in name]
    set_formats(one.modules, {name: (FLOAT, FLOAT) for name in convolutions})
    monkeypatch.setitem(one.record, "assignment", assignment_to_json(get_formats(one.modules)))
    with pytest.raises(UserError, match="--round_outputs: no convolution of this run has weights and inputs in int"):
        export(one, "onnx", tmp_path / "p")


def test_an_export_with_rounded_outputs_is_close_to_the_run(folder, tmp_path, monkeypatch):
    pytest.importorskip("onnxruntime")
    one = replace(finished_run(folder), round_outputs=True)
    monkeypatch.setitem(one.record, "cost_target", None)
    int8 = parse_format("int8")
    set_formats(one.modules, {name: (int8, int8) for name in one.modules if "conv" in name})
    monkeypatch.setitem(one.record, "cost", memory_cost(one.plan.profiles, get_formats(one.modules)))
    monkeypatch.setitem(one.record, "assignment", assignment_to_json(get_formats(one.modules)))
    verdict = export(one, "onnx", tmp_path / "p")
    after, before = (verdict["metrics"][name]["validation"]["accuracy"] for name in ("exported", "record"))
    assert abs(after - before) < 0.1
    assert "add_session_config_entry" not in (tmp_path / "p" / "README.md").read_text()
