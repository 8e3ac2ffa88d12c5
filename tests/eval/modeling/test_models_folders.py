"""Model folders of users: with their own code, without a vocabulary, truncated, or of another shape."""

import io
import json
from types import SimpleNamespace

import pytest
import torch
import transformers

from eval.config.parser import parse
from eval.eval_run import run
from eval.modeling.places import starting_model
from eval.models import build_model
from eval.run.plan import make_plan
from eval.saved_model import load_model
from eval.transformer_utils import train_tokenizer
from quant.errors import UserError

TEXTS = [f"the {who} sees {number} hills" for who in ("cat", "dog") for number in range(50)]
SMALL = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}


def config(task="mrpc", model=None, **flags):
    return SimpleNamespace(task=task, model=model, **{"seed": 0, **flags})


OWN_CODE = """
from pathlib import Path
Path(r"{marker}").write_text("ran")
from transformers import BertConfig as Own, BertForSequenceClassification as Model, PreTrainedTokenizerFast as Words
from transformers import ViTImageProcessor as Processor
"""
OWN_MAP = {
    "AutoConfig": "own.Own",
    "AutoModelForSequenceClassification": "own.Model",
    "AutoModelForImageClassification": "own.Model",
    "AutoModelForCausalLM": "own.Model",
}


@pytest.fixture
def own_code(tmp_path, monkeypatch):
    """A model folder whose configuration, tokenizer and image processor each refer to code in the folder.

    The code would leave a marker. Every question on the terminal is answered with yes.
    """
    folder = tmp_path / "own"
    folder.mkdir()
    (folder / "own.py").write_text(OWN_CODE.format(marker=tmp_path / "marker"))
    (folder / "config.json").write_text(json.dumps({"model_type": "strange", "auto_map": OWN_MAP}))
    words = {"tokenizer_class": "Words", "auto_map": {"AutoTokenizer": [None, "own.Words"]}}
    (folder / "tokenizer_config.json").write_text(json.dumps(words))
    pixels = {"image_processor_type": "Own", "auto_map": {"AutoImageProcessor": "own.Processor"}}
    (folder / "preprocessor_config.json").write_text(json.dumps(pixels))
    (folder / "model.safetensors").write_bytes(b"")
    monkeypatch.setattr("sys.stdin", io.StringIO("y\n" * 9))
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    return folder


REFUSED = r"needs code that it brings along \(auto_map\), which is never run"


@pytest.mark.parametrize("task", ["mrpc", "lm", "cifar10"])
@pytest.mark.parametrize("from_scratch", [False, True])
def test_a_folders_own_code_is_refused_and_never_run(task, from_scratch, own_code, tmp_path):
    flags = {"model": str(own_code), "from_scratch": True} if from_scratch else {"model_path": own_code}
    with pytest.raises(UserError, match=REFUSED) as error:
        build_model(config(task, **flags), 2, TEXTS)
    assert "\n" not in str(error.value) and str(own_code) in str(error.value)
    assert not (tmp_path / "marker").exists()


@pytest.mark.parametrize("part", ["tokenizer", "processor"])
def test_code_of_a_tokenizer_or_image_processor_is_not_run_either(part, own_code, tmp_path):
    if part == "tokenizer":
        transformers.BertConfig(**SMALL).save_pretrained(own_code)
    else:
        small = transformers.ResNetConfig(embedding_size=8, hidden_sizes=[8], depths=[1], layer_type="basic")
        transformers.ResNetForImageClassification(small).save_pretrained(own_code)
    with pytest.raises(UserError) as error:
        build_model(config("mrpc" if part == "tokenizer" else "cifar10", model_path=own_code), 2)
    assert "\n" not in str(error.value) and not (tmp_path / "marker").exists()


