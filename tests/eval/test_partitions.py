"""Block partitions and layer coverage, on the real architectures without weights (meta device)."""

from types import SimpleNamespace

import pytest
import torch
import transformers
from torch import nn

from eval.eval_partitions import block_partition, check_partition
from eval.layers.coverage import searched_layers
from eval.layers.roles import layer_roles
from eval.modeling.vision_nets import CifarResNet, ImageClassifier
from eval.transformer_utils import MODELS as TEXT_MODELS
from eval.vision_utils import HUB_MODELS as IMAGE_MODELS
from quant.errors import UserError


def config(**flags):
    return SimpleNamespace(**flags)


def published(name):
    """The architecture as published, without weights."""
    known = TEXT_MODELS.get(name) or IMAGE_MODELS[name]
    auto = transformers.AutoModelForSequenceClassification
    if name in IMAGE_MODELS:
        auto = transformers.AutoModelForImageClassification
    with torch.device("meta"):
        return auto.from_config(getattr(transformers, known.config)(**known.settings))


def library(name):
    package, _, name = name.partition(":")
    with torch.device("meta"):
        if package == "timm":
            return ImageClassifier(pytest.importorskip("timm").create_model(name))
        return ImageClassifier(pytest.importorskip("torchvision").models.get_model(name))


def sizes(blocks):
    return {name: len(layers) for name, layers in blocks.items()}


def partition(model, mode, kind="image"):
    names = searched_layers(model, kind, config())
    blocks = block_partition(model, names, mode)
    check_partition(blocks, names)
    assert sorted(name for layers in blocks.values() for name in layers) == sorted(names)
    return sizes(blocks)


def test_bert_by_role_is_the_six_of_the_encoder():
    block = "bert.encoder.layer.*"
    assert partition(published("bert-tiny"), "role", "text") == {
        f"{block}.attention.self.query": 2,
        f"{block}.attention.self.key": 2,
        f"{block}.attention.self.value": 2,
        f"{block}.attention.output.dense": 2,
        f"{block}.intermediate.dense": 2,
        f"{block}.output.dense": 2,
    }


@pytest.mark.parametrize(
    "name, roles, depths",
    [
        *(("bert", 6, 12), ("roberta", 6, 12), ("gpt2", 4, 12), ("deit-tiny", 8, 14)),
        *(("resnet18", 5, 6), ("resnet50", 6, 6), ("efficientnet-b0", 8, 19), ("mobilenetv2", 8, 21)),
    ],
)  # fmt: skip
def test_blocks_of_transformers_models(name, roles, depths):
    kind = "text" if name in TEXT_MODELS else "image"
    model = published(name)
    assert (len(partition(model, "role", kind)), len(partition(model, "depth", kind))) == (roles, depths)


def test_stages_are_found_whether_in_a_list_or_side_by_side():
    ours, torchvision, timm = CifarResNet(20, 10), library("torchvision:resnet50"), library("timm:resnet50")
    assert partition(ours, "depth") == {"conv1": 1, "layer1": 6, "layer2": 6, "layer3": 6, "linear": 1}
    assert partition(ours, "role") == {"conv1": 1, "*.*.conv1": 9, "*.*.conv2": 9, "linear": 1}
    for mode in ("role", "depth"):
        same = [list(partition(model, mode).values()) for model in (torchvision, timm)]
        assert same[0] == same[1] and sorted(same[0]) == sorted(partition(published("resnet50"), mode).values())


def test_units_of_another_class_play_another_role():
    blocks = partition(library("timm:efficientnet_b0"), "role")
    # conv_pw projects in the first block and expands in the others.
    assert [n for name, n in blocks.items() if "conv_pw:" in name] == [1, 15]
    inception = partition(library("timm:inception_v3"), "depth")
    assert inception["net.Mixed_5b"] == 7 and inception["net.Mixed_6a"] == 4 and len(inception) == 17


def test_depthwise_and_dense_convolutions_do_not_share_a_role():
    model = library("torchvision:mobilenet_v2")
    blocks = block_partition(model, searched_layers(model, "image", config()), "role")
    for layers in blocks.values():
        assert len({model.get_submodule(name).groups > 1 for name in layers if "classifier" not in name}) <= 1


def test_a_plain_chain_of_layers_has_no_blocks_to_share():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.Flatten(), nn.Linear(4, 2))
    for mode in ("role", "depth"):
        assert partition(model, mode) == {"0": 1, "2": 1, "4": 1}


def test_partitions_are_checked():
    for blocks, message in (
        ({"a": ["x"], "b": ["x", "y"]}, "x is twice"),
        ({"a": ["x"]}, "y is in no block"),
        ({"a": ["x", "y", "z"]}, "z is not a layer"),
        ({"a": ["x", "y"], "b": []}, "b is an empty block"),
    ):
        with pytest.raises(UserError, match=message):
            check_partition(blocks, ["x", "y"])
    with pytest.raises(UserError, match="--block_search width: choose one of role, depth"):
        block_partition(CifarResNet(20, 10), [], "width")


@pytest.mark.parametrize(
    "flag, left_out",
    [
        ("quantize_self_attention", ["query", "key", "value"]),
        ("quantize_self_output", ["attention.output.dense"]),
        ("quantize_intermediate", ["intermediate.dense"]),
        ("quantize_output", ["1.output.dense", "0.output.dense"]),
    ],
)
def test_each_flag_switches_its_layers_off(flag, left_out):
    model = published("bert-tiny")
    searched = searched_layers(model, "text", config())
    missing = set(searched) - set(searched_layers(model, "text", config(**{flag: False})))
    assert len(missing) == 2 * len(left_out) if flag == "quantize_self_attention" else 2
    assert all(name.endswith(tuple(left_out)) for name in missing)


def test_pooler_and_classifier_are_off_for_text_and_on_for_images():
    bert = published("bert-tiny")
    everything = list(layer_roles(bert))
    assert set(everything) - set(searched_layers(bert, "text", config())) == {"bert.pooler.dense", "classifier"}
    flags = config(quantize_pooler=True, quantize_classifier=True)
    assert searched_layers(bert, "text", flags) == everything
    assert searched_layers(CifarResNet(20, 10), "image", config())[-1] == "linear"
    assert "linear" not in searched_layers(CifarResNet(20, 10), "image", config(quantize_classifier=False))


def test_globs_narrow_the_choice_and_must_match():
    model = published("bert-tiny")
    assert searched_layers(model, "text", config(include="*.query, *.key", exclude="*.1.*")) == [
        "bert.encoder.layer.0.attention.self.query",
        "bert.encoder.layer.0.attention.self.key",
    ]
    with pytest.raises(UserError, match=r"--exclude: pattern '\*quary' matches no layer"):
        searched_layers(model, "text", config(exclude="*quary"))
    with pytest.raises(UserError, match="no layer is left to quantize"):
        searched_layers(model, "text", config(include="classifier"))
