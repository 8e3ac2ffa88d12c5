"""Unfolded attention and experts: same outputs, gradients and state dicts, with a layer for every matrix."""

import copy
import pickle
from itertools import product

import pytest
import torch
from torch import nn
from transformers import (
    GptOssConfig,
    GptOssForCausalLM,
    MixtralConfig,
    MixtralForSequenceClassification,
    NemotronHConfig,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)
from transformers.models.nemotron_h.modeling_nemotron_h import NemotronHExperts

from cost.cost import overhead_memory
from cost.profile import profile_model
from quant.convert import (
    calibrate,
    describe_quantizers,
    find_layers,
    quantize_as_described,
    quantize_model,
    set_formats,
)
from quant.export.packed import packed_sizes, read_packed, restore, write_packed
from quant.formats import parse_format
from quant.quantizers.quantizer import QuantizerConfig
from quant.transforms.unfold import UnfoldedAttention, UnfoldedExperts, unfold

INT4, INT8 = parse_format("int4"), parse_format("int8")
SIZES = {"vocab_size": 50, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "pad_token_id": 0}
SIZES |= {"num_key_value_heads": 2, "head_dim": 8, "num_experts_per_tok": 2}


def mixtral():
    config = MixtralConfig(**SIZES, intermediate_size=24, num_local_experts=4, num_labels=3)
    return initialised(MixtralForSequenceClassification(config))


def qwen():
    config = Qwen3MoeConfig(**SIZES, intermediate_size=24, moe_intermediate_size=12, num_experts=4)
    return initialised(Qwen3MoeForCausalLM(config))


def gpt_oss():
    """Matrices are (in, out), with biases, and gate and up projections alternate."""
    return initialised(GptOssForCausalLM(GptOssConfig(**SIZES, intermediate_size=12, num_local_experts=4)))


def initialised(model):
    """Initialise with weights large enough to matter."""
    torch.manual_seed(0)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.2)
    return model.eval()


EXPERTS = pytest.mark.parametrize("build", [mixtral, qwen, gpt_oss])
IDS = torch.arange(1, 15).view(2, 7)


def logits(model, ids=IDS):
    return model(input_ids=ids).logits


# ------------------------------------------------------ attention

