"""Whole models: what is stored, what is left to nearest and why, and what the statistics are."""

import copy
from functools import partial

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, MixtralConfig, MixtralForCausalLM

from quant.convert import calibrate, get_formats, quantize_model, set_formats
from quant.errors import UserError
from quant.export.packed import read_packed, restore, write_packed
from quant.formats import FLOAT, IntFormat, parse_format
from quant.quantizers.quantizer import QuantizerConfig
from quant.reconstruction.adaround import adaround
from quant.reconstruction.gptq import gptq
from quant.reconstruction.grid import grid_of
from quant.reconstruction.hessian_inputs import InputCollector
from quant.reconstruction.rounding import round_weights

SIZES = {"vocab_size": 60, "hidden_size": 16, "intermediate_size": 20, "num_hidden_layers": 2}
HEADS = {"num_attention_heads": 2, "num_key_value_heads": 1, "pad_token_id": 0}


def tokens(seed, rows=4):
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(1, 60, (rows, 16), generator=generator)
    mask = torch.ones_like(ids)
    mask[0, 9:] = 0
    return {"input_ids": ids, "attention_mask": mask}


def quantized(config, model_class, weight, activation=FLOAT, *, exclude=(), **settings):
    torch.manual_seed(0)
    model = model_class(config).eval()
    batches = [tokens(seed) for seed in range(3)]
    whole = copy.deepcopy(model)
    config = QuantizerConfig(**{"range": "learned", "granularity": "channel", **settings})
    modules = quantize_model(model, exclude=exclude, formats=[weight, activation], weight=config)
    calibrate(model, modules, batches)
    set_formats(modules, dict.fromkeys(modules, (weight, activation)))
    return whole, model, modules, batches


def llama(weight, activation=FLOAT, *, tied=False, **settings):
    config = LlamaConfig(**SIZES, **HEADS, tie_word_embeddings=tied)
    return quantized(config, LlamaForCausalLM, parse_format(weight), activation, **settings)


def distance(model, whole):
    batch = tokens(17, rows=8)
    with torch.no_grad():
        return (model(**batch).logits - whole(**batch).logits)[batch["attention_mask"] > 0].square().mean().item()


@pytest.fixture
def quick(monkeypatch):
    """AdaRound in 150 steps."""
    monkeypatch.setattr("quant.reconstruction.rounding.adaround", partial(adaround, iterations=150))


LEARNED, DYNAMIC = {"range": "learned"}, {"range": "dynamic", "observer": "minmax"}
MOVED = {"range": "calibrated", "symmetric": False}
CASES = [
    *((weight, LEARNED) for weight in ("int4", "int3g12", "e4m3", "mxfp4", "mxint8", "nvfp4", "bf16")),
    *((weight, DYNAMIC) for weight in ("int4", "uint4g8", "e2m1")),
    *((weight, MOVED) for weight in ("int4", "int3g12")),
    ("int4", {"range": "learned", "symmetric": False, "learned_offset": True}),
]


@pytest.mark.parametrize(("weight", "settings"), CASES)
def test_ordinary_rounding_gives_the_stored_weights_back(weight, settings):
    whole, model, modules, batches = llama(weight, **settings)
    formats, nearest = get_formats(modules), distance(model, whole)
    assert round_weights(model, modules, batches) == []
    assert get_formats(modules) == formats
    for module in modules.values():
        assert torch.equal(module.weight_quantizer(module.weight), module.weight)
    if weight != "bf16":
        assert distance(model, whole) < nearest
    with torch.no_grad():
        before = model(**batches[0]).logits
    calibrate(model, modules, batches, learned=False)  # changes no learned scale; others follow from the weights
    if settings["range"] == "learned":
        torch.testing.assert_close(model(**batches[0]).logits.detach(), before, rtol=0, atol=0)


def test_adaround_keeps_the_outputs_better_too(quick):
    whole, model, modules, batches = llama("int3", granularity="tensor")
    nearest = distance(model, whole)
    round_weights(model, modules, batches, "adaround")
    assert distance(model, whole) < nearest
    for module in modules.values():
        assert torch.equal(module.weight_quantizer(module.weight), module.weight)


def test_a_packed_file_holds_the_rounded_model(tmp_path):
    _, model, modules, batches = llama("int3g12", IntFormat(8))
    float_model = copy.deepcopy(model)
    round_weights(model, modules, batches)
    write_packed(tmp_path / "model.safetensors", model, modules)
    restore(float_model, *read_packed(tmp_path / "model.safetensors"))
    with torch.no_grad():
        assert torch.equal(float_model(**batches[0]).logits, model(**batches[0]).logits)


def test_it_is_the_same_at_every_run_and_changes_no_other_weight():
    (_, one, modules, batches), (whole, other, others, _) = llama("int4"), llama("int4")
    for model, own in ((one, modules), (other, others)):
        round_weights(model, own, iter(batches))
    quantized_weights = {f"{name}.weight" for name in modules}
    for (name, tensor), again in zip(one.state_dict().items(), other.state_dict().values(), strict=True):
        assert torch.equal(tensor, again)
        if name in whole.state_dict() and name not in quantized_weights:
            assert torch.equal(tensor, whole.state_dict()[name])
    assert one.config.use_cache  # as it was


