"""The cost of a whole file against the bytes of packed files; its constant parts by hand."""

import pytest
import torch
from torch import nn
from transformers import BertConfig, BertForSequenceClassification, LlamaConfig, LlamaForCausalLM

from cost.cost import memory_cost
from cost.file_scope import charge_file, file_rest
from cost.profile import profile_model, tables_in, tied_in
from policy.solve import solve_assignment
from policy.space import build_space, uniform_cost
from quant.convert import calibrate, find_layers, quantize_model, set_formats
from quant.export.packed import packed_sizes, read_packed, restore, write_packed
from quant.formats import FLOAT, parse_format
from quant.quantizers.quantizer import QuantizerConfig
from quant.transforms.half import halve_rest

IDS = torch.arange(48).view(2, 24) % 90
MIB = 2**20


def llama(tied):
    sizes = {"hidden_size": 64, "num_hidden_layers": 2, "intermediate_size": 96, "vocab_size": 90}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "tie_word_embeddings": tied}
    return LlamaForCausalLM(LlamaConfig(**sizes, **heads)).eval(), {"input_ids": IDS}


def encoder():
    sizes = {"hidden_size": 64, "num_hidden_layers": 2, "intermediate_size": 96, "vocab_size": 90}
    config = BertConfig(**sizes, num_attention_heads=2, max_position_embeddings=32)
    return BertForSequenceClassification(config).eval(), {"input_ids": IDS}


class Convolutions(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.norm, self.head = nn.Conv2d(3, 20, 3), nn.BatchNorm2d(20), nn.Linear(20, 7)

    def forward(self, pixels):
        return self.head(self.norm(self.conv(pixels)).relu().mean((2, 3)))


MODELS = {
    "llama": lambda: llama(False),
    "tied": lambda: llama(True),
    "encoder": encoder,
    "convolutions": lambda: (Convolutions().eval(), (torch.randn(2, 3, 8, 8),)),
}


def names_of(formats, modules):
    pairs = [tuple(map(parse_format, pair.split("/"))) for pair in formats]
    return {name: pairs[place % len(pairs)] for place, name in enumerate(modules)}


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize(
    ("formats", "symmetric", "granularity"),
    [
        (["int4/float", "int8/float", "int3/float"], True, "channel"),
        (["int4/int8", "e4m3/e4m3", "mxfp4/float", "float/float"], True, "channel"),
        (["int4/int4", "int8/int8"], False, "channel"),
        (["int4g32/float", "uint3g40/int8", "nvfp4/float", "mxint8/float"], True, "channel"),
        (["int5/int8"], True, "tensor"),
    ],
)
def test_the_cost_is_what_the_tensors_of_a_packed_file_weigh(kind, formats, symmetric, granularity, tmp_path):
    torch.manual_seed(0)
    model, example = MODELS[kind]()
    names = list(find_layers(model, tables=True))
    profiles = profile_model(model, example, names)
    profiles = charge_file(profiles, model, granularity == "channel", not symmetric)
    assignment = names_of(formats, names)
    for group in tied_in(profiles):
        assignment |= {name: (assignment[group[0]][0], assignment[name][1]) for name in group}
    used = {format for pair in assignment.values() for format in pair if format != FLOAT}
    weight = QuantizerConfig(granularity=granularity, symmetric=symmetric)
    modules = quantize_model(model, include=names, formats=used, weight=weight)
    calibrate(model, modules, [example])
    set_formats(modules, assignment)
    halve_rest(model, modules)
    with torch.no_grad():
        expected = run(model, example)
    path = tmp_path / "model.safetensors"
    write_packed(path, model, modules, halve=True)
    sizes = packed_sizes(path)
    cost = memory_cost(profiles, {name: module.formats for name, module in modules.items()}) * MIB
    assert cost == pytest.approx(sum(sizes.values()) - sizes["header"], rel=1e-3, abs=1)
    torch.manual_seed(1)
    other, _ = MODELS[kind]()
    restore(other, *read_packed(path))
    with torch.no_grad():
        assert torch.equal(run(other.eval(), example), expected)


def run(model, example):
    made = model(**example) if isinstance(example, dict) else model(*example)
    return made if isinstance(made, torch.Tensor) else made.logits


def test_the_rest_is_norms_biases_and_saved_buffers():
    model = Convolutions()
    names = ["conv", "head"]
    assert file_rest(model, names) == 20 + 7 + 4 * 20 + 4  # biases; norm's parameters and buffers; a count in int64


def test_bits_of_a_whole_file_are_bits_of_each_of_its_numbers():
    model, example = llama(False)
    profiles = charge_file(profile_model(model, example, list(find_layers(model, tables=True))), model)
    numbers = sum(parameter.numel() for parameter in model.parameters())
    assert uniform_cost(profiles, 4.5, "memory") == pytest.approx(numbers * 4.5 / 8 / MIB, rel=1e-12)
    assert uniform_cost(profiles, 4.5, "compute") == uniform_cost(
        profile_model(model, example, list(find_layers(model, tables=True))), 4.5, "compute"
    )


def test_the_knapsack_keeps_to_the_file():
    """Scales differ between formats, so that a solver without them exceeds the file; checked against all choices."""
    model, example = llama(True)
    names = ["model.embed_tokens", "model.layers.0.mlp.up_proj", "model.layers.1.mlp.down_proj", "lm_head"]
    profiles = charge_file(profile_model(model, example, names), model)
    formats = [parse_format(name) for name in ("int4", "mxfp4", "int8")]
    space = build_space(names, formats, "layer", True, tied=tied_in(profiles), tables=tables_in(profiles))
    table = space.cost_table(profiles, "memory")
    values = torch.rand(table.shape, generator=torch.Generator().manual_seed(0)).double().numpy()
    choices = [[a, b, c] for a in range(3) for b in range(3) for c in range(3)]
    costs = [memory_cost(profiles, space.assignment(choice)) for choice in choices]
    low, high = space.cost_range(profiles, "memory")
    assert (low, high) == (pytest.approx(min(costs)), pytest.approx(max(costs)))
    for budget in (costs[5], costs[13], (low + high) / 2):
        worth = {
            index: sum(values[d, c] for d, c in enumerate(choice))
            for index, choice in enumerate(choices)
            if costs[index] <= budget * (1 + 1e-12)
        }
        best = choices[max(worth, key=worth.get)]
        assert solve_assignment(values, table, budget) == best
