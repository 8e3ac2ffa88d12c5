"""Model cards: their programs run and reproduce the predictions of the run; class names are kept."""

import json
import re
import runpy
import sys

import numpy as np
import pytest
import transformers
from PIL import Image

from eval.config.parser import parse
from eval.eval_run import run
from eval.export.__main__ import export
from eval.export.finished_run import finished_run
from eval.run.plan import make_plan
from quant.export.packed import read_packed

SIZES = {"hidden_size": 32, "num_attention_heads": 2, "intermediate_size": 48, "num_hidden_layers": 1}
BERT = transformers.BertConfig(max_position_embeddings=32, **SIZES)
LLAMA = transformers.LlamaConfig(num_key_value_heads=1, max_position_embeddings=32, **SIZES)
BART = transformers.BartConfig(
    d_model=32, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2, decoder_attention_heads=2,
    encoder_ffn_dim=48, decoder_ffn_dim=48, max_position_embeddings=64,
)  # fmt: skip
FLAGS = "--train_batch_size 8 --report_to none --quiet --save_strategy no --compile off"


def write_program(card, place):
    """Write the Python block of the card to a file."""
    (program,) = re.findall(r"```python\n(.*?)```", card.read_text(), re.DOTALL)
    place.write_text(program)
    return place


def told(card, tmp_path, capsys, monkeypatch, *arguments):
    """Run the program of the card and return its output."""
    capsys.readouterr()
    monkeypatch.setattr(sys, "argv", ["program.py", *map(str, arguments)])
    monkeypatch.chdir(card.parent)
    assert str(tmp_path) not in card.read_text()  # an export may be moved
    runpy.run_path(str(write_program(card, tmp_path / "program.py")), run_name="__main__")
    return capsys.readouterr().out.splitlines()


ROWS = {
    "own": [{"text": f"film {n} was {n % 3}", "label": ("bad", "good", "so so")[n % 3]} for n in range(24)],
    "mrpc": [{"sentence1": f"see {n}", "sentence2": f"{n} seen", "label": n % 2} for n in range(24)],
    "stsb": [{"sentence1": f"see {n}", "sentence2": f"{n} seen", "label": n / 8} for n in range(24)],
    "piqa": [{"goal": f"see {n} hills", "sol1": "the cat", "sol2": "two rivers", "label": n % 2} for n in range(24)],
    "lm": [{"text": f"one two three {n} four five six"} for n in range(60)],
    "squad": [
        {
            "id": str(n),
            "question": "who ?",
            "context": f"ann saw {n}",
            "answers": {"text": ["ann"], "answer_start": [0]},
        }
        for n in range(24)
    ],
    "xsum": [{"document": f"ann went to {n} places", "summary": f"ann went {n}"} for n in range(24)],
}


def finished(kind, tmp_path, flags=""):
    settings = {"lm": LLAMA, "xsum": BART}.get(kind, BERT)
    settings.save_pretrained(tmp_path / "architecture")
    data = tmp_path / "data"
    data.mkdir()
    for split in ("train", "validation"):
        (data / f"{split}.jsonl").write_text("\n".join(map(json.dumps, ROWS[kind])))
    task = f"--task {data}" if kind == "own" else f"--task {kind} --data_dir {data}"
    where = f"{task} --model {tmp_path / 'architecture'} --output_root_dir {tmp_path / 'runs'} --max_length 16"
    config = parse(f"{where} --from_scratch --max_steps 2 {FLAGS} {flags}".split())
    assert run(config)["status"] == "finished"
    return config


@pytest.mark.parametrize(
    ("kind", "format", "pattern"),
    [
        ("own", "packed", r"The text of an example. (bad|good|so so)"),
        ("own", "onnx", r"The text of an example. (bad|good|so so)"),
        ("mrpc", "packed", r"The sentence1 of an example. The sentence2 of an example. [01]"),
        ("stsb", "packed", r"The sentence1 of an example. The sentence2 of an example. -?[\d.]+"),
        ("piqa", "onnx", r"A question\? answer [12]"),
        ("lm", "packed", r"The \S*"),
        ("lm", "compressed-tensors", r"The \S*"),
        ("lm", "torchao", r"The \S*"),
        ("own", "executorch", r"The text of an example. (bad|good|so so)"),
        ("squad", "packed", r".*"),
        ("squad", "onnx", r".*"),
        ("xsum", "packed", r".*"),
    ],
)
def test_a_cards_program_runs_as_written(kind, format, pattern, tmp_path, capsys, monkeypatch):
    package = {"onnx": "onnxruntime", "packed": "torch"}.get(format, format.replace("-", "_"))
    pytest.importorskip(package)
    config = finished(kind, tmp_path, "--weight_bits 8" if format in ("compressed-tensors", "torchao") else "--bits 8")
    export(finished_run(config.run_folder), format, tmp_path / format, evaluate=format == "onnx")
    (line,) = told(tmp_path / format / "README.md", tmp_path, capsys, monkeypatch) or [""]
    assert re.fullmatch(pattern, line), line


