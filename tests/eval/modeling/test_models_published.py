"""Every model known by name, as published and without weights: which layers are searched, and what they cost."""

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from benchmarks.coverage import coverage, table
from cost.profile import profile_model
from eval.layers.coverage import searched_layers
from eval.models import MODELS, published
from quant.convert import find_layers

EXCLUDED = {
    **{name: ["bert.pooler.dense", "classifier"] for name in MODELS if name.startswith("bert")},
    "roberta": ["classifier.dense", "classifier.out_proj"],
    **{name: ["score"] for name in MODELS if name.startswith("gpt2")},
    **{name: ["lm_head"] for name in MODELS if name.startswith("bart")},
}


@pytest.mark.parametrize("name", MODELS)
def test_everything_is_searched_but_what_is_named(name):
    model, _ = published(name)
    kinds = (nn.Linear, nn.Conv2d, Conv1D)
    every = [layer for layer, module in model.named_modules() if isinstance(module, kinds)]
    searched = searched_layers(model, MODELS[name], object())
    assert [layer for layer in every if layer not in searched] == EXCLUDED.get(name, [])
    assert searched == [layer for layer in find_layers(model) if layer in searched]


TORCHVISION = {
    **{f"efficientnet-b{n}": f"efficientnet_b{n}" for n in range(8)},
    "resnet18": "resnet18",
    "resnet50": "resnet50",
    "mobilenetv2": "mobilenet_v2",
    "inceptionv3": "inception_v3",
}


@pytest.mark.parametrize("name", TORCHVISION)
def test_cost_is_that_of_the_same_architecture_in_torchvision(name):
    torchvision = pytest.importorskip("torchvision")
    model, example = published(name)
    options = {"aux_logits": False, "init_weights": True} if name == "inceptionv3" else {}
    with torch.device("meta"):
        other = torchvision.models.get_model(TORCHVISION[name], **options)
    ours, theirs = profile_model(model, example), profile_model(other, example["pixel_values"])
    assert sum(layer.macs for layer in ours) == sum(layer.macs for layer in theirs)
    assert sum(layer.params for layer in ours) == sum(layer.params for layer in theirs)


def test_cifar_resnet_costs_what_its_paper_says():
    assert coverage("resnet20").gbops[0] / 16 == pytest.approx(0.0406, rel=1e-2)


@pytest.mark.parametrize(("name", "gbops"), [("resnet18", (29.03, 116.1, 464.4)), ("resnet50", (65.43, 261.7, 1047))])
def test_image_models_cost_what_fliqs_says_to_a_tenth_of_a_percent(name, gbops):
    assert coverage(name).gbops == pytest.approx(gbops, rel=1e-3)


@pytest.mark.parametrize("name", ["bert-tiny", "roberta", "bart", "gpt2"])
def test_text_models_of_every_family_have_their_row(name):
    row = coverage(name)
    assert row.linear + row.conv2d + row.conv1d == row.searched + len(row.excluded)
    assert 0 < row.gbops[0] == pytest.approx(row.gbops[1] / 4) == pytest.approx(row.gbops[2] / 16)


def test_the_table_has_a_row_for_each_model():
    lines = table([coverage("bert-tiny"), coverage("convnet")]).splitlines()
    assert lines[2] == "| bert-tiny | 14 | 0 | 0 | 12 | bert.pooler.dense, classifier | 0.80531 | 3.2212 | 12.885 |"
    assert len(lines) == 4 and lines[3].startswith("| convnet | 1 | 4 | 0 | 5 | none |")
