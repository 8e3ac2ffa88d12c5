"""Exports for engines: runs under --engine fit their budget in the file, others are refused in one line."""

import json
import shutil
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from cost.profile import LayerProfile
from eval.config.parser import parse
from eval.eval_run import run
from eval.export.__main__ import main
from eval.export.engine_reach import engine_reach
from eval.export.onnx_outputs import over_compute_budget
from eval.run.outcome import export_lines
from quant.convert import calibrate, quantize_model, set_formats
from quant.engines.table import ENGINES
from quant.errors import UserError
from quant.export import LayerVerdict
from quant.formats import FLOAT, parse_format
from quant.quantizers.quantizer import QuantizerConfig

IMAGES = "--task digits --model convnet --train_batch_size 64 --learning_rate 1e-2"
COMMON = "--report_to none --quiet --save_strategy no --max_train_samples 96 --max_eval_samples 32"


def finished(flags, root):
    config = parse(f"{flags} {COMMON} --output_root_dir {root}".split())
    run(config)
    return config.run_folder


@pytest.fixture(scope="module")
def unlimited(tmp_path_factory):
    """A run in formats that no engine stores, nor wider ones."""
    return finished(f"{IMAGES} --bits mxfp4 --max_steps 1", tmp_path_factory.mktemp("unlimited"))


@pytest.fixture(scope="module")
def limited(tmp_path_factory):
    """A search over many formats for ONNX Runtime."""
    flags = f"{IMAGES} --search --engine onnxruntime --search_space 2,3,4,5,6,8 --target_bits 5 --max_steps 4"
    return finished(flags, tmp_path_factory.mktemp("limited"))


def test_auto_writes_a_file_for_each_engine_that_runs_the_result(limited, tmp_path, capsys):
    record = json.loads((limited / "result.json").read_text())
    assert record["engine"] == "onnxruntime" and record["search_space"] == ["int4", "int8"]
    assert any("int3/int3 as int4/int4" in note for note in record["notes"])
    assert "--engine onnxruntime" in export_lines(record, limited)
    root = tmp_path / "files"
    assert main([str(limited), "--format", "auto", "--output_dir", str(root)]) == 0
    table = capsys.readouterr().out
    assert [path.name for path in root.iterdir()] == ["onnx"]
    verdict = json.loads((root / "onnx" / "export.json").read_text())
    assert all(layer["as_chosen"] for layer in verdict["layers"].values())
    assert verdict["cost"]["exported"] == record["cost"] <= record["cost_target"]
    rows = {line.split()[0]: line for line in table.splitlines() if line.split()[:1] and line.split()[0] in ENGINES}
    assert set(rows) == set(ENGINES)
    assert str(root / "onnx") in rows["onnxruntime"] and str(root / "onnx") in rows["openvino"]
    assert "no: 5 of 5 layers: inputs have a zero point" in rows["tensorrt"]
    with pytest.raises(UserError, match=r"--format auto: .*onnx exists already"):
        main([str(limited), "--format", "auto", "--output_dir", str(root)])


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        (["--format", "auto"], ["--format auto", "no engine runs", "mxfp4/mxfp4 for conv", "choose --format packed"]),
        (["--engine", "tensorrt"], ["--engine tensorrt", "5 of 5 layers: 4 since", "convs.0", "--format packed"]),
        (["--engine", "vllm"], ["--engine vllm", "needs a model of transformers"]),
        (["--engine", "nope"], ["--engine", "'nope'", "llama.cpp"]),
        (["--engine", "vllm", "--format", "onnx"], ["--format onnx", "--engine vllm", "compressed-tensors"]),
        ([], ["--format is missing", "auto", "--engine NAME"]),
    ],
)
def test_a_run_that_no_engine_runs_is_one_line_and_leaves_nothing(flags, named, unlimited, tmp_path):
    with pytest.raises(UserError) as error:
        main([str(unlimited), *flags, "--output_dir", str(tmp_path / "files" / "x")])
    assert "\n" not in str(error.value) and all(word in str(error.value) for word in named), error.value
    assert not (tmp_path / "files").exists()


def test_the_end_of_a_run_names_what_stands_in_the_way(unlimited):
    record = json.loads((unlimited / "result.json").read_text())
    first, *others, _ = export_lines(record, unlimited).splitlines()
    assert first == "runs as chosen in: no engine; files that hold it: packed"
    assert others[0].startswith("in the way of onnxruntime, openvino, tensorrt") and "convs.0" in others[0]
    assert "in the way of vllm, transformers, llama.cpp: it needs a model of transformers" in others
    assert record["exports"]["packed"] is None and len(others) <= 4
    assert len(record["engines"]["onnxruntime"]["layers_in_the_way"]) == 5


