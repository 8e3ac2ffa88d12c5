"""Groups of layers that have to share a format, found by running the model."""

import pytest
import torch
import transformers
from torch import nn

from eval.eval_partitions import block_partition, check_partition
from eval.layers.coverage import searched_layers
from eval.layers.fused_groups import fused_groups, merge
from eval.modeling.vision_nets import CifarResNet
from eval.models import published


def groups(model, example, kind="image"):
    names = searched_layers(model, kind, object())
    blocks = fused_groups(model, names, example)
    check_partition(blocks, names)
    return [layers for layers in blocks.values() if len(layers) > 1]


@pytest.mark.parametrize("name, attention", [("bert-tiny", "attention.self"), ("deit-tiny", "attention")])
def test_query_key_and_value_go_together(name, attention):
    found = groups(*published(name), kind="text" if name.startswith("bert") else "image")
    assert len(found) == (2 if name == "bert-tiny" else 12)
    assert all(len(layers) == 3 and f".{attention}." in layer for layers in found for layer in layers)


def test_gate_and_up_go_together():
    settings = {"num_hidden_layers": 1, "hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2}
    with torch.device("meta"):
        model = transformers.LlamaForSequenceClassification(transformers.LlamaConfig(**settings, vocab_size=50))
        found = groups(model, {"input_ids": torch.ones(1, 8, dtype=torch.long)}, "text")
    assert [[layer.rpartition(".")[2] for layer in layers] for layers in found] == [
        ["q_proj", "k_proj", "v_proj"],
        ["gate_proj", "up_proj"],
    ]


def test_layers_called_by_name_go_together_too():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.query, self.key = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x):
            return self.query(x) + self.key(input=x)

    assert fused_groups(Net(), ["query", "key"], torch.randn(2, 4)) == {"query+1": ["query", "key"]}


def test_what_a_residual_block_adds_goes_together():
    stage = "resnet.encoder.stages"
    found = groups(*published("resnet18"))
    assert [sorted(layers) for layers in found][1:] == [
        [f"{stage}.{n}.layers.{part}.convolution" for part in ("0.layer.1", "0.shortcut", "1.layer.1")]
        for n in (1, 2, 3)
    ]
    assert found[0][0] == "resnet.embedder.embedder.convolution" and len(found[0]) == 3  # an identity shortcut
    # Shortcuts without parameters carry one sum through the whole network.
    assert [len(layers) for layers in groups(*published("resnet20"))] == [10]


class SqueezeAndExcite(nn.Module):
    """A residual block whose output is gated just before it is added."""

    def __init__(self):
        super().__init__()
        self.stem, self.conv, self.gate = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 4, 1)

    def forward(self, x):
        x = self.stem(x)
        y = self.conv(x)
        return x + y * self.gate(y.mean((2, 3), keepdim=True)).sigmoid()


def test_a_gate_of_squeeze_and_excite_is_no_part_of_the_sum():
    assert groups(SqueezeAndExcite(), torch.zeros(1, 3, 8, 8)) == [["stem", "conv"]]
    found = groups(*published("efficientnet-b0"))
    assert found and all("project_conv" in layer for layers in found for layer in layers)


def test_weights_and_mode_are_left_as_they_were():
    model = CifarResNet(20, 10).train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    groups(model, {"pixel_values": torch.randn(2, 3, 32, 32)})
    assert model.training and not model.conv1._forward_hooks
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_merging_divides_neither_blocks_nor_groups():
    blocks = {"a": ["1", "2"], "b": ["3"], "c": ["4"], "d": ["5"]}
    assert merge(blocks, [["3", "4"], ["4", "1"]]) == {"a+2": ["1", "2", "3", "4"], "d": ["5"]}
    assert merge(blocks, []) == blocks
    model, _ = published("bert-tiny")
    names = searched_layers(model, "text", object())
    roles = block_partition(model, names, "role")
    merged = merge(roles, [[name for name in names if name.endswith(("query", "key", "value"))]])
    check_partition(merged, names)
    assert [len(layers) for layers in merged.values()] == [6, 2, 2, 2]
