"""Tensors quantized besides layers: which ones, in whose format, without padding, and after saving the model."""

import copy

import pytest
import torch
import torchvision
import transformers
from torch import nn

from quant.convert import calibrate, in_float, quantize_model, set_formats
from quant.errors import UserError
from quant.formats import FLOAT, IntFormat
from quant.quantizers.prefix_cache import prefix_cached
from quant.quantizers.quantizer import QuantizerConfig
from quant.transforms.graph import find_groups
from quant.transforms.migration import gamma_migration
from quant.transforms.placement import HIGH_PRECISION_OPS, Placement, attach_quantizers, place_quantizers, placed_sites

INT8 = IntFormat(8)
ACTIVATION = QuantizerConfig(range="calibrated", observer="minmax", symmetric=False, ignore_padding=True)
WEIGHT = QuantizerConfig(range="calibrated", granularity="channel", observer="minmax")
ALL = Placement(HIGH_PRECISION_OPS, residual_adds=True, products=True, embeddings=True)
SMALL = {"vocab_size": 50, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}


def bert(attention="sdpa"):
    torch.manual_seed(0)
    config = transformers.BertConfig(**SMALL, attn_implementation=attention, num_labels=2)
    return transformers.BertForSequenceClassification(config).eval()


def text(pad=0):
    ids = torch.arange(5, 5 + 24).view(3, 8)
    mask = torch.ones_like(ids)
    mask[0, 5:] = 0
    return {"input_ids": ids.masked_fill(mask == 0, pad), "attention_mask": mask}


def quantized(model, placement=ALL, batch=None):
    batch = text() if batch is None else batch
    modules = quantize_model(model, exclude=["*classifier", "*pooler*"], formats=[INT8], weight=WEIGHT,
                             activation=ACTIVATION)  # fmt: skip
    place_quantizers(model, modules, batch, placement)
    calibrate(model, modules, [batch])
    return modules


def run(model, batch=None):
    with torch.no_grad():
        return model(**(text() if batch is None else batch)).logits


def test_sites_of_an_encoder():
    model = bert()
    quantized(model)
    block = "bert.encoder.layer.0"
    found = placed_sites(model)
    owners = {site.replace("/", ".").replace(block, "~"): layer.replace(block, "~") for site, layer in found.items()}
    assert set(owners) == {
        *(f"bert.embeddings.{kind}_embeddings:embedding:table" for kind in ("word", "position", "token_type")),
        *(f"bert.embeddings.LayerNorm:layernorm:{side}" for side in ("in", "out")),
        *(f"~.attention.self:attention1:{part}" for part in ("query", "key", "value", "scores", "probabilities")),
        *(f"~.attention.output:add1:{side}" for side in ("left", "right")),
        *(f"~.attention.output.LayerNorm:layernorm:{side}" for side in ("in", "out")),
        *(f"~.intermediate.intermediate_act_fn:gelu:{side}" for side in ("in", "out")),
        *(f"~.output:add1:{side}" for side in ("left", "right")),
        *(f"~.output.LayerNorm:layernorm:{side}" for side in ("in", "out")),
    }  # fmt: skip
    assert owners["~.intermediate.intermediate_act_fn:gelu:in"] == "~.intermediate.dense"
    assert owners["~.attention.self:attention1:scores"] == "~.attention.self.value"
    assert owners["bert.embeddings.word_embeddings:embedding:table"] == "~.attention.self.query"


def test_each_choice_alone():
    for choice, kind in (
        ({"high_precision_ops": ("gelu",)}, "gelu"),
        ({"residual_adds": True}, "add1"),
        ({"products": True}, "attention1"),
        ({"embeddings": True}, "embedding"),
    ):
        model = bert()
        quantized(model, Placement(**choice))
        assert {site.split(":")[1] for site in placed_sites(model)} == {kind}


def test_layers_in_float_take_their_surroundings_with_them():
    model, plain = bert(), run(bert())
    modules = quantized(model)
    assert torch.equal(run(model), plain)
    set_formats(modules, dict.fromkeys(modules, (INT8, INT8)))
    rounded = run(model)
    assert 0 < (rounded - plain).abs().max() < 0.05 * plain.abs().max() + 0.05
    with in_float(modules):
        assert torch.equal(run(model), plain)


def test_every_site_rounds():
    model = bert()
    modules = quantized(model)
    set_formats(modules, dict.fromkeys(modules, (INT8, INT8)))
    seen = {}
    for module in modules.values():
        for name, quantizer in getattr(module, "placed", {}).items():
            quantizer.register_forward_hook(lambda q, args, output, name=name: seen.update({name: (args[0], output)}))
    run(model)
    assert set(seen) == {f"{site}_quantizer" for site in placed_sites(model)}
    for name, (before, after) in seen.items():
        if ":add1:" not in name:  # what an addition reads may stand on a norm's grid already
            assert not torch.equal(before, after), name
        if "table" not in name:
            assert len(after.unique()) <= 256


def test_explicit_attention_is_the_librarys():
    """Eager attention calls other functions but computes the same, so it is rounded at the same sites."""
    results = []
    for attention in ("sdpa", "eager"):
        model = bert(attention)
        modules = quantized(model, Placement(("softmax",), products=True))
        set_formats(modules, dict.fromkeys(modules, (INT8, INT8)))
        assert len(placed_sites(model)) >= 5
        results.append(run(model))
    torch.testing.assert_close(*results, rtol=0, atol=1e-4)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_padding_is_left_out_of_every_range(attention):
    scales = []
    for pad in (0, 40):
        model = bert(attention)
        quantized(model, batch=text(pad))
        scales.append({k: v for k, v in model.state_dict().items() if "quantizer" in k and k.endswith(".scale")})
    assert len(scales[0]) > 20
    for name, scale in scales[0].items():
        assert torch.equal(scale, scales[1][name]), name


