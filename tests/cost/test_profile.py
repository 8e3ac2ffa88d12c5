"""Profiles against counts by hand and published figures."""

import pytest
import torch
import torchvision
from torch import nn
from transformers import BertConfig, BertModel, GPT2Config, GPT2LMHeadModel
from transformers.pytorch_utils import Conv1D

from cost.cost import compute_cost
from cost.profile import LayerProfile, attention_macs, profile_model
from quant.convert import find_layers, quantize_model
from quant.formats import FLOAT, parse_format


def bert(layers=2, **config):
    size = {"hidden_size": 32, "num_attention_heads": 4, "intermediate_size": 64, "vocab_size": 50}
    return BertModel(BertConfig(num_hidden_layers=layers, **size, **config))


def test_two_layers_by_hand():
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, stride=2, padding=1, bias=False), nn.ReLU(), nn.Flatten(), nn.Linear(128, 5)
    )
    conv, linear = profile_model(model, torch.zeros(1, 3, 8, 8))
    assert conv == LayerProfile(
        "0", macs=3 * 3 * 3 * 8 * 16, params=216, positions=16, channels=8, kind="conv2d", calls=1
    )
    assert linear == LayerProfile("3", macs=128 * 5, params=640, positions=1, channels=5, kind="linear", calls=1)


@pytest.mark.parametrize(
    ("conv", "macs"),
    [
        (nn.Conv2d(8, 8, 3, groups=8, padding=1), 3 * 3 * 1 * 8 * 100),
        (nn.Conv2d(8, 12, (1, 3), groups=4), 1 * 3 * 2 * 12 * 10 * 8),
        (nn.Conv2d(8, 4, 3, dilation=2, stride=(1, 2), padding="valid"), 3 * 3 * 8 * 4 * 6 * 3),
        (nn.Conv2d(8, 4, 3, padding="same", padding_mode="reflect"), 3 * 3 * 8 * 4 * 100),
    ],
    ids=["depthwise", "grouped", "dilated", "reflect"],
)
def test_convolutions_by_hand(conv, macs):
    (profile,) = profile_model(nn.Sequential(conv), torch.zeros(1, 8, 10, 10))
    assert profile.macs == macs
    assert profile.params == conv.weight.numel()


def test_convolutions_in_one_and_three_dimensions_by_hand():
    (line,) = profile_model(nn.Sequential(nn.Conv1d(4, 6, 3, groups=2)), torch.zeros(1, 4, 10))
    (cube,) = profile_model(nn.Sequential(nn.Conv3d(2, 5, 3)), torch.zeros(1, 2, 4, 4, 4))
    assert (line.kind, line.macs, line.positions) == ("conv1d", 6 * 2 * 3 * 8, 8)
    assert (cube.kind, cube.macs, cube.positions) == ("conv3d", 5 * 2 * 27 * 8, 8)


@pytest.mark.parametrize(("bits", "published"), [(4, 65.43), (8, 261.7), (16, 1047)])
def test_resnet50_published(bits, published):
    with torch.device("meta"):
        model = torchvision.models.resnet50()
        example = torch.zeros(1, 3, 224, 224)
    profiles = profile_model(model, example)
    assert len(profiles) == 54  # with shortcuts and head
    pair = (parse_format(bits),) * 2
    assert compute_cost(profiles, {p.name: pair for p in profiles}) == pytest.approx(published, rel=5e-4)


def test_resnet18_published():
    with torch.device("meta"):
        profiles = profile_model(torchvision.models.resnet18(), torch.zeros(1, 3, 224, 224))
    assert compute_cost(profiles, {p.name: (FLOAT, FLOAT) for p in profiles}) == pytest.approx(464.4, rel=5e-4)


class Reuse(nn.Module):
    """Calls one layer twice, never calls another, and returns nested outputs."""

    def __init__(self):
        super().__init__()
        self.shared = self.again = nn.Linear(4, 4, bias=False)
        self.idle = nn.Linear(4, 2)

    def forward(self, x, *, scale=1):
        return {"out": (self.again(self.shared(x) * scale), [x])}


@pytest.mark.parametrize(
    "example", [torch.zeros(1, 7, 4), (torch.zeros(1, 7, 4),), {"x": torch.zeros(1, 7, 4), "scale": 2}]
)
def test_a_layer_called_twice_counts_twice(example):
    shared, idle = profile_model(Reuse(), example)
    assert (shared.name, shared.calls, shared.positions, shared.macs) == ("shared", 2, 14, 14 * 16)
    assert (idle.calls, idle.positions, idle.macs, idle.params, idle.channels) == (0, 0, 0, 8, 2)


def test_conv1d_is_a_linear_layer():
    (conv1d,) = profile_model(nn.Sequential(Conv1D(6, 4)), torch.zeros(1, 5, 4))
    (linear,) = profile_model(nn.Sequential(nn.Linear(4, 6)), torch.zeros(1, 5, 4))
    assert conv1d == linear


def test_counts_are_per_example():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(64, 2))
    assert profile_model(model, torch.zeros(5, 3, 6, 6)) == profile_model(model, torch.zeros(1, 3, 6, 6))
    text, model = {"input_ids": torch.zeros(3, 7, dtype=torch.long)}, bert()
    one = {"input_ids": torch.zeros(1, 7, dtype=torch.long)}
    assert profile_model(model, text, charge_attention=True) == profile_model(model, one, charge_attention=True)
    assert attention_macs(model, text) == attention_macs(model, one)