def bert(folder, texts=TEXTS, **settings):
    """A small classifier with its tokenizer, as a user saves them."""
    tokenizer = train_tokenizer(iter(texts), 200, token_types=True)
    settings = {**SMALL, "vocab_size": len(tokenizer), "max_position_embeddings": 64, **settings}
    transformers.BertForSequenceClassification(transformers.BertConfig(**settings)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def rewrite(file, **values):
    file.write_text(json.dumps({**json.loads(file.read_text()), **values}))


def cut(folder):
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def no_words(folder):
    (folder / "tokenizer.json").unlink()
    rewrite(folder / "tokenizer_config.json", tokenizer_class="BertTokenizer")


def other_vocabulary(folder):
    bert(folder / "larger", [f"word{i} w{i} x{i}" for i in range(300)])
    for file in (folder / "larger").glob("tokenizer*"):
        file.rename(folder / file.name)


DAMAGES = {
    "no tokenizer": (lambda f: (f / "tokenizer.json").unlink(), "its tokenizer cannot be read"),
    "no vocabulary": (no_words, "its tokenizer has no vocabulary"),
    "a damaged tokenizer": (
        lambda f: (f / "tokenizer.json").write_text('{"version": "1.0", "model"'),
        "its tokenizer cannot be read",
    ),
    "no configuration": (lambda f: (f / "config.json").unlink(), "has no config.json"),
    "a damaged configuration": (lambda f: (f / "config.json").write_text("{"), "config"),
    "fewer positions": (
        lambda f: rewrite(f / "config.json", max_position_embeddings=32),
        r"position_embeddings.weight is \(64, 32\) in the file and \(32, 32\) by the configuration",
    ),
    "a wider body": (lambda f: rewrite(f / "config.json", intermediate_size=96), "only a head for other classes"),
    "a larger vocabulary": (other_vocabulary, r"its tokenizer has \d+ tokens and the model \d+ embeddings"),
    "a number of words of its own": (lambda f: rewrite(f / "config.json", vocab_size=12), "word_embeddings"),
    "weights cut short": (cut, "cut short or not safetensors"),
    "empty weights": (lambda f: (f / "model.safetensors").write_bytes(b""), "cut short or not safetensors"),
    "weights that are text": (lambda f: (f / "model.safetensors").write_text("no" * 99), "cut short or not safe"),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), "model.safetensors"),
    "heads that do not divide": (lambda f: rewrite(f / "config.json", num_attention_heads=5), "5|multiple"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_model_folder_is_refused_in_one_line(damage, tmp_path):
    folder = bert(tmp_path / "bert")
    assert build_model(config(model_path=folder), 2).trained
    act, message = DAMAGES[damage]
    act(folder)
    with pytest.raises(UserError, match=message) as error:
        build_model(config(model_path=folder), 2)
    assert "\n" not in str(error.value) and f"--model_path {folder}" in str(error.value)


@pytest.mark.parametrize(("flag", "task"), [("model", "lm"), ("model_path", "lm"), ("model", "cifar10")])
def test_a_folder_without_weights_needs_from_scratch(flag, task, tmp_path):
    small = transformers.LlamaConfig(**SMALL) if task == "lm" else transformers.ResNetConfig()
    small.save_pretrained(tmp_path)
    message = f"--{flag} {tmp_path}: holds no weights .*--model {tmp_path} --from_scratch"
    with pytest.raises(UserError, match=message):
        build_model(config(task, **{flag: str(tmp_path)}), 2)


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (None, "no such folder; give the folder of a finished run"),
        ([], "is no saved model: it holds no quantization.json; .* quantization.json and model.safetensors"),
        (["quantization.json"], "is no saved model: it holds no model.safetensors"),
    ],
)
def test_what_is_no_saved_model_is_refused_with_what_it_must_hold(files, message, tmp_path):
    folder = tmp_path / "run"
    if files is not None:
        folder.mkdir()
        for name in files:
            (folder / name).write_text("{}")
    with pytest.raises(UserError, match=f"^{folder}: {message}"):
        load_model(folder)


def test_only_a_head_may_differ_and_a_note_says_so(tmp_path):
    bundle = build_model(config(model_path=bert(tmp_path / "bert")), 5)
    assert not bundle.trained and bundle.model.classifier.out_features == 5
    assert any(note.startswith("classifier.weight: (2, 32) in") for note in bundle.notes)


@pytest.mark.parametrize("content", [b"", b"no tensors at all", b"\x80\x02}q\x00."], ids=["empty", "text", "pickle"])
@pytest.mark.parametrize("flag", ["model_path", "load_model_path"])
def test_a_file_that_is_no_safetensors_is_refused_in_one_line(flag, content, tmp_path):
    file = tmp_path / "weights.safetensors"
    file.write_bytes(content)
    flags = f"--task digits --model convnet --method float --max_steps 0 --{flag} {file} --output_root_dir {tmp_path}"
    with pytest.raises(UserError, match=f"--{flag} {file}: .*cut short or not safetensors") as error:
        make_plan(parse(flags.split()))
    assert "\n" not in str(error.value)


def test_weights_of_text_models_must_be_named_model_safetensors(tmp_path):
    folder = bert(tmp_path / "bert")
    (folder / "epoch3.safetensors").write_bytes((folder / "model.safetensors").read_bytes())
    with pytest.raises(UserError, match=r"epoch3\S*: text models are read from"):
        build_model(config(model="bert", model_path=folder / "epoch3.safetensors"), 2)


# ------------------------------------------------------ a finished run as the start of another