def layers_in(pairs, symmetric=False):
    """A Linear layer in each pair of formats, calibrated."""
    model = nn.Sequential(*(nn.Linear(64, 64) for _ in pairs))
    formats = {parse_format(name) for pair in pairs for name in pair.split("/")} - {FLOAT}
    modules = quantize_model(model, formats=formats, activation=QuantizerConfig(symmetric=symmetric))
    calibrate(model, modules, [torch.randn(2, 64)])
    set_formats(modules, {str(n): tuple(map(parse_format, pair.split("/"))) for n, pair in enumerate(pairs)})
    return model, modules


def test_an_engine_that_reads_anothers_file_is_refused_what_only_that_one_runs():
    model, modules = layers_in(["int8/int8", "int4/int4", "int3/int3"])
    found = engine_reach(model, modules)
    assert list(found["onnxruntime"].in_the_way) == ["2"] and found["onnxruntime"].runs_some
    assert found["onnxruntime"].in_the_way["2"] == "int3/int3 is stored as int4/int4"
    assert found["tensorrt"].refusal == "3 of 3 layers: inputs have a zero point (0, 1, ...)"
    model, modules = layers_in(["int8/int8", "int4/int4"], symmetric=True)
    assert list(engine_reach(model, modules)["tensorrt"].refused) == ["1"]  # the file has int4, it needs int8
    model, modules = layers_in(["int8/int4"])  # crashes it
    assert not engine_reach(model, modules)["openvino"].runs_some


def test_layers_that_an_engine_fuses_have_to_share_formats():
    model, modules = layers_in(["int8/int8", "int4/float"])
    apart, together = (engine_reach(model, modules, fused)["vllm"] for fused in ([], [["0", "1"]]))
    assert not apart.refused and list(together.refused) == ["0", "1"] and "--fuse_groups" in together.in_the_way["0"]


@pytest.mark.parametrize(("cost_type", "target", "over"), [("compute", 0.02, True), ("compute", 0.05, False)])
def test_a_file_that_holds_inputs_in_more_bits_than_the_budget_pays_for_is_seen(cost_type, target, over):
    """1,000 weights at 1,000,000 multiply-accumulates: int4 x int4 costs 0.016 GBOPs, int4 x int8 0.032."""
    profiles = [LayerProfile("a", 1_000_000, 1_000, 1, 1, "conv2d", 1)]
    made = SimpleNamespace(
        record={"cost_type": cost_type, "cost_target": target}, plan=SimpleNamespace(profiles=profiles)
    )
    four = parse_format("int4")
    held = {"a": LayerVerdict(four, four, "int4", "int8", 4, 8, ("wider",))}
    assert over_compute_budget(made, held) == over
    made.record["cost_type"] = "memory"
    assert not over_compute_budget(made, held)


def write_json(path, change):
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def swap(record):
    name, pair = next(iter(record["assignment"].items()))
    record["assignment"][name] = ["int8", "int8"] if pair == ["int4", "int4"] else ["int4", "int4"]


DAMAGES = {
    "no quantization.json": lambda run: (run / "model/quantization.json").unlink(),
    "damaged": lambda run: (run / "model/quantization.json").write_text("{"),
    "model.safetensors": lambda run: (run / "model/model.safetensors").write_bytes(b"x" * 100),
    "not readable as YAML": lambda run: (run / "config.yaml").write_text(": ["),
    "its result.json is damaged or not a record": lambda run: (run / "result.json").write_text("[1"),
    "its result.json lacks layers": lambda run: write_json(run / "result.json", lambda r: r.pop("layers")),
    "cost_target is 'x'": lambda run: write_json(run / "result.json", lambda r: r.update(cost_target="x")),
    "engine is 'nope'": lambda run: write_json(run / "result.json", lambda r: r.update(engine="nope")),
    "its saved model in": lambda run: write_json(run / "result.json", swap),
}


@pytest.mark.parametrize("told", DAMAGES)
def test_a_damaged_run_is_one_line_and_leaves_nothing(told, limited, tmp_path):
    copy = tmp_path / "run"
    shutil.copytree(limited, copy, ignore=shutil.ignore_patterns("checkpoints", "tensorboard"))
    DAMAGES[told](copy)
    before = sorted(path.name for path in copy.iterdir())
    with pytest.raises(UserError) as error:
        main([str(copy), "--format", "auto", "--no_evaluate"])
    assert told in str(error.value) and "\n" not in str(error.value), error.value
    assert sorted(path.name for path in copy.iterdir()) == before