def test_positions_that_the_batch_does_not_divide_are_refused():
    class Folded(nn.Sequential):
        def forward(self, x):
            return super().forward(x.reshape(1, -1))

    with pytest.raises(ValueError, match=r"positions of 0 do not divide by the batch of 2"):
        profile_model(Folded(nn.Linear(8, 1)), torch.zeros(2, 4))


def test_names_select_layers_in_model_order():
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2), nn.Linear(2, 2))
    assert [p.name for p in profile_model(model, torch.zeros(1, 2), names=["2", "0"])] == ["0", "2"]
    assert profile_model(model, torch.zeros(1, 2), names=[]) == []
    with pytest.raises(ValueError, match="not quantizable layers of Sequential: 3"):
        profile_model(model, torch.zeros(1, 2), names=["3"])


def test_the_model_is_left_as_it_was():
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Dropout()).train()
    model[1].eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    profile_model(model, torch.randn(1, 4), charge_attention=True)
    assert [module.training for module in model.modules()] == [True, True, False, True]
    assert not any(module._forward_hooks for module in model.modules())
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)


def test_the_model_is_left_as_it_was_after_an_error():
    model = nn.Sequential(nn.Linear(4, 4))
    with pytest.raises(RuntimeError):
        profile_model(model, torch.zeros(1, 5))
    assert model.training
    assert not model[0]._forward_hooks


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_every_layer_of_transformers_is_counted(device):
    with torch.device(device):
        ids = {"input_ids": torch.zeros(1, 6, dtype=torch.long)}
        gpt2 = GPT2LMHeadModel(
            GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=50, bos_token_id=0, eos_token_id=0)
        )
        for model in (bert(), gpt2):
            profiles = profile_model(model, ids)
            assert [p.name for p in profiles] == list(find_layers(model))
            assert all(p.macs == p.params * p.positions and p.calls == 1 for p in profiles)
            assert {p.positions for p in profiles} <= {1, 6}


def test_the_encoder_fast_path_does_not_hide_layers():
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    profiles = profile_model(nn.TransformerEncoder(layer, 1), torch.zeros(1, 5, 8))
    assert profiles and all(p.positions == 5 for p in profiles)


def test_a_quantized_model_has_the_same_profile():
    ids = {"input_ids": torch.zeros(1, 6, dtype=torch.long)}
    model = bert()
    before = profile_model(model, ids, charge_attention=True)
    quantize_model(model)
    assert profile_model(model, ids, charge_attention=True) == before


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_attention_by_hand(device, implementation):
    with torch.device(device):
        model = bert(attn_implementation=implementation)
        ids = {"input_ids": torch.zeros(1, 6, dtype=torch.long)}
        assert attention_macs(model, ids) == 2 * (2 * 6 * 6 * 32)  # 2 layers of Q K^T and A V over all heads
        assert attention_macs(nn.Sequential(nn.Linear(4, 4)), torch.zeros(1, 3, 4)) == 0


def test_attention_of_torchs_own_layer_is_counted():
    vit = torchvision.models.VisionTransformer(32, 8, 2, 2, 16, 32, num_classes=4)
    assert attention_macs(vit, torch.randn(1, 3, 32, 32)) == 2 * (2 * 17 * 17 * 16)  # 16 patches and the class token
    assert attention_macs(nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 1),
                          torch.zeros(1, 5, 8)) == 2 * 5 * 5 * 8  # fmt: skip


def test_grouped_query_attention_counts_every_query_head():
    class Attention(nn.Module):
        def forward(self, q, k):
            return nn.functional.scaled_dot_product_attention(q, k, k, is_causal=True, enable_gqa=True)

    assert attention_macs(Attention(), (torch.zeros(1, 8, 5, 4), torch.zeros(1, 2, 5, 4))) == 2 * 8 * 5 * 5 * 4


def test_attention_is_charged_to_the_layers_around_it():
    model, ids = bert(), {"input_ids": torch.zeros(1, 6, dtype=torch.long)}
    profiles = {p.name: p for p in profile_model(model, ids, charge_attention=True)}
    assert sum(p.attention for p in profiles.values()) == attention_macs(model, ids)
    charged = [name for name, p in profiles.items() if p.attention]
    assert charged == [f"encoder.layer.{i}.attention.self.{name}" for i in (0, 1) for name in ("query", "key", "value")]
    assert {profiles[name].attention for name in charged} == {2 * 6 * 6 * 32 // 3}
    assert not any(p.attention for p in profile_model(model, ids))


def test_attention_among_fewer_layers_keeps_its_total():
    model, ids = bert(), {"input_ids": torch.zeros(1, 5, dtype=torch.long)}
    names = ["encoder.layer.0.output.dense", "encoder.layer.1.attention.self.key", "pooler.dense"]
    first, second, pooler = profile_model(model, ids, names=names, charge_attention=True)
    # Layer 0's own block holds the output layer; layer 1's attention holds the key layer; the pooler is in neither.
    assert first.attention == second.attention == 2 * 5 * 5 * 32
    assert pooler.attention == 0
    (alone,) = profile_model(model, ids, names=["pooler.dense"], charge_attention=True)
    assert alone.attention == attention_macs(model, ids)