def test_a_block_is_rounded_on_what_the_rounded_blocks_before_it_give():
    """The last layer's weight, from statistics of a whole forward pass of the model rounded up to it."""
    whole, model, modules, batches = llama("int3", IntFormat(8))
    last = "model.layers.1.mlp.down_proj"
    round_weights(model, modules, batches)
    # The state before the last block was rounded: block 0 as it is, block 1 and the head in float.
    late = {name: module for name, module in modules.items() if not name.startswith("model.layers.0")}
    own = {name: module.weight.detach().clone() for name, module in late.items()}
    for name, module in late.items():
        module.weight.data.copy_(whole.get_submodule(name).weight)
        module.set_formats(FLOAT, IntFormat(8))
    collector = InputCollector({last: modules[last]})
    with torch.no_grad():
        for batch in batches:
            with collector.gathering((batch["attention_mask"].bool(),)):
                model(**batch, use_cache=False)
    assert collector.moments[last].rows == sum(int(batch["attention_mask"].sum()) for batch in batches)
    modules[last].set_formats(parse_format("int3"), IntFormat(8))
    again = gptq(modules[last].weight.detach().unsqueeze(0), collector.moments[last].hessian, grid_of(modules[last]))
    torch.testing.assert_close(again[0].float(), own[last], rtol=1e-6, atol=1e-7)


def test_query_key_and_value_get_the_moments_each_would_get_alone():
    _, model, modules, batches = llama("int4")
    names = [f"model.layers.0.self_attn.{part}_proj" for part in "qkv"]
    together = InputCollector({name: modules[name] for name in names})
    alone = [InputCollector({name: modules[name]}) for name in names]
    with torch.no_grad():
        for collector in (together, *alone):
            for batch in batches:
                with collector.gathering((batch["attention_mask"].bool(),)):
                    model(**batch)
    for name, collector in zip(names, alone, strict=True):
        assert torch.equal(together.moments[name].hessian, collector.moments[name].hessian)
        assert together.moments[name].hessian is not together.moments[names[0]].hessian or name == names[0]


def test_experts_are_rounded_on_their_own_tokens():
    config = MixtralConfig(**SIZES, **HEADS, num_local_experts=4, num_experts_per_tok=1)
    whole, model, modules, batches = quantized(config, MixtralForCausalLM, parse_format("int3g8"))
    experts = [module for module in modules.values() if module.weight.dim() == 3]
    assert experts
    before = [module.weight_quantizer(module.weight).detach() for module in experts]
    nearest = distance(model, whole)
    for name, module in modules.items():  # no token reaches the last expert
        if name.endswith("gate"):
            module.weight.data[3] -= 100
            whole.get_submodule(name).weight.data[3] -= 100
    round_weights(model, modules, batches)
    assert distance(model, whole) < nearest
    for module, rounded in zip(experts, before, strict=True):
        assert torch.equal(module.weight_quantizer(module.weight), module.weight)
        assert not torch.equal(module.weight[0], rounded[0])


def test_weights_that_other_modules_read_are_rounded_to_nearest_with_a_note():
    _, model, modules, batches = llama("int4", tied=True)
    embedding = model.model.embed_tokens.weight.detach().clone()
    notes = round_weights(model, modules, batches)
    assert len(notes) == 1 and "nearest" in notes[0] and "other modules" in notes[0] and "lm_head" in notes[0]
    assert torch.equal(model.model.embed_tokens.weight, embedding)


def test_layers_without_examples_are_rounded_to_nearest_with_a_note():
    class Unused(nn.Module):
        def __init__(self):
            super().__init__()
            self.used, self.unused = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x):
            return self.used(x)

    model = Unused()
    modules = quantize_model(model, formats=[parse_format("int4")])
    calibrate(model, modules, [torch.randn(3, 4)])
    set_formats(modules, dict.fromkeys(modules, (parse_format("int4"), FLOAT)))
    (note,) = round_weights(model, modules, [torch.randn(8, 4)])
    assert note.startswith("rounding gptq: 1 layers are rounded to nearest, since no calibration example")
    assert note.endswith("unused")


def test_convolutions_are_reconstructed(quick):
    torch.manual_seed(0)
    shapes = [nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 3, groups=8), nn.ReLU(), nn.Conv2d(8, 4, 1)]
    model, int3 = nn.Sequential(*shapes), parse_format("int3")
    whole, x = copy.deepcopy(model), torch.randn(8, 3, 10, 10)
    # Ranges that are chosen by the output's error leave GPTQ little to gain on layers this small.
    modules = quantize_model(model, formats=[int3], weight=QuantizerConfig(granularity="channel", observer="mse"))
    calibrate(model, modules, [x])
    set_formats(modules, dict.fromkeys(modules, (int3, FLOAT)))
    nearest = (model(x) - whole(x)).square().mean()
    for method in ("gptq", "adaround"):
        own = copy.deepcopy(model)
        round_weights(own, {name: own.get_submodule(name) for name in modules}, [x], method)
        assert (own(x) - whole(x)).square().mean() < nearest


def test_each_block_is_told():
    _, model, modules, batches = llama("int4")
    told = []
    round_weights(model, modules, batches, tell=lambda *report: told.append(report))
    assert told == [("rounding", 0, 3), *(("rounding", i, 3, f"block {i} of 3") for i in (1, 2, 3))]


def test_what_cannot_be_done_is_refused_in_one_line():
    _, model, modules, batches = llama("nvfp4")
    with pytest.raises(UserError, match=r"adaround has no nvfp4.*; choices: gptq, nearest"):
        round_weights(model, modules, batches, "adaround")
    with pytest.raises(UserError, match="calibration set is empty"):
        round_weights(model, modules, [])