def test_classes_keep_their_names(tmp_path):
    config = finished("own", tmp_path, "--bits 8")
    names, folder = ["bad", "good", "so so"], config.run_folder
    settings = transformers.AutoConfig.from_pretrained(folder / "model")
    assert settings.id2label == dict(enumerate(names)) and settings.label2id == {
        name: n for n, name in enumerate(names)
    }
    answers = json.loads((folder / "predictions.json").read_text())["validation"]
    assert answers["classes"] == names and len(answers["predicted"]) == 24
    assert json.loads((folder / "result.json").read_text())["classes"] == names
    export(finished_run(folder), "packed", tmp_path / "packed", evaluate=False)
    verdict = json.loads((tmp_path / "packed" / "export.json").read_text())
    assert verdict["inputs"]["classes"] == names and verdict["inputs"]["max_length"] == 16
    assert "classes 0 `bad`, 1 `good`, 2 `so so`" in (tmp_path / "packed" / "README.md").read_text()


def test_a_trained_head_keeps_the_order_of_its_classes(tmp_path):
    """The class order of a pretrained classifier may differ from the data; classes are matched by name."""
    config = finished("own", tmp_path, "--bits 8 --max_steps 30 --learning_rate 1e-2")
    before = json.loads((config.run_folder / "predictions.json").read_text())["validation"]
    assert np.mean(np.equal(before["predicted"], before["label"])) > 0.5
    published = tmp_path / "published"
    model = transformers.AutoModelForSequenceClassification.from_pretrained(config.run_folder / "model")
    for values in (model.classifier.weight, model.classifier.bias):
        values.data = values.data.flip(0)
    model.config.id2label = {0: "SO SO", 1: "GOOD", 2: "BAD"}
    model.save_pretrained(published)
    transformers.AutoTokenizer.from_pretrained(config.run_folder / "model").save_pretrained(published)
    flags = f"--task {config.task} --model_path {published} --max_length 16 --max_steps 0 --method float"
    again = parse(f"{flags} {FLAGS} --output_root_dir {tmp_path / 'again'}".split())
    record = run(again)
    after = json.loads((again.run_folder / "predictions.json").read_text())["validation"]
    assert after["classes"] == record["classes"] == ["so so", "good", "bad"]
    assert after["label"] == [2 - label for label in before["label"]]
    assert any("in the order of the model's outputs" in note for note in record["notes"])
    assert record["metrics"]["validation"]["accuracy"] > 0.5


def photos(folder, size=(20, 14)):
    generator = np.random.default_rng(0)
    for split, count in (("train", 8), ("val", 3)):
        for number, name in enumerate(("cat", "dog", "eel")):
            (folder / split / name).mkdir(parents=True)
            for i in range(count):
                noise = generator.integers(0, 120, (size[1], size[0], 3)) + 60 * number
                Image.fromarray(noise.astype(np.uint8)).save(folder / split / name / f"{i}.png")
    return folder


@pytest.mark.parametrize("size", [(20, 14), (8, 8)], ids=["cut", "enlarged"])
@pytest.mark.parametrize("format", ["packed", "onnx"])
def test_the_program_preprocesses_images_like_the_run(size, format, tmp_path, capsys, monkeypatch):
    if format == "onnx":
        pytest.importorskip("onnxruntime")
    data = photos(tmp_path / "photos", size)
    flags = f"--task {data} --model timm:test_resnet --from_scratch --image_size 12 --max_steps 6 --learning_rate 1e-2"
    config = parse(f"{flags} --bits 8 {FLAGS} --output_root_dir {tmp_path / 'runs'}".split())
    run(config)
    export(finished_run(config.run_folder), format, tmp_path / format, evaluate=False)
    card = tmp_path / format / "README.md"
    files = sorted((data / "val").rglob("*.png"))
    answers = json.loads((config.run_folder / "predictions.json").read_text())["validation"]
    predicted = [answers["classes"][number] for number in answers["predicted"]]
    assert len(set(predicted)) > 1
    assert told(card, tmp_path, capsys, monkeypatch, *files) == [
        f"{file} {name}" for file, name in zip(files, predicted, strict=True)
    ]
    # To the last bit what the model was given.
    function = runpy.run_path(str(tmp_path / "program.py"))["pixels"]
    fed = make_plan(config).prepared.validation["validation"]
    for file, item in zip(files, fed, strict=True):
        np.testing.assert_array_equal(function(file)[0], item["pixel_values"].numpy())
    text = card.read_text()
    assert "pip install pillow numpy" in text
    record = json.loads((config.run_folder / "result.json").read_text())
    assert record["inputs"]["pixels"]["size"] == 12 and record["inputs"]["classes"] == ["cat", "dog", "eel"]
    if format == "onnx":
        import onnx

        metadata = {entry.key: entry.value for entry in onnx.load(tmp_path / "onnx/model.onnx").metadata_props}
        assert json.loads(metadata["inputs"]) == record["inputs"] and "INFERENCE_PRECISION_HINT=f32" in text
    else:
        assert read_packed(tmp_path / "packed/model.safetensors")[0]["build"]["inputs"] == record["inputs"]
    assert "size 12, mean " in text and "std " in text and "0 `cat`, 1 `dog`, 2 `eel`" in text