def test_a_migrated_shortcut_adds_what_is_quantized():
    model = bert()
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.LayerNorm):
                module.weight.uniform_(0.5, 4.0)
    plain = run(model)
    gamma_migration(model, find_groups(model, text()))
    modules = quantized(model, Placement(residual_adds=True))
    norm = model.bert.encoder.layer[0].output.LayerNorm
    shortcut, seen = norm.shortcut, {}
    shortcut.register_forward_pre_hook(lambda module, args: seen.update(latest=module.latest))
    set_formats(modules, dict.fromkeys(modules, (INT8, INT8)))
    assert (run(model) - plain).abs().max() < 0.05 * plain.abs().max() + 0.05
    assert len(seen["latest"].unique()) <= 256  # as many values as int8 has


def pre_norm(name):
    torch.manual_seed(0)
    if name == "gpt2":
        return transformers.GPT2LMHeadModel(
            transformers.GPT2Config(vocab_size=50, n_embd=16, n_layer=1, n_head=2)
        ).eval()
    return transformers.OPTForCausalLM(transformers.OPTConfig(**SMALL, ffn_dim=32, word_embed_proj_dim=16)).eval()


@pytest.mark.parametrize(("name", "gelus"), [("gpt2", 2), ("opt", 0)])
def test_pre_norm_models(name, gelus):
    """OPT adds its second residual on a matrix of all tokens."""
    model = pre_norm(name)
    modules = quantize_model(model, exclude=["lm_head"], formats=[INT8], weight=WEIGHT, activation=ACTIVATION)
    sites = place_quantizers(model, modules, text(), ALL)
    adds = [site for site in sites if ":add" in site]
    assert len(adds) == 4, adds  # two residual sums, of two inputs each: that of words and positions is none
    assert sum(":gelu:" in site for site in sites) == gelus
    calibrate(model, modules, [text()])
    set_formats(modules, dict.fromkeys(modules, (INT8, INT8)))
    assert run(model).isfinite().all()


def test_saved_sites_and_copies():
    model = bert()
    modules = quantized(model)
    set_formats(modules, dict.fromkeys(modules, (INT8, INT8)))
    expected = run(model)
    assert torch.equal(run(copy.deepcopy(model)), expected)
    again = bert()
    fresh = quantize_model(again, include=list(modules), formats=[INT8], weight=WEIGHT, activation=ACTIVATION)
    attach_quantizers(again, fresh, placed_sites(model))
    set_formats(fresh, dict.fromkeys(fresh, (INT8, INT8)))
    again.load_state_dict(model.state_dict())
    assert torch.equal(run(again), expected)


def test_learned_scales_get_gradients():
    model = bert()
    modules = quantize_model(model, exclude=["*classifier", "*pooler*"], formats=[INT8])
    place_quantizers(model, modules, text(), Placement(HIGH_PRECISION_OPS, residual_adds=True, products=True))
    calibrate(model, modules, [text()])
    set_formats(modules, dict.fromkeys(modules, (INT8, INT8)))
    model.train()(**text(), labels=torch.tensor([0, 1, 0])).loss.backward()
    scales = [p for name, p in model.named_parameters() if ".placed." in name and name.endswith("scale")]
    assert len(scales) >= 15
    assert all(scale.grad is not None for scale in scales)


def test_gradients_pass_an_addition_in_place():
    model = torchvision.models.resnet18(num_classes=3)
    modules, images = quantize_model(model, formats=[INT8]), torch.randn(2, 3, 32, 32)
    place_quantizers(model, modules, images, Placement(residual_adds=True))
    calibrate(model, modules, [images])
    set_formats(modules, dict.fromkeys(modules, (INT8, INT8)))
    model.train()(images).sum().backward()
    scales = [p for name, p in model.named_parameters() if ".placed." in name and name.endswith("scale")]
    assert len(scales) >= 8 and all(scale.grad is not None for scale in scales)


def test_an_error_inside_leaves_no_trace():
    model = bert()
    quantized(model)
    with pytest.raises((RuntimeError, IndexError)):
        model(input_ids=torch.full((1, 4), 99))
    expected = run(model)
    assert torch.equal(run(model), expected)


def test_unknown_operation():
    with pytest.raises(UserError, match="unknown 'relu'; choices: gelu, softmax, layernorm"):
        Placement(("relu",))
    assert not Placement()


def test_a_pass_played_back_knows_whose_formats_changed():
    """Sites change with their layer: outputs of layers that read them must not come from the cache."""
    model = bert()
    modules = quantized(model)
    names = list(modules)
    with torch.no_grad(), prefix_cached(modules) as cache:
        for name in [*names, names[0]]:
            set_formats(modules, {**dict.fromkeys(modules, (FLOAT, FLOAT)), name: (INT8, INT8)})
            cache.restart()
            again = model(**text()).logits
            for module in modules.values():
                module.prefix_cache = None
            assert torch.equal(again, run(model)), name
            for module in modules.values():
                module.prefix_cache = cache