OPTIONS = [
    {},
    {"bias": False},
    {"add_bias_kv": True, "add_zero_attn": True},
    {"kdim": 6, "vdim": 10},
    {"batch_first": True},
    {"batch_first": True, "kdim": 6, "vdim": 10, "bias": False},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("masks", ["none", "bool", "float", "heads"])
def test_attention_taken_apart_computes_the_same(options, masks):
    torch.manual_seed(0)
    whole = nn.MultiheadAttention(8, 2, **options).eval()
    for parameter in whole.parameters():
        nn.init.normal_(parameter)
    apart = unfold(copy.deepcopy(whole))
    for batched, need_weights, average, causal in product((True, False), repeat=4):
        rows, keys = 3, 5
        query = torch.randn(rows, 5, 8)
        key, value = (torch.randn(rows, keys, options.get(size, 8)) for size in ("kdim", "vdim"))
        mask, padding = None, None
        if masks != "none":
            mask = torch.ones(5, keys, dtype=torch.bool).triu(1)
            padding = torch.zeros(rows, keys, dtype=torch.bool)
            padding[:, 4:] = True
        if masks == "float":
            mask = torch.zeros(5, keys).masked_fill(mask, float("-inf"))
            padding = torch.randn(rows, keys)
        if masks == "heads":
            mask, padding = mask.expand(2 * (rows if batched else 1), 5, keys), None
        if not batched:
            query, key, value, padding = (None if x is None else x[0] for x in (query, key, value, padding))
        elif not options.get("batch_first"):
            query, key, value = (x.transpose(0, 1) for x in (query, key, value))
        settings = {"key_padding_mask": padding, "need_weights": need_weights, "average_attn_weights": average}
        settings |= {"attn_mask": mask, "is_causal": causal and mask is not None}
        expected, expected_weights = whole(query, key, value, **settings)
        output, weights = apart(query, key, value, **settings)
        torch.testing.assert_close(output, expected, atol=1e-5, rtol=1e-5)
        if need_weights:
            torch.testing.assert_close(weights, expected_weights)
        else:
            assert weights is None


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_attention_saves_and_loads_under_its_own_names(options):
    whole = nn.MultiheadAttention(8, 2, **options)
    apart = unfold(copy.deepcopy(whole))
    saved = apart.state_dict()
    assert saved.keys() == whole.state_dict().keys()
    assert all(torch.equal(value, saved[name]) for name, value in whole.state_dict().items())
    nn.MultiheadAttention(8, 2, **options).load_state_dict(saved)
    other = unfold(nn.MultiheadAttention(8, 2, **options))
    other.load_state_dict(whole.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(other.parameters(), apart.parameters(), strict=True))
    assert sum(p.numel() for p in apart.parameters()) == sum(p.numel() for p in whole.parameters())


def test_attention_is_quantized_whole_in_training_and_evaluation():
    torch.manual_seed(0)
    torch.backends.mha.set_fastpath_enabled(True)
    layer = nn.TransformerDecoderLayer(8, 2, 16, dropout=0, batch_first=True)
    x, memory = torch.randn(2, 5, 8), torch.randn(2, 3, 8)
    expected = copy.deepcopy(layer).eval()(x, memory)
    model = nn.ModuleList([layer])
    modules = quantize_model(model, formats=[INT4, INT8])
    parts = ("q_proj", "k_proj", "v_proj", "out_proj")
    names = {f"0.{attention}.{part}" for attention in ("self_attn", "multihead_attn") for part in parts}
    assert modules.keys() == names | {"0.linear1", "0.linear2"}
    torch.testing.assert_close(layer.eval()(x, memory), expected, atol=1e-6, rtol=1e-5)
    for name in names:
        layer.train()
        set_formats(modules, {name: (INT4, INT4)})
        layer(x, memory).sum().backward()
        assert modules[name].weight_quantizer.grids["int4"].scale.grad is not None
        with torch.no_grad():
            assert not torch.allclose(layer.eval()(x, memory), expected, atol=1e-3)
        set_formats(modules, {name: (parse_format("float"), parse_format("float"))})


def test_attention_costs_what_its_projections_cost():
    model = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 1)
    profiles = {profile.name: profile for profile in profile_model(model, torch.randn(2, 5, 8))}
    for part in ("q_proj", "k_proj", "v_proj", "out_proj"):
        assert profiles[f"layers.0.self_attn.{part}"].macs == 64 * 5
    assert list(quantize_model(model)) == list(profiles)


def test_attention_keeps_what_is_frozen_shared_or_not_its_own():
    whole = nn.MultiheadAttention(8, 2)
    whole.in_proj_weight.requires_grad_(False)
    other = nn.MultiheadAttention(8, 2)
    other.in_proj_weight = whole.in_proj_weight
    model = unfold(nn.ModuleDict({"a": whole, "b": other, "again": whole}))
    assert model["a"] is model["again"] and isinstance(model["a"], UnfoldedAttention)
    assert model["a"].k_proj.weight is model["b"].k_proj.weight and not model["a"].k_proj.weight.requires_grad
    assert model["a"].k_proj.bias is not model["b"].k_proj.bias and model["a"].k_proj.bias.requires_grad

    class Own(nn.MultiheadAttention):
        def forward(self, x):
            return super().forward(x, x, x)[0]

    own = nn.ModuleDict({"own": Own(8, 2), "head": nn.Linear(8, 2)})
    assert list(quantize_model(own)) == ["head"] and type(own["own"]) is Own


# ------------------------------------------------------ experts


