"""Models by name: their architecture, their weights, and errors."""

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from torch.utils.data import DataLoader

from eval.data.loading import load_task, prepare
from eval.models import build_model, check_model
from eval.transformer_utils import MODELS, train_tokenizer
from quant.errors import UserError

SHARED = Path(__file__).parents[4] / "shared"
TEXTS = [
    f"the {who} {what} over {number} fences"
    for who in ("cat", "dog")
    for what in ("jumps", "looks")
    for number in range(50)
]


def config(task, model=None, **flags):
    return SimpleNamespace(task=task, model=model, **{"seed": 0, **flags})


@pytest.mark.skipif(
    not (SHARED / "models/resnet20-cifar10").exists(), reason="../shared/models/resnet20-cifar10 is absent"
)
def test_resnet20_has_its_published_accuracy():
    run = config(
        "cifar10", "resnet20", data_dir=SHARED / "data/cifar10", model_path=SHARED / "models/resnet20-cifar10",
        max_train_samples=8,
    )  # fmt: skip
    data = load_task(run)
    bundle = build_model(run, data.num_labels)
    prepared = prepare(data, bundle, run)
    bundle.model.eval()
    with torch.no_grad():
        loader = DataLoader(prepared.validation["validation"], 128, collate_fn=prepared.data_collator)
        right = sum((bundle.model(**batch).logits.argmax(-1) == batch["labels"]).sum().item() for batch in loader)
    assert right == 932


@pytest.mark.parametrize("depth", [20, 32, 44, 56])
def test_cifar_resnets_have_their_published_size(depth):
    model = build_model(config("cifar10", f"resnet{depth}"), 10).model
    # He et al. 2015, table 6, in millions: 0.27, 0.46, 0.66, 0.85
    parameters = sum(p.numel() for p in model.parameters())
    assert round(parameters / 1e6, 2) == {20: 0.27, 32: 0.46, 44: 0.66, 56: 0.85}[depth]
    assert len([m for m in model.modules() if isinstance(m, torch.nn.Conv2d | torch.nn.Linear)]) == depth


def test_convnet_learns_digits():
    run = config("digits", "convnet")
    data = load_task(run)
    bundle = build_model(run, data.num_labels)
    prepared = prepare(data, bundle, run)
    optimizer = torch.optim.AdamW(bundle.model.parameters(), lr=3e-3)
    generator = torch.Generator().manual_seed(0)
    for _ in range(4):
        for batch in DataLoader(
            prepared.train, 32, shuffle=True, generator=generator, collate_fn=prepared.data_collator
        ):
            optimizer.zero_grad()
            bundle.model(**batch).loss.backward()
            optimizer.step()
    bundle.model.eval()
    (batch,) = DataLoader(prepared.validation["validation"], 360, collate_fn=prepared.data_collator)
    assert (bundle.model(**batch).logits.argmax(-1) == batch["labels"]).float().mean() > 0.97


def test_weights_follow_the_seed_and_not_the_global_state():
    first = build_model(config("digits", "convnet"), 10).model
    torch.rand(3)
    same, other = (build_model(config("digits", "convnet", seed=seed), 10).model for seed in (0, 1))
    assert torch.equal(first.linear.weight, same.linear.weight)
    assert not torch.equal(first.linear.weight, other.linear.weight)


def test_a_head_is_resized_and_said_so_but_a_body_is_not(tmp_path):
    from safetensors.torch import save_file

    model = build_model(config("cifar10", "resnet20"), 10).model
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    bundle = build_model(config("cifar10", "resnet20", model_path=tmp_path), 7)
    assert bundle.notes == ["head linear resized to 7 classes"]
    torch.testing.assert_close(bundle.model.conv1.weight, model.conv1.weight, rtol=0, atol=0)
    with pytest.raises(UserError, match=r"has no layer1.3.conv1.weight"):
        build_model(config("cifar10", "resnet32", model_path=tmp_path), 10)
    tensors = {**model.state_dict(), "conv1.weight": model.conv1.weight[:, :1].clone()}
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match=r"has another shape of conv1.weight"):
        build_model(config("cifar10", "resnet20", model_path=tmp_path), 10)


def test_bert_from_scratch_scores_the_same_whatever_the_padding():
    bundle = build_model(config("mrpc", "bert-tiny", from_scratch=True), 2, TEXTS)
    model = bundle.model.eval()
    assert (model.config.num_hidden_layers, model.config.hidden_size) == (2, 128)
    assert model.config.vocab_size == len(bundle.tokenizer) <= 8192
    short = bundle.tokenizer(["the cat"], ["looks over"], return_tensors="pt")
    padded = bundle.tokenizer(["the cat"], ["looks over"], return_tensors="pt", padding="max_length", max_length=24)
    torch.testing.assert_close(model(**short).logits, model(**padded).logits, rtol=1e-4, atol=1e-6)


def test_a_tokenizer_depends_on_its_texts_alone():
    first, second = (train_tokenizer(iter(TEXTS), 120, token_types=True) for _ in range(2))
    assert first.get_vocab() == second.get_vocab() and len(first) <= 120
    pair = first("the cat", "looks over")
    assert pair["token_type_ids"] == sorted(pair["token_type_ids"]) and set(pair["token_type_ids"]) == {0, 1}
    assert first.decode(first("the cat looks")["input_ids"], skip_special_tokens=True) == "the cat looks"


