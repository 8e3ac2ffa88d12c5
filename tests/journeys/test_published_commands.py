"""The four published commands, pasted as they are, with small models from scratch and local data behind them."""

import pytest
import transformers
from PIL import Image

from tests.journeys.conftest import SHARED, record_of

COMMON = "--num_train_epochs 3 --learning_rate 5e-5 --train_batch_size 32 --eval_batch_size 32 --output_root_dir output"
COMMANDS = {
    "mrpc": f"--task mrpc --model bert --block_search --search_space 4,8 {COMMON}",
    "cifar10": f"--task cifar10 --model resnet18 --search --search_space 2,4,8 {COMMON}",
    "sst2": f"--task sst2 --model gpt2 --single_decision --search {COMMON}",
    "imagenet-1k": f"--task imagenet-1k --model efficientnet-b0 --weight_bits 8 --activation_bits 8 {COMMON}",
}
SMALL = {
    "mrpc": transformers.BertConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64, max_position_embeddings=64
    ),
    "cifar10": transformers.ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic"),
    "sst2": transformers.GPT2Config(n_layer=2, n_embd=32, n_head=2, n_positions=64),
}
"""in the place of architectures that take minutes a step on two cores"""
DATA = {"mrpc": "glue/mrpc", "sst2": "glue/sst2", "cifar10": "cifar10"}
SHORT = (
    "--max_steps 6 --train_batch_size 8 --max_train_samples 48 --max_eval_samples 16 --device cpu"
    " --compile off --save_strategy no --report_to none --num_cpus 1"
)


def images(folder):
    """Two classes in the layout of a folder of images."""
    for split in ("train", "validation"):
        for label in range(2):
            (folder / split / f"class{label}").mkdir(parents=True)
            for n in range(8):
                Image.new("RGB", (40, 40), (200 * label, 20 * n, 40)).save(
                    folder / split / f"class{label}" / f"{n}.png"
                )
    return folder


@pytest.mark.parametrize("task", COMMANDS)
def test_a_published_command_ends_with_a_finished_run(task, tmp_path, command):
    data = SHARED / "data" / DATA[task] if task in DATA else images(tmp_path / "images")
    if not data.exists():
        pytest.skip(f"../shared/data/{DATA[task]} is absent")
    local = f"--from_scratch --data_dir {data} --output_root_dir {tmp_path / 'output'} {SHORT}"
    if task in SMALL:
        SMALL[task].save_pretrained(tmp_path / "small")
        local += f" --model {tmp_path / 'small'}"
    local += " --max_length 24" if task in ("mrpc", "sst2") else " --image_size 32"
    ended = command(f"python eval_parallel.py {COMMANDS[task]} {local}")
    (folder,) = (path.parent for path in (tmp_path / "output" / task).glob("*/*/result.json"))
    record = record_of(folder)
    assert record["status"] == "finished" and record["steps"] == 6 and record["task"] == task
    assert record["run_id"] in ended.out + ended.err
    formats = {tuple(pair) for pair in record["assignment"].values()}
    if task == "imagenet-1k":
        assert formats == {("int8", "int8")} and record["model"] == "efficientnet-b0"
    else:
        assert record["cost"] <= record["cost_target"] < record["cost_range"][1]
        assert record["model"] == f"{SMALL[task].model_type}-small"
    if task == "mrpc":
        assert len(record["decisions"]) == 6, "query, key, value, attention output, intermediate, output"
    if task == "sst2":
        assert len(formats) == 1