@EXPERTS
def test_experts_taken_apart_compute_and_learn_the_same(build):
    whole = build()
    apart = unfold(copy.deepcopy(whole))
    layers = find_layers(apart)
    assert sum(name.endswith(("experts.gate_up_proj", "experts.down_proj")) for name in layers) == 4
    torch.testing.assert_close(logits(apart), logits(whole), atol=1e-5, rtol=1e-5)
    for model in (whole, apart):
        logits(model).square().sum().backward()
    expected = dict(whole.named_parameters())
    for name, layer in layers.items():
        if "experts" in name:
            torch.testing.assert_close(layer.weight.grad, expected[name].grad, atol=1e-3, rtol=1e-4)
            if layer.bias is not None:
                torch.testing.assert_close(layer.bias.grad, expected[f"{name}_bias"].grad, atol=1e-3, rtol=1e-4)
    torch.testing.assert_close(apart.get_input_embeddings().weight.grad, whole.get_input_embeddings().weight.grad)


@EXPERTS
def test_experts_save_and_load_under_their_own_names(build):
    whole = build()
    apart = unfold(copy.deepcopy(whole))
    saved = apart.state_dict()
    assert saved.keys() == whole.state_dict().keys()
    for parameter in whole.parameters():
        nn.init.zeros_(parameter)
    whole.load_state_dict(saved)
    again = unfold(build())
    again.load_state_dict(saved)
    assert torch.equal(logits(again), logits(apart))
    copied = pickle.loads(pickle.dumps(apart))
    assert torch.equal(logits(copied), logits(apart)) and torch.equal(logits(copy.deepcopy(apart)), logits(apart))


def test_experts_without_a_gate():
    config = NemotronHConfig(hidden_size=8, n_routed_experts=3, moe_intermediate_size=6, moe_latent_size=None)
    config._experts_implementation = "eager"
    whole = initialised(NemotronHExperts(config))
    apart = unfold(copy.deepcopy(whole))
    rows, chosen, weights = torch.randn(4, 8), torch.tensor([[0, 1], [2, 1], [1, 0], [0, 1]]), torch.rand(4, 2)
    assert isinstance(apart, UnfoldedExperts) and list(find_layers(apart)) == ["up_proj", "down_proj"]
    torch.testing.assert_close(apart(rows, chosen, weights), whole(rows, chosen, weights))


@EXPERTS
@pytest.mark.parametrize("format", ["int4", "e2m1", "mxfp4", "nvfp4"])
def test_each_expert_is_rounded_as_a_layer_of_its_own_would_be(build, format):
    model, chosen = build(), parse_format(format)
    weight = QuantizerConfig(granularity="channel", observer="mse")
    modules = quantize_model(model, formats=[chosen], weight=weight, activation=QuantizerConfig("dynamic"))
    name = next(name for name in modules if name.endswith("experts.down_proj"))
    layer = modules[name]
    calibrate(model, modules, [{"input_ids": IDS}])
    set_formats(modules, {name: (chosen, parse_format("float"))})
    rounded = layer.weight_quantizer(layer.weight)
    if chosen.name == "nvfp4":  # its outer scale is one for a tensor, and each expert's alone would have its own
        assert (rounded - layer.weight).abs().max() < layer.weight.abs().max() / 4
        return
    for expert, matrix in enumerate(layer.weight):
        alone = nn.Linear(*(matrix.shape if layer.transposed else matrix.shape[::-1]), bias=False)
        alone.weight = nn.Parameter((matrix.t() if layer.transposed else matrix).detach().clone())
        single = quantize_model(nn.Sequential(alone), formats=[chosen], weight=weight)["0"]
        single.weight_quantizer.observe(single.weight)
        single.weight_quantizer.finish_calibration()
        single.set_formats(chosen, parse_format("float"))
        own = single.weight_quantizer(single.weight)
        torch.testing.assert_close(rounded[expert], own.t() if layer.transposed else own)