@pytest.mark.parametrize("name, positions", [("bert-tiny", 512), ("roberta", 514 - 1), ("gpt2", 1024)])
def test_texts_are_no_longer_than_the_model_has_positions(name, positions, tmp_path):
    known = MODELS[name]
    small = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}
    small = {"n_embd": 32, "n_layer": 1, "n_head": 2} if name == "gpt2" else small
    getattr(transformers, known.config)(**{**known.settings, **small}).save_pretrained(tmp_path)
    bundle = build_model(config("mrpc", str(tmp_path), from_scratch=True), 2, TEXTS)
    assert bundle.max_length == bundle.tokenizer.model_max_length == positions
    tokens = torch.full((1, positions), bundle.tokenizer.pad_token_id + 1)
    bundle.model(input_ids=tokens)  # would index past the last position otherwise
    with pytest.raises((IndexError, RuntimeError)):
        bundle.model(input_ids=torch.cat([tokens, tokens[:, :1]], dim=1))


def test_a_saved_encoder_without_a_head_gets_one(tmp_path):
    bundle = build_model(config("mrpc", "bert-tiny", from_scratch=True), 2, TEXTS)
    bundle.model.bert.save_pretrained(tmp_path)
    bundle.tokenizer.save_pretrained(tmp_path)
    loaded = build_model(config("mrpc", "bert", model_path=tmp_path), 3)
    assert loaded.model.classifier.out_features == 3 and "classifier is new" in loaded.notes[0]
    query = "encoder.layer.1.attention.self.query.weight"
    torch.testing.assert_close(loaded.model.bert.get_parameter(query), bundle.model.bert.get_parameter(query))


@pytest.mark.parametrize(
    "task, flags, message",
    [
        ("cifar10", {"model": "resnet20", "model_path": "/nowhere"}, "--model_path /nowhere: no such"),
        ("mrpc", {"model": "bert", "model_path": "/nowhere"}, "--model_path /nowhere: no such"),
        ("mrpc", {"model": "bert"}, "--data_dir DIR .*--model_path DIR"),
        ("mrpc", {"model": "resnet20"}, "--model resnet20: takes images, but --task mrpc does not"),
        ("mrpc", {"model": "brt"}, "--model brt: no such model or folder; choose one of bert-tiny"),
    ],
)  # fmt: skip
def test_what_cannot_be_had_is_said_in_one_line(task, flags, message, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(UserError, match=message) as error:
        build_model(config(task, **flags), 2)
    assert "\n" not in str(error.value)


def test_known_names_pass():
    for model, task in (("bert", "mrpc"), ("resnet18", "cifar10"), ("gpt2", "lm"), ("timm:vit_tiny", "cifar10")):
        check_model(model, task)


PROCESSORS = {
    "resnet": transformers.ConvNextImageProcessor(
        size={"shortest_edge": 64}, crop_pct=0.875, image_mean=[0.5, 0.4, 0.3], image_std=[0.2, 0.3, 0.4]
    ),
    "vit": transformers.ViTImageProcessor(size={"height": 64, "width": 64}),
    "mobilenet": transformers.MobileNetV2ImageProcessor(
        size={"shortest_edge": 72}, crop_size={"height": 64, "width": 64}
    ),
    "efficientnet": transformers.EfficientNetImageProcessor(
        size={"height": 64, "width": 64}, image_std=[0.47, 0.48, 0.49]
    ),
    "efficientnet-offset": transformers.EfficientNetImageProcessor(
        size={"height": 64, "width": 64}, rescale_factor=1 / 127.5, rescale_offset=True, include_top=False
    ),
}


@pytest.mark.parametrize("name", PROCESSORS)
def test_images_are_what_the_models_own_processor_makes_of_them(name, tmp_path):
    """Our preprocessing of a smooth image equals that of the image processor saved with the model."""
    model = transformers.ResNetForImageClassification(
        transformers.ResNetConfig(embedding_size=8, hidden_sizes=[8], depths=[1], layer_type="basic")
    )
    model.save_pretrained(tmp_path / "model")
    PROCESSORS[name].save_pretrained(tmp_path / "model")
    ramp = np.linspace(0, 255, 160, dtype=np.float32)
    pixels = np.stack([np.add.outer(ramp, ramp) / 2, np.add.outer(ramp[::-1], ramp) / 2, np.full((160, 160), 77.0)], -1)
    for split, label in (("train", "a"), ("train", "b"), ("val", "a"), ("val", "b")):
        (tmp_path / "data" / split / label).mkdir(parents=True)
        Image.fromarray(pixels.astype(np.uint8)).save(tmp_path / "data" / split / label / "x.png")
    run = config(str(tmp_path / "data"), model_path=tmp_path / "model")
    data = load_task(run)
    bundle = build_model(run, data.num_labels)
    ours = prepare(data, bundle, run).validation["validation"][0]["pixel_values"]
    theirs = PROCESSORS[name](Image.fromarray(pixels.astype(np.uint8)), return_tensors="pt")["pixel_values"][0]
    # One grey level is 1 / 255 / std; libraries differ by one or two levels in resampling.
    assert ours.shape == theirs.shape == (3, 64, 64)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=2.5 / 255 / min(bundle.std))
