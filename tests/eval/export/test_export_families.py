"""Every export format for small transformers models: BERT, and GPT-2 with its Conv1D layers."""

import json
from dataclasses import replace

import pytest
import torch
import transformers

from eval.config.parser import parse
from eval.eval_run import run
from eval.export.__main__ import export
from eval.export.finished_run import finished_run
from eval.export.formats import EXPORT_FORMATS
from eval.packed_model import load_packed
from eval.saved_model import load_model

SMALL = {"vocab_size": 64, "num_labels": 2}
TEXT = {
    "bert": transformers.BertConfig(
        hidden_size=32,
        num_attention_heads=2,
        intermediate_size=64,
        num_hidden_layers=2,
        max_position_embeddings=32,
        **SMALL,
    ),
    "gpt2": transformers.GPT2Config(n_layer=2, n_embd=32, n_head=2, n_positions=32, **SMALL),
}
FLAGS = (
    "--search --search_space 4,8 --max_steps 3 --train_batch_size 8 --max_length 16 --report_to none --quiet "
    "--save_strategy no --compile off"
)


@pytest.fixture(scope="module")
def sentences(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sentences")
    for split, count in (("train", 64), ("validation", 40)):
        rows = [f"{'good' if i % 2 else 'bad'} film number {i},{i % 2}" for i in range(count)]
        (folder / f"{split}.csv").write_text("\n".join(["text,label", *rows]))
    return folder


@pytest.fixture(scope="module", params=list(TEXT))
def finished(request, sentences, tmp_path_factory):
    """(Model family, finished search of a small model of it)."""
    family, folder = request.param, tmp_path_factory.mktemp(request.param)
    TEXT[family].save_pretrained(folder / "architecture")
    what = f"--task {sentences} --model {folder / 'architecture'} --from_scratch --fuse_groups"
    config = parse(f"{what} {FLAGS} --output_root_dir {folder / 'runs'}".split())
    assert run(config)["status"] == "finished"
    return family, config.run_folder


def accuracies(verdict):
    return [verdict["metrics"][name]["validation"]["accuracy"] for name in ("record", "exported")]


def test_packed(finished, tmp_path):
    _, folder = finished
    verdict = export(finished_run(folder), "packed", tmp_path / "p")
    before, after = accuracies(verdict)
    assert before == after and all(layer["as_chosen"] for layer in verdict["layers"].values())
    inputs = {"input_ids": torch.arange(5, 17).view(2, 6), "attention_mask": torch.ones(2, 6, dtype=torch.long)}
    with torch.no_grad():
        expected = load_model(folder)(**inputs).logits
        torch.testing.assert_close(load_packed(tmp_path / "p")(**inputs).logits, expected, rtol=1e-5, atol=1e-6)


def test_onnx(finished, tmp_path):
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    verdict = export(finished_run(finished[1]), "onnx", tmp_path / "o")
    before, after = accuracies(verdict)
    assert abs(after - before) <= 0.051  # 2 of 40: nearly untrained models are full of ties
    assert all(layer["as_chosen"] for layer in verdict["layers"].values())
    assert verdict["measured"]["float_onnx_bytes"] > verdict["size"]["file_bytes"]


def test_compressed_tensors(finished, tmp_path):
    pytest.importorskip("compressed_tensors")
    family, folder = finished
    if family == "gpt2":
        with pytest.raises(ValueError, match="over the target of"):  # Conv1D is not compressed
            export(finished_run(folder), "compressed-tensors", tmp_path / "c")
        assert not list(tmp_path.iterdir())
        return
    before, after = accuracies(verdict := export(finished_run(folder), "compressed-tensors", tmp_path / "c"))
    assert before == after and all(layer["as_chosen"] for layer in verdict["layers"].values())
    config = json.loads((tmp_path / "c" / "config.json").read_text())
    assert config["quantization_config"]["quant_method"] == "compressed-tensors"


def test_depthwise_convolutions(tmp_path):
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    what = (
        "--task digits --model mobilenetv2 --from_scratch --image_size 32 --max_eval_samples 40 --max_train_samples 64"
    )
    config = parse(f"{what} --bits 8 --max_steps 0 --report_to none --quiet --output_root_dir {tmp_path / 'r'}".split())
    run(config)
    one = replace(finished_run(config.run_folder), round_outputs=False)
    images = torch.rand(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = one.model(pixel_values=images).logits
        for format in ("packed", "onnx"):
            verdict = export(one, format, tmp_path / format, evaluate=False)  # that is done below
            assert all(layer["as_chosen"] for layer in verdict["layers"].values()) and len(verdict["layers"]) == 53
            got = EXPORT_FORMATS[format].load(one, tmp_path / format)(pixel_values=images)["logits"]
            # ONNX Runtime sums in another order: values next to a tie round the other way, which shows 53 layers on.
            assert (got - expected).abs().mean() <= (0 if format == "packed" else 0.03 * expected.abs().max())