@EXPERTS
def test_quantized_experts_train_their_weights_and_scales(build):
    model = build()
    modules = quantize_model(model, formats=[INT4])
    calibrate(model, modules, [{"input_ids": IDS}])
    before = logits(model)
    experts = {name: (INT4, INT4) for name in modules if "experts" in name}
    set_formats(modules, experts)
    after = logits(model)
    assert not torch.allclose(after, before, atol=1e-4)
    after.square().sum().backward()
    for name in experts:
        layer = modules[name]
        assert layer.weight.grad.abs().sum() > 0
        for quantizer in (layer.weight_quantizer, layer.input_quantizer):
            assert quantizer.grids["int4"].scale.grad.abs().sum() > 0


def test_experts_are_charged_for_the_tokens_sent_to_them():
    model = mixtral()
    profiles = profile_model(model, {"input_ids": IDS}, charge_attention=True)
    named = {profile.name: profile for profile in profiles}
    into, out_of = (named[f"model.layers.0.mlp.experts.{name}"] for name in ("gate_up_proj", "down_proj"))
    assert into.params == 4 * 48 * 16 and into.macs == 48 * 16 * 7 * 2  # 7 tokens, each to 2 experts
    assert out_of.params == 4 * 16 * 24 and out_of.macs == 16 * 24 * 7 * 2
    assert into.kind == "experts" and into.channels == 4 * 48
    modules = quantize_model(model, formats=[INT8])
    assert profile_model(model, {"input_ids": IDS}, charge_attention=True) == profiles
    assert modules[into.name].weight_quantizer.grids["int8"].scale.numel() == into.channels
    assert overhead_memory([into], {into.name: (INT8, INT8)}) * 2**20 == 4 * into.channels + 4 + 1
    with torch.device("meta"):
        empty = MixtralForSequenceClassification(model.config)
        shapes = profile_model(empty, {"input_ids": torch.ones(1, 7, dtype=torch.long)}, list(modules))
    assert [(p.name, p.macs) for p in shapes] == [(p.name, p.macs) for p in profiles]


@EXPERTS
def test_a_packed_file_holds_every_expert_in_its_format(build, tmp_path):
    model = build()
    modules = quantize_model(model, formats=[INT4, INT8])
    calibrate(model, modules, [{"input_ids": IDS}])
    formats = (INT4, parse_format("mxfp4"), parse_format("nvfp4"), parse_format("e4m3"))
    for format in formats:
        for module in modules.values():
            module.input_quantizer.prepare(INT8)
        set_formats(modules, {name: (format if "experts" in name else INT8, INT8) for name in modules})
        calibrate(model, modules, [{"input_ids": IDS}])
        expected = logits(model)
        path = tmp_path / f"{format}.safetensors"
        write_packed(path, model, modules)
        assert not any(name.endswith(("_proj.weight", "experts.gate_up_proj")) for name in read_packed(path)[1])
        again = build()
        restore(again, *read_packed(path))
        assert torch.equal(logits(again), expected), format
    held = sum(m.weight.numel() * (4 if "experts" in n else 8) // 8 for n, m in modules.items())
    assert packed_sizes(tmp_path / f"{INT4}.safetensors")["codes"] == held


@EXPERTS
def test_a_quantized_state_dict_goes_back_into_a_fresh_model(build):
    model = build()
    modules = quantize_model(model, formats=[INT4])
    calibrate(model, modules, [{"input_ids": IDS}])
    set_formats(modules, dict.fromkeys(modules, (INT4, INT4)))
    again = build()
    made = quantize_as_described(again, list(modules), describe_quantizers(modules))
    again.load_state_dict(model.state_dict())
    set_formats(made, dict.fromkeys(made, (INT4, INT4)))
    assert torch.equal(logits(again), logits(model))


def test_rows_of_no_expert_are_zero():
    layer = unfold(mixtral()).model.layers[0].mlp.experts.down_proj
    rows, experts = torch.randn(3, 24), torch.tensor([4, 1, 4])
    output = layer(rows, experts)
    assert not output[0].any() and not output[2].any()
    torch.testing.assert_close(output[1], layer.weight[1] @ rows[1])
