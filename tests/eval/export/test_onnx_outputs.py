"""Whether an ONNX export rounds the outputs of convolutions, and embeddings that a run left in float."""

from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("onnxruntime")

import onnx

from eval.config.parser import parse
from eval.eval_run import run
from eval.export import onnx_outputs
from eval.export.__main__ import export, main
from eval.export.finished_run import finished_run
from eval.export.formats import advice
from eval.export.onnx_outputs import rounding_allowed
from quant.errors import UserError
from quant.export.tables import float_tables, rounded_tables
from quant.formats import IntFormat


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    flags = "--task digits --model convnet --learning_rate 1e-2 --report_to none --quiet --bits 8 --max_steps 30"
    config = parse(f"{flags} --save_strategy no --output_root_dir {tmp_path_factory.mktemp('runs')}".split())
    run(config)
    return config.run_folder


def rounded_outputs(place):
    """Whether the file rounds what a convolution returns, shortcuts and bounds aside."""
    nodes = onnx.load(place / "model.onnx").graph.node
    return any(name.endswith("/8bit") for node in nodes for name in node.output)


@pytest.mark.parametrize("allowed", [True, False])
def test_the_metric_on_training_examples_decides(allowed, folder, tmp_path, monkeypatch):
    one = finished_run(folder)
    monkeypatch.setattr(onnx_outputs, "MAX_DROP", 1 if allowed else -1)
    verdict = export(one, "onnx", tmp_path / "p", evaluate=False)
    assert rounded_outputs(tmp_path / "p") == allowed
    (said,) = [note for note in verdict["notes"] if "the outputs of convolutions" in note]
    assert f"convolutions {'are' if allowed else 'are not'} rounded to 8 bits: accuracy on 1,024 training" in said
    assert said in (tmp_path / "p" / "README.md").read_text()
    before, after = (verdict["measured"][f"train_metric{kind}"] for kind in ("", "_rounded_outputs"))
    assert 0 <= before <= 1 and 0 <= after <= 1
    assert sorted(path.name for path in (tmp_path / "p").iterdir()) == ["README.md", "export.json", "model.onnx"]


@pytest.mark.parametrize("flag", ["--round_outputs", "--no_round_outputs"])
def test_a_flag_decides_without_measuring(flag, folder, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(onnx_outputs, "training_metrics", None)
    assert main([str(folder), "--format", "onnx", flag, "--output_dir", str(tmp_path / "p"), "--no_evaluate"]) == 0
    assert rounded_outputs(tmp_path / "p") == (flag == "--round_outputs")
    capsys.readouterr()
    with pytest.raises(UserError, match=f"{flag} contradicts --format packed: it is for onnx alone"):
        main([str(folder), "--format", "packed", flag])


@pytest.mark.parametrize(
    ("metric", "before", "after", "allowed"),
    [("accuracy", 0.9, 0.8981, True), ("accuracy", 0.9, 0.8979, False), ("accuracy", 0.9, 0.95, True),
     ("perplexity", 20, 20.03, True), ("perplexity", 20, 20.05, False), ("accuracy", 0.9, float("nan"), False)],
)  # fmt: skip
def test_two_tenths_of_a_point_are_allowed(metric, before, after, allowed):
    assert rounding_allowed(metric, before, after) == allowed


class Reader(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.words, self.tied, self.own = (torch.nn.Embedding(40, 24) for _ in range(3))
        self.head = torch.nn.Linear(24, 40, bias=False)
        self.head.weight = self.tied.weight

    def forward(self, ids):
        return self.head(self.words(ids) + self.tied(ids) + self.own(ids))


def test_rows_of_a_table_are_rounded_alone():
    torch.manual_seed(0)
    model, ids = Reader(), torch.arange(40)[None]
    plain, before = model.words.weight.detach().clone(), model(ids)
    assert list(float_tables(model)) == ["words", "own"]
    with rounded_tables(model, IntFormat(8)) as tables, torch.no_grad():
        assert list(tables) == ["words", "own"]
        step = plain.abs().amax(1, keepdim=True) / 127
        torch.testing.assert_close(model.words(ids)[0], (plain / step).round().clamp(-128, 127) * step)
        assert not torch.equal(model(ids), before)
    assert type(model.words) is torch.nn.Embedding and torch.equal(model(ids), before)
    with rounded_tables(model, None) as tables:
        assert not tables


def test_a_file_slower_than_float_is_told_what_would_be_faster_and_was_not_done():
    image, text = SimpleNamespace(pixels=object()), SimpleNamespace(pixels=None)
    told = [
        advice(SimpleNamespace(inputs=inputs, round_outputs=rounded, config=SimpleNamespace(engine=engine)))
        for inputs, rounded, engine in (
            (image, None, None),
            (image, True, "openvino"),
            (text, None, None),
            (image, None, "onnxruntime"),
            (text, None, "onnxruntime"),
        )
    ]
    assert ["--round_outputs" in line for line in told] == [True, False, False, True, False]
    assert ["--engine onnxruntime" in line and "int8" in line for line in told] == [True, True, True, False, False]
    assert told[-1] == ""
