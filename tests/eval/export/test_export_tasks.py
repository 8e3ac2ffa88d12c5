"""Loading and export of models for multiple choice, regression and language modelling."""

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
from quant.errors import UserError

SIZES = {"vocab_size": 64, "hidden_size": 32, "num_attention_heads": 2, "intermediate_size": 48}
BERT = transformers.BertConfig(num_hidden_layers=1, max_position_embeddings=32, **SIZES)
LLAMA = transformers.LlamaConfig(
    num_hidden_layers=2, num_key_value_heads=1, max_position_embeddings=32, tie_word_embeddings=False, **SIZES
)
WORDS = ["see", "the", "cat", "two", "hills", "rivers", "go"]
ROWS = {
    "piqa": [{"goal": f"see {n} hills", "sol1": "the cat", "sol2": "two rivers go", "label": n % 2} for n in range(24)],
    "stsb": [{"sentence1": f"cat {n}", "sentence2": "two hills", "label": n / 8} for n in range(24)],
    "lm": [{"text": " ".join(WORDS[n % 7 :] + WORDS[: n % 5])} for n in range(60)],
}
FLAGS = "--from_scratch --train_batch_size 8 --max_length 16 --report_to none --quiet --save_strategy no --compile off"


def finished(task, settings, flags, folder):
    """The folder of a finished run on a few rows."""
    settings.save_pretrained(folder / "architecture")
    data = folder / "data"
    data.mkdir()
    for split in ("train", "validation"):
        (data / f"{split}.jsonl").write_text("\n".join(map(json.dumps, ROWS[task])))
    where = f"--task {task} --data_dir {data} --model {folder / 'architecture'} --output_root_dir {folder / 'runs'}"
    config = parse(f"{where} {FLAGS} {flags}".split())
    assert run(config)["status"] == "finished"
    return config.run_folder


@pytest.mark.parametrize("task", ["piqa", "stsb"])
def test_multiple_choice_and_regression(task, tmp_path):
    pytest.importorskip("onnxruntime")
    folder = finished(task, BERT, "--bits 8 --max_steps 2", tmp_path)
    one = replace(finished_run(folder), round_embeddings=False)
    shape = (3, 2, 8) if task == "piqa" else (3, 8)
    inputs = {"input_ids": torch.arange(5, 5 + torch.Size(shape).numel()).view(shape) % 30}
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    inputs["token_type_ids"] = (inputs["input_ids"] > 9).long()  # which of the two texts a token is of
    logits = load_model(folder)(**inputs).logits
    assert logits.shape == ((3, 2) if task == "piqa" else (3, 1))
    before = one.record["metrics"]["validation"]
    for format in ("packed", "onnx"):
        verdict = export(one, format, tmp_path / format)
        after = verdict["metrics"]["exported"]["validation"]
        assert after["loss"] == pytest.approx(before["loss"], rel=1e-3)  # so few steps leave correlations to chance
        assert "None" not in (tmp_path / format / "README.md").read_text()
    torch.testing.assert_close(load_packed(tmp_path / "packed")(**inputs).logits, logits, rtol=1e-5, atol=1e-6)
    told_apart = EXPORT_FORMATS["onnx"].load(one, tmp_path / "onnx")(**inputs)["logits"]
    torch.testing.assert_close(told_apart, logits, rtol=1e-3, atol=1e-3 * logits.abs().max().item())
    if task == "piqa":
        pytest.importorskip("compressed_tensors")
        with pytest.raises(UserError, match="needs a model of transformers, this run's is not one"):
            export(one, "compressed-tensors", tmp_path / "ct")


def test_a_language_model_with_fused_layers(tmp_path):
    pytest.importorskip("compressed_tensors")
    pytest.importorskip("onnxruntime")
    searched = "--search --search_space 4,8 --max_steps 3 --weight_only_search --policy_prior none"
    folder = finished("lm", LLAMA, f"{searched} --fuse_groups", tmp_path)
    one = replace(finished_run(folder), round_embeddings=False)
    before = one.record["metrics"]["validation"]["perplexity"]
    tokens = {"input_ids": torch.arange(5, 21).view(2, 8), "attention_mask": torch.ones(2, 8, dtype=torch.long)}
    with torch.no_grad():
        logits = load_model(folder)(**tokens).logits
        for format in ("packed", "onnx", "compressed-tensors"):
            verdict = export(one, format, tmp_path / format)
            assert verdict["metrics"]["exported"]["validation"]["perplexity"] == pytest.approx(before, rel=1e-3)
            assert all(layer["as_chosen"] for layer in verdict["layers"].values())
        again = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "compressed-tensors").eval()
        torch.testing.assert_close(again(**tokens).logits, logits, rtol=1e-4, atol=1e-5)
    layers = json.loads((tmp_path / "compressed-tensors" / "export.json").read_text())["layers"]
    for block in (name.removesuffix("q_proj") for name in layers if name.endswith("q_proj")):
        assert len({str(layers[f"{block}{part}"]["chosen"]) for part in ("q_proj", "k_proj", "v_proj")}) == 1


def test_fused_layers_of_different_formats_name_the_flag(tmp_path, monkeypatch):
    pytest.importorskip("compressed_tensors")
    from quant.convert import set_formats
    from quant.formats import FLOAT, parse_format

    folder = finished("lm", LLAMA, "--weight_bits 4 --max_steps 0", tmp_path)
    one = finished_run(folder)
    up = next(name for name in one.modules if name.endswith("up_proj"))
    one.modules[up].weight_quantizer.prepare(parse_format("int8"))
    set_formats(one.modules, {up: (parse_format("int8"), FLOAT)})
    monkeypatch.setitem(one.record["assignment"], up, ["int8", "float"])
    with pytest.raises(UserError, match=r"fuse .*gate_proj int4/float, .*up_proj int8/float.* --fuse_groups"):
        export(one, "compressed-tensors", tmp_path / "ct", evaluate=False)
    assert not (tmp_path / "ct").exists() and not list(tmp_path.glob(".ct*"))
