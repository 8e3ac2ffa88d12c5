"""Caches of keys and values: found with what they store, rounded per token and head, also while generating."""

import json

import pytest
import torch
import transformers

from quant.cache_formats import bits_per_value, parse_cache_format
from quant.convert import quantize_model, set_formats
from quant.errors import UserError
from quant.export import read_packed, restore, write_packed
from quant.formats import FLOAT, IntFormat, parse_format
from quant.quant_cache import QuantCache
from quant.quantizers.prefix_cache import prefix_cached
from quant.transforms.kv_cache import (
    attach_caches,
    caches_of,
    describe_caches,
    find_caches,
    restore_caches,
    sites_of,
)

SHAPE = {
    **{"vocab_size": 60, "hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64},
    **{"max_position_embeddings": 64, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0},
}
BATCH = {"input_ids": torch.tensor([[5, 9, 3, 7, 11, 30, 45, 8], [6, 6, 50, 3, 4, 21, 12, 9]])}


def build(name="Llama", attention="sdpa", **more):
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**{**SHAPE, "num_key_value_heads": 2, **more})
    config._attn_implementation = attention
    kind = "LMHeadModel" if name == "GPT2" else "ForCausalLM"
    model = getattr(transformers, name + kind)(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(4)  # so that rounding shows
    return model


def quantized(format, **settings):
    model = build(**settings)
    found = find_caches(model, BATCH)
    attach_caches(model, sites_of(found), {attention.name: parse_format(format) for attention in found})
    return model


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize(
    "name, vectors, values", [("Llama", 4, 48), ("Qwen3", 4, 64), ("Phi3", 8, 96), ("GPT2", 8, 96)]
)
def test_caches_are_found_with_what_a_token_stores(name, vectors, values, attention):
    more = {"Qwen3": {"head_dim": 16}, "Phi3": {"num_key_value_heads": 4}}.get(name, {})
    model = build(name, attention, **more)
    found = find_caches(model, BATCH)
    stored = model(**BATCH, use_cache=True).past_key_values.layers
    assert [(a.heads, a.values) for a in found] == [(vectors, values)] * 2
    assert [a.values for a in found] == [sum(x.shape[1] * x.shape[3] for x in (c.keys, c.values)) for c in stored]
    assert [a.name.rpartition(".")[2] for a in found] == ["kv_cache"] * 2
    assert found[0].bits(parse_format("int8")) == values * 8 + vectors * (16 + 8)  # fp16 scale, int8 zero point
    assert found[0].bits(parse_format("e4m3")) == values * 8 + vectors * 16
    assert found[0].bits(FLOAT) == values * 16


def asymmetric(x, bits):
    """Rounds each vector to the integers between its own extremes; slow, in numpy's float64."""
    import numpy as np

    rows = x.detach().double().reshape(-1, x.shape[-1]).numpy()
    made = np.empty_like(rows)
    for number, row in enumerate(rows):
        low, high = min(row.min(), 0), max(row.max(), 0)
        scale = (high - low) / (2**bits - 1)
        zero = round(-low / scale)
        made[number] = (np.clip(np.round(row / scale) + zero, 0, 2**bits - 1) - zero) * scale
    return torch.from_numpy(made).view_as(x)


@pytest.mark.parametrize("bits", [4, 8])
def test_each_token_of_each_head_has_its_own_grid(bits):
    cache, keys = QuantCache(), torch.randn(2, 3, 5, 8) * torch.tensor([1.0, 10, 0.1]).view(3, 1, 1)
    cache.set_formats(IntFormat(bits))
    torch.testing.assert_close(cache(keys).double(), asymmetric(keys, bits), rtol=0, atol=1e-5)
    assert torch.equal(cache(keys)[:, 1:2, 3:4], cache(keys[:, 1:2, 3:4]))
    cache.set_formats(FLOAT)
    assert cache(keys) is keys


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_attention_reads_rounded_keys_behind_their_rotary_embedding(attention):
    model, same = quantized("int4", attention=attention), build(attention=attention)
    with torch.no_grad():
        made = model(**BATCH).logits
        config = same.config

        class Rounded(transformers.DynamicCache):
            def update(self, keys, values, layer, *arguments, **named):
                keys, values = asymmetric(keys, 4).float(), asymmetric(values, 4).float()
                return super().update(keys, values, layer, *arguments, **named)

        expected = same(**BATCH, past_key_values=Rounded(config=config), use_cache=True).logits
        plain = same(**BATCH).logits
    torch.testing.assert_close(made, expected, rtol=0, atol=1e-4)
    assert (made - plain).abs().max() > 0.05


@pytest.mark.parametrize("format", ["int4", "e4m3", "mxfp4"])
def test_generating_with_a_cache_is_one_forward_pass_after_another(format):
    model = quantized(format)
    written = model.generate(BATCH["input_ids"][:1], max_new_tokens=8, do_sample=False, use_cache=True)
    tokens = BATCH["input_ids"][:1]
    with torch.no_grad():
        while tokens.shape[1] < written.shape[1]:
            tokens = torch.cat([tokens, model(tokens, use_cache=False).logits[:, -1:].argmax(-1)], 1)
    assert written.tolist() == tokens.tolist()


def test_caches_have_formats_of_their_own_beside_layers():
    model = build()
    found = find_caches(model, BATCH)
    modules = quantize_model(model, formats=[IntFormat(8)])
    attach_caches(model, sites_of(found), {a.name: FLOAT for a in found})
    with torch.no_grad():
        before = model(**BATCH).logits
        caches = caches_of(model)
        caches[found[1].name].set_formats(IntFormat(3))
        after = model(**BATCH).logits
    assert not torch.equal(before, after)
    assert {layer.formats for layer in modules.values()} == {(FLOAT, FLOAT)} and set(caches).isdisjoint(modules)
    assert caches[found[0].name].formats == (FLOAT, FLOAT) and caches[found[1].name].formats == (IntFormat(3), FLOAT)


def test_a_shared_prefix_ends_where_a_cache_changes():
    model = build()
    found = find_caches(model, BATCH)
    modules = quantize_model(model, formats=[IntFormat(8)])
    attach_caches(model, sites_of(found), {a.name: FLOAT for a in found})
    layers = {**modules, **caches_of(model)}

    def logits(cache=None):
        if cache is not None:
            cache.restart()
        with torch.no_grad():
            return model(**BATCH).logits

    with prefix_cached(layers) as cache:
        first = logits(cache)
        set_formats(layers, {found[1].name: (IntFormat(3), FLOAT)})
        second = logits(cache)
    assert torch.equal(second, logits()) and not torch.equal(first, second)


def test_caches_are_described_saved_in_packed_files_and_restored(tmp_path):
    model = quantized("int4")
    described = json.loads(json.dumps(describe_caches(model)))
    fresh = build()
    restore_caches(fresh, described)
    with torch.no_grad():
        expected = model(**BATCH).logits
        assert torch.equal(fresh(**BATCH).logits, expected)
        write_packed(tmp_path / "model.safetensors", model, {})
        again = build()
        restore(again, *read_packed(tmp_path / "model.safetensors"))
        assert torch.equal(again(**BATCH).logits, expected)


def test_what_has_no_cache_and_what_no_cache_can_have_is_refused():
    settings = {**SHAPE, "num_labels": 2}
    bert = transformers.BertForSequenceClassification(transformers.BertConfig(**settings)).eval()
    with pytest.raises(UserError, match=r"--quantize_kv_cache: Bert\w+ keeps no cache of keys and values"):
        find_caches(bert, BATCH)
    latent = {
        **{"q_lora_rank": 8, "kv_lora_rank": 8, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 12},
        **{"n_routed_experts": 4, "n_group": 2, "topk_group": 1, "num_experts_per_tok": 2, "moe_intermediate_size": 16},
    }
    deepseek = transformers.DeepseekV3Config(**{**SHAPE, **latent}, first_k_dense_replace=2)
    with pytest.raises(UserError, match="--quantize_kv_cache"):
        find_caches(transformers.DeepseekV3ForCausalLM(deepseek).eval(), BATCH)
    for name, why in (("int4g32", "give int4"), ("nvfp4", "give mxfp4"), ("int99", "unknown format")):
        with pytest.raises(UserError, match=why):
            parse_cache_format(name)
    assert bits_per_value(parse_format("mxfp4"), 64) == 4.25 and bits_per_value(parse_format("bf16"), 64) == 16
