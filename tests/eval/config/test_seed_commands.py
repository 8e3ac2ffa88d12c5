"""The four published command lines: each parses to the same run as ever, and runs on local data."""

import pytest
import transformers
from PIL import Image

from eval.config.parser import read_flags
from eval.eval_run import run
from eval.launch.grid import expand
from eval.transformer_utils import train_tokenizer

COMMON = (
    " --num_train_epochs 3 --learning_rate 5e-5 --train_batch_size 32 --eval_batch_size 32 --output_root_dir output"
)
COMMANDS = {
    "mrpc": "--task mrpc --model bert --block_search --search_space 4,8" + COMMON,
    "cifar10": "--task cifar10 --model resnet18 --search --search_space 2,4,8" + COMMON,
    "sst2": "--task sst2 --model gpt2 --single_decision --search" + COMMON,
    "imagenet-1k": "--task imagenet-1k --model efficientnet-b0 --weight_bits 8 --activation_bits 8" + COMMON,
}
MEANING = {
    "mrpc": {"method": "search", "partition": "role", "model": "bert", "search_space": "4,8", "target_bits": "6"},
    "cifar10": {
        "method": "search",
        "partition": "layer",
        "model": "resnet18",
        "search_space": "2,4,8",
        "target_bits": "5",
    },
    "sst2": {"method": "search", "partition": "single", "model": "gpt2", "search_space": "4,8", "target_bits": "6"},
    "imagenet-1k": {"method": "uniform", "model": "efficientnet-b0", "target_bits": None},
}
SAME = {
    **{"num_train_epochs": 3.0, "max_steps": -1, "learning_rate": 5e-5, "train_batch_size": 32, "eval_batch_size": 32},
    **{
        "seed": 42,
        "cost_type": "memory",
        "cost_target": None,
        "cost_function": "tunas_abs",
        "optimizer": "adamw_torch",
    },
    **{"weight_only_search": False, "quantize_pooler": None, "quantize_classifier": None, "include": None},
}


@pytest.mark.parametrize("task", COMMANDS)
def test_a_command_is_the_one_run_that_it_means(task):
    (config,) = expand(read_flags(COMMANDS[task].split()))
    expected = {"task": task, **SAME, **MEANING[task]}
    assert {name: getattr(config, name) for name in expected} == expected
    if task == "imagenet-1k":
        assert [str(format) for format in config.uniform_formats] == ["int8", "int8"]


SENTENCES = [f"the {who} sees {n} hills" for n in range(16) for who in ("cat", "dog")]
TINY = {
    "mrpc": transformers.BertConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64, vocab_size=100
    ),
    "sst2": transformers.GPT2Config(n_layer=2, n_embd=32, n_head=2, n_positions=128, vocab_size=100),
    "cifar10": transformers.ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[2, 1]),
}
"""replace architectures that would take minutes"""


def write_texts(folder, task):
    texts = {"mrpc": "sentence1,sentence2", "sst2": "sentence"}[task]
    for split in ("train", "validation"):
        rows = [f"{text},{'a hill,' * (task == 'mrpc')}{n % 2}" for n, text in enumerate(SENTENCES)]
        (folder / f"{split}.csv").write_text("\n".join([f"{texts},label", *rows]))


def write_images(folder, classes):
    for split in ("train", "validation"):
        for label in range(classes):
            (folder / split / f"class{label}").mkdir(parents=True)
            for n in range(4):
                picture = Image.new("RGB", (32, 32), (250 // classes * label, 20 * n, 40))
                picture.save(folder / split / f"class{label}" / f"{n}.png")


@pytest.mark.parametrize("task", COMMANDS)
def test_a_command_runs_on_local_data(task, tmp_path):
    data, model = tmp_path / "data", tmp_path / "model"
    data.mkdir()
    if task in ("mrpc", "sst2"):
        write_texts(data, task)
        transformers.AutoModelForSequenceClassification.from_config(TINY[task]).save_pretrained(model)
        train_tokenizer(SENTENCES, 100, task == "mrpc").save_pretrained(model)
    else:
        write_images(data, 4)
        if task in TINY:
            transformers.AutoModelForImageClassification.from_config(TINY[task]).save_pretrained(model)
    local = ["--model_path", str(model)] if task in TINY else ["--from_scratch"]
    local += [] if task in ("mrpc", "sst2") else ["--image_size", "32"]
    local += ["--data_dir", str(data), "--output_root_dir", str(tmp_path / "output"), "--max_steps", "4"]
    local += ["--train_batch_size", "8", "--device", "cpu", "--compile", "off", "--report_to", "none", "--quiet"]
    (config,) = expand(read_flags([*COMMANDS[task].split(), *local]))
    record = run(config)
    assert record["status"] == "finished" and record["steps"] == 4
    formats = {tuple(pair) for pair in record["assignment"].values()}
    if task == "imagenet-1k":
        assert formats == {("int8", "int8")} and record["cost_target"] is None
    else:
        assert record["cost"] <= record["cost_target"] < record["cost_range"][1]
    if task == "mrpc":
        assert len(record["decisions"]) == 6, "query, key, value, attention output, intermediate, output"
    if task == "sst2":
        assert len(formats) == 1