@pytest.fixture(scope="module")
def sentences(tmp_path_factory):
    """Two tasks of the same kind whose words differ, so that tokenizers trained on them do."""
    folder = tmp_path_factory.mktemp("sentences")
    for task, animals in (("pets", ("cat", "dog")), ("birds", ("sparrow", "pelican"))):
        (folder / task).mkdir()
        rows = [f"the {who} sees {number} hills,{label}" for number in range(24) for label, who in enumerate(animals)]
        for split, part in (("train", rows[:40]), ("validation", rows[40:])):
            (folder / task / f"{split}.csv").write_text("\n".join(["text,label", *part]))
    return folder


SHORT = "--device cpu --report_to none --save_strategy no --compile off --quiet --method float"


def a_run(flags, folder):
    """Return the record of a short run, and its folder."""
    settings = parse(f"{flags} {SHORT} --output_root_dir {folder}".split())
    return run(settings), settings.run_folder


@pytest.fixture(scope="module")
def text_run(sentences, tmp_path_factory):
    folder = tmp_path_factory.mktemp("text")
    transformers.BertConfig(**SMALL).save_pretrained(folder / "small")
    model = f"--model {folder / 'small'} --from_scratch"
    return *a_run(f"--task {sentences / 'pets'} {model} --max_steps 4 --learning_rate 3e-3", folder), model


STARTS = [
    "--load_model_path {run}", "--load_model_path {run}/model", "--load_model_path {run}/model/model.safetensors",
    "--model_path {run}", "--model_path {run}/model", "--model {run}", "{model} --load_model_path {run}",
]  # fmt: skip


@pytest.mark.parametrize("start", STARTS)
def test_a_run_brings_its_tokenizer_and_configuration(start, text_run, sentences, tmp_path):
    """Fewer training texts would yield another tokenizer; with the saved one, predictions do not change."""
    record, folder, model = text_run
    start = start.format(run=folder, model=model)
    again, _ = a_run(f"--task {sentences / 'pets'} {start} --max_steps 0 --max_train_samples 8", tmp_path)
    assert again["metrics"] == record["metrics"] and again["model"] == record["model"]


def test_a_run_on_other_words_keeps_the_tokenizer_it_started_with(text_run, sentences, tmp_path):
    _, folder, model = text_run
    flags = f"--task {sentences / 'birds'} {model} --load_model_path {folder} --max_steps 2"
    _, after = a_run(flags, tmp_path)
    assert (after / "model/tokenizer.json").read_text() == (folder / "model/tokenizer.json").read_text()
    _, third = a_run(f"--task {sentences / 'birds'} --load_model_path {after} --max_steps 0", tmp_path / "third")
    assert (third / "model/tokenizer.json").read_text() == (folder / "model/tokenizer.json").read_text()


def test_weights_without_their_tokenizer_are_refused_where_one_would_be_trained(text_run, sentences, tmp_path):
    _, folder, model = text_run
    alone = tmp_path / "model.safetensors"
    alone.write_bytes((folder / "model/model.safetensors").read_bytes())
    with pytest.raises(UserError, match=f"--load_model_path {alone}: .*its tokenizer is not known"):
        a_run(f"--task {sentences / 'pets'} {model} --load_model_path {alone} --max_steps 0", tmp_path)


def own_processor(folder):
    """A classifier of transformers whose image processor differs from all defaults."""
    small = transformers.ResNetConfig(embedding_size=8, hidden_sizes=[8], depths=[1], layer_type="basic", num_labels=10)
    transformers.ResNetForImageClassification(small).save_pretrained(folder)
    transformers.ViTImageProcessor(
        size={"height": 24, "width": 24}, image_mean=[0.1, 0.2, 0.3], image_std=[0.9, 0.8, 0.7]
    ).save_pretrained(folder)
    return f"--model_path {folder}"


IMAGE_MODELS = {
    "convnet": "--model convnet",
    "resnet20": "--model resnet20",
    "resnet18": None,
    "timm": "--model timm:test_efficientnet --image_size 32 --from_scratch",
    "torchvision": "--model torchvision:shufflenet_v2_x0_5 --image_size 32 --from_scratch",
}


@pytest.mark.parametrize("name", IMAGE_MODELS)
def test_a_run_brings_its_image_model_and_how_images_are_scaled(name, tmp_path):
    if name == "timm":
        pytest.importorskip("timm")
    model = IMAGE_MODELS[name] or own_processor(tmp_path / "resnet18")
    rows = "--max_train_samples 16 --max_eval_samples 16 --train_batch_size 8"
    record, folder = a_run(f"--task digits {model} --max_steps 2 {rows}", tmp_path)
    again, second = a_run(f"--task digits --load_model_path {folder} --max_steps 0 {rows}", tmp_path / "again")
    assert again["metrics"] == record["metrics"] and again["model"] == record["model"]
    first, second = (load_model(place).state_dict() for place in (folder, second))
    assert all(torch.equal(tensor, second[key]) for key, tensor in first.items()) and first.keys() == second.keys()


