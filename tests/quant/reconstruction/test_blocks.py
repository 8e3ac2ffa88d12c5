"""Chains of blocks: what counts as one, and that a walk gives each block what the whole model gives it."""

import gc
import weakref

import pytest
import torch
from torch import nn
from transformers import (
    BertConfig,
    BertModel,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

from quant.convert import find_layers, run_model
from quant.module_utils import evaluating
from quant.reconstruction.blocks import BlockInputs, find_units
from quant.reconstruction.rounding import _without_cache

SMALL = {"vocab_size": 50, "hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2}
IDS = torch.arange(24).view(2, 12) % 50
MASK = torch.ones(2, 12, dtype=torch.long).index_fill(1, torch.tensor([10, 11]), 0)


def llama():
    return LlamaForCausalLM(LlamaConfig(**SMALL, intermediate_size=24, tie_word_embeddings=False))


def bert():
    return BertModel(BertConfig(**SMALL, intermediate_size=24))


def gpt2():
    return GPT2LMHeadModel(GPT2Config(vocab_size=50, n_embd=16, n_layer=3, n_head=2, n_positions=16))


def t5():
    config = T5Config(vocab_size=50, d_model=16, d_kv=8, d_ff=24, num_layers=2, num_heads=2, decoder_start_token_id=0)
    return T5ForConditionalGeneration(config)


class Residual(nn.Module):
    def __init__(self, width, step=1):
        super().__init__()
        self.conv = nn.Conv2d(width // step, width, 3, stride=step, padding=1)
        self.skip = nn.Conv2d(width // step, width, 1, stride=step) if step > 1 else nn.Identity()

    def forward(self, x):
        return torch.relu(self.conv(x) + self.skip(x))


class Convolutional(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3)
        self.stages = nn.Sequential(nn.Sequential(Residual(4), Residual(4)), nn.Sequential(Residual(8, 2), Residual(8)))
        self.head = nn.Linear(8, 2)

    def forward(self, x):
        return self.head(self.stages(self.stem(x)).mean((2, 3)))


class Forked(nn.Module):
    """Its blocks do not follow each other: all read the same."""

    def __init__(self):
        super().__init__()
        self.experts = nn.ModuleList(nn.Linear(4, 4) for _ in range(3))

    def forward(self, x):
        return sum(expert(x) for expert in self.experts)


class OwnMasks(nn.Module):
    """Each block gets an argument of its own, as layers with sliding and with full attention do."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(Masked() for _ in range(3))

    def forward(self, x):
        for index, layer in enumerate(self.layers):
            x, _ = layer(x, mask=torch.full((4,), float(index + 1)))
        return x


class Masked(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x, mask):
        return self.linear(x) * mask, mask


TOKENS = {"input_ids": IDS, "attention_mask": MASK}
MODELS = {
    "llama": (llama, TOKENS, [f"model.layers.{i}" for i in range(3)], ["lm_head"]),
    "bert": (bert, TOKENS, [f"encoder.layer.{i}" for i in range(3)], ["pooler.dense"]),
    "gpt2": (gpt2, TOKENS, [f"transformer.h.{i}" for i in range(3)], ["lm_head"]),
    "t5": (
        t5,
        {**TOKENS, "labels": IDS},
        [f"{side}.block.{i}" for side in ("encoder", "decoder") for i in range(2)],
        ["lm_head"],
    ),
    "convolutions": (Convolutional, torch.randn(2, 3, 12, 12), ["stages.0", "stages.1"], ["stem", "head"]),
    "own masks": (OwnMasks, torch.randn(2, 4), [f"layers.{i}" for i in range(3)], []),
    "forked": (Forked, torch.randn(2, 4), [], [f"experts.{i}" for i in range(3)]),
}


@pytest.mark.parametrize("kind", MODELS)
def test_units_are_the_blocks_and_the_layers_beside_them_in_call_order(kind):
    make, batch, blocks, alone = MODELS[kind]
    model, layers = made(make)
    with evaluating(model), _without_cache(model):
        units = find_units(model, layers, batch)
    assert [unit.name for unit in units if unit.chain] == blocks
    assert [unit.name for unit in units if not unit.chain] == alone
    assert sorted(layer for unit in units for layer in unit.layers) == sorted(layers)
    assert units[0].name == "stem" or kind != "convolutions"


@pytest.mark.parametrize("kind", [kind for kind in MODELS if kind != "forked"])
def test_a_walk_gives_each_block_what_the_whole_model_gives_it(kind):
    make, batch, _, _ = MODELS[kind]
    model, layers = made(make)
    with evaluating(model), _without_cache(model):
        units = [unit for unit in find_units(model, layers, batch) if unit.chain]
        expected, handles = {}, []
        for unit in units:

            def keep(module, args, kwargs, output, name=unit.name):
                expected[name] = flat((args, kwargs, output))

            handles.append(unit.chain.modules[unit.index].register_forward_hook(keep, with_kwargs=True))
        with torch.no_grad():
            run_model(model, batch)
        for handle in handles:
            handle.remove()
        for unit in units:
            if unit.index == 0:
                walk = BlockInputs(model, unit.chain, [batch])
            else:
                walk.advance()
            ours = flat((*walk.arguments(0), walk.run(0)))
            assert len(ours) == len(expected[unit.name])
            for one, other in zip(ours, expected[unit.name], strict=True):
                assert torch.equal(one, other)


def test_the_inputs_of_one_block_alone_are_in_memory():
    model, layers = made(llama)
    alive: list[weakref.ref] = []
    for block in model.model.layers:
        block.register_forward_pre_hook(lambda module, args: alive.append(weakref.ref(args[0])))
    batches = [TOKENS] * 5
    with evaluating(model), _without_cache(model):
        units = find_units(model, layers, batches[0])
        walk = BlockInputs(model, units[0].chain, batches)
        counts = []
        for _ in range(2):
            walk.advance()
            gc.collect()
            counts.append(sum(reference() is not None for reference in alive))
        for batch in range(len(batches)):
            walk.run(batch)
        gc.collect()
        now = {id(reference()) for reference in alive if reference() is not None}
    # After a step from one block to the next, the inputs of the former are gone; those of the latter are not yet read.
    assert counts == [0, 0] and len(now) == len(batches)


def test_a_block_that_is_called_twice_is_no_chain():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))

        def forward(self, x):
            return self.layers(self.layers(x))

    model, layers = made(Twice)
    units = find_units(model, layers, torch.randn(2, 4))
    assert [(unit.name, unit.calls, unit.chain) for unit in units] == [("layers.0", 2, None), ("layers.1", 2, None)]


def test_layers_that_the_first_batch_does_not_reach_come_last():
    class Unused(Forked):
        def forward(self, x):
            return self.experts[1](x)

    model, layers = made(Unused)
    units = find_units(model, layers, torch.randn(2, 4))
    assert [unit.layers for unit in units] == [["experts.1"], ["experts.0", "experts.2"]]


def made(make):
    torch.manual_seed(0)
    model = make().eval()
    return model, find_layers(model)


def flat(values):
    if isinstance(values, torch.Tensor):
        return [values]
    parts = values.values() if isinstance(values, dict) else values if isinstance(values, list | tuple) else ()
    return [tensor for part in parts for tensor in flat(part)]