def test_another_model_beside_a_run_and_a_run_of_the_other_kind_are_refused(text_run, sentences, tmp_path):
    _, digits = a_run("--task digits --model convnet --max_steps 1", tmp_path)
    _, words, _ = text_run
    for flags, message in (
        (f"--task digits --model resnet20 --load_model_path {digits}", "holds convnet; leave --model out"),
        (f"--task {sentences / 'pets'} --load_model_path {digits}", f"{digits}: has no config.json: .* none for texts"),
        (f"--task digits --load_model_path {words}", "builds no ImageClassification model"),
    ):
        with pytest.raises(UserError, match=message) as error:
            a_run(f"{flags} --max_steps 0", tmp_path / "refused")
        assert "\n" not in str(error.value)


def test_a_damaged_run_is_refused_in_one_line(tmp_path):
    _, folder = a_run("--task digits --model convnet --max_steps 1", tmp_path)
    saved = folder / "model" / "quantization.json"
    before = saved.read_text()
    for content in (before[:50], "[]", "3"):
        saved.write_text(content)
        with pytest.raises(UserError, match=r"--load_model_path .*quantization.json is damaged") as error:
            a_run(f"--task digits --load_model_path {folder} --max_steps 0", tmp_path / "refused")
        assert "\n" not in str(error.value)
    saved.write_text(before)
    cut(folder / "model")
    with pytest.raises(UserError, match=r"--load_model_path .*cut short or not safetensors"):
        a_run(f"--task digits --load_model_path {folder} --max_steps 0", tmp_path / "refused")


# ------------------------------------------------------ names


def test_models_are_called_by_architecture_and_folder(tmp_path):
    names = {}
    for place in ("mine/model", "theirs/model", "bert-tuned", "tuned", "mine/checkpoint-500"):
        transformers.BertConfig(**SMALL).save_pretrained(tmp_path / "runs" / place)
        settings = parse(f"--task digits --model_path {tmp_path / 'runs' / place} --method float".split())
        names[place] = settings.model_name
        assert settings.run_name == f"{settings.model_name}-float-s42"
    assert names == {
        "mine/model": "bert-mine-model",
        "theirs/model": "bert-theirs-model",
        "bert-tuned": "bert-tuned",
        "tuned": "bert-tuned",
        "mine/checkpoint-500": "bert-mine-checkpoint-500",
    }


def test_a_known_name_stays_one_whatever_folder_is_called_so(tmp_path, monkeypatch):
    _, folder = a_run("--task digits --model convnet --max_steps 1", tmp_path)
    (tmp_path / "convnet").symlink_to(folder)
    monkeypatch.chdir(tmp_path)
    settings = parse(["--task", "digits", "--model", "convnet", "--method", "float"])
    assert settings.model_name == "convnet" and starting_model(settings) is None


def test_random_weights_are_logged_unless_requested(tmp_path, caplog):
    plan = f"--task digits --model convnet --method float --max_steps 1 --output_root_dir {tmp_path}"
    told = make_plan(parse(plan.split()))
    assert told.bundle.notes == ["random weights: convnet comes without any"]
    assert [r.levelname for r in caplog.records if "--model convnet: random weights" in r.message] == ["WARNING"]
    caplog.clear()
    make_plan(parse([*plan.split(), "--from_scratch"]))
    assert not [r for r in caplog.records if r.levelname == "WARNING"]


def test_an_error_names_load_model_path_if_it_is_no_run(tmp_path):
    """Without --model, --load_model_path must name a finished run."""
    given = ["--task", "digits", "--search", "--load_model_path"]
    with pytest.raises(UserError, match=r"--load_model_path .*/flaot: no such file or folder"):
        parse([*given, str(tmp_path / "flaot")])
    (tmp_path / "float").mkdir()
    (tmp_path / "float" / "result.json").write_text("{}")
    with pytest.raises(UserError, match=r"is no finished run; runs in it: float; beside bare weights, --model names"):
        parse([*given, str(tmp_path)])
    (tmp_path / "weights.safetensors").write_bytes(b"")
    with pytest.raises(UserError, match=r"weights.safetensors is one file: name its architecture with --model"):
        parse([*given, str(tmp_path / "weights.safetensors")])
