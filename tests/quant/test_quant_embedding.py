"""Embeddings as quantized layers: rows against a plain loop, tied heads, who else reads the table."""

import pytest
import torch
from torch import nn
from torch.nn import functional
from transformers import Gemma3ForCausalLM, Gemma3TextConfig, LlamaConfig, LlamaForCausalLM

from cost.profile import profile_model
from policy.space import build_space
from quant.convert import calibrate, find_layers, quantize_model, set_formats
from quant.errors import UserError
from quant.formats import FLOAT, parse_format
from quant.quantizers.quantizer import QuantizerConfig

INT4, INT8, MXFP4 = map(parse_format, ("int4", "int8", "mxfp4"))
IDS = torch.arange(24).view(2, 12) % 40
TABLE = "model.embed_tokens"
MINMAX = QuantizerConfig(range="calibrated", granularity="channel", observer="minmax")


def llama(tied=False):
    torch.manual_seed(0)
    sizes = {"hidden_size": 48, "num_hidden_layers": 1, "intermediate_size": 32, "vocab_size": 40}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1}
    return LlamaForCausalLM(LlamaConfig(**sizes, **heads, tie_word_embeddings=tied)).eval()


def quantized(model, formats=(INT4, INT8), weight=MINMAX):
    modules = quantize_model(model, include=list(find_layers(model, tables=True)), formats=formats, weight=weight)
    calibrate(model, modules, [{"input_ids": IDS}])
    return modules


def test_a_table_is_a_layer_where_it_is_asked_for_alone():
    model = llama()
    assert TABLE not in find_layers(model)
    assert TABLE not in find_layers(model, include=["*"])
    assert TABLE in find_layers(model, include=["*", TABLE])
    assert TABLE in find_layers(model, tables=True)
    assert TABLE not in find_layers(model, include=["*", TABLE], exclude=["*embed*"])
    assert TABLE not in quantize_model(model)


def test_rows_are_rounded_one_by_one():
    model = llama()
    rows = model.model.embed_tokens.weight.detach().clone()
    table = quantized(model)[TABLE]
    set_formats({TABLE: table}, {TABLE: (INT4, INT8)})
    expected = torch.stack([(row / (row.abs().max() / 7)).round() * (row.abs().max() / 7) for row in rows])
    torch.testing.assert_close(table(IDS), expected[IDS], rtol=0, atol=1e-7)
    set_formats({TABLE: table}, {TABLE: (MXFP4, INT8)})  # blocks of 32 lie within a row: one whole, one of 16
    first = torch.cat([rows[:, :32], torch.zeros(40, 16)], dim=1)
    alone = nn.Linear(48, 40, bias=False)
    alone.weight.data = first
    other = quantize_model(nn.Sequential(alone), formats=[MXFP4])["0"]
    set_formats({"0": other}, {"0": (MXFP4, FLOAT)})
    assert torch.equal(table(IDS)[..., :32], other.weight_quantizer(first)[IDS][..., :32])


def test_indices_have_no_format():
    modules = quantized(llama())
    set_formats(modules, dict.fromkeys(modules, (INT4, INT8)))
    assert modules[TABLE].formats == (INT4, FLOAT)
    assert modules["lm_head"].formats == (INT4, INT8)
    profiles = profile_model(llama(), {"input_ids": IDS}, list(modules))
    space = build_space(list(modules), [INT4, INT8], tables=[TABLE])
    assert space.assignment([0] * len(modules))[TABLE] == (INT4, FLOAT)
    assert space.choice(space.assignment([1] * len(modules))) == [1] * len(modules)
    table = next(profile for profile in profiles if profile.name == TABLE)
    assert (table.macs, table.params, table.positions, table.channels) == (0, 40 * 48, 12, 40)


def test_gradients_reach_the_rows_that_were_looked_up():
    model = llama()
    table = quantized(model)[TABLE]
    table.set_formats(INT8, FLOAT)
    table(torch.tensor([3, 3, 5])).sum().backward()
    touched = table.weight.grad.abs().sum(1) > 0
    assert touched.nonzero().flatten().tolist() == [3, 5]
    assert table.weight.grad[3].mean() == pytest.approx(2, rel=0.2)  # twice; values at the range's ends pass less


def test_a_tied_head_shares_quantizer_and_format():
    model = llama(tied=True)
    modules = quantized(model)
    assert modules[TABLE].weight_quantizer is modules["lm_head"].weight_quantizer
    profiles = {p.name: p for p in profile_model(llama(tied=True), {"input_ids": IDS}, list(modules))}
    assert profiles["lm_head"].tied_to == TABLE
    assert (profiles["lm_head"].params, profiles[TABLE].params) == (0, 40 * 48)
    assert (profiles["lm_head"].macs, profiles[TABLE].macs) == (40 * 48 * 12, 0)
    set_formats(modules, dict.fromkeys(modules, (INT4, FLOAT)))
    hidden = torch.randn(3, 48)
    assert torch.equal(modules["lm_head"](hidden), functional.linear(hidden, modules[TABLE](torch.arange(40))))


def test_a_forward_of_its_own_reads_the_rounded_rows():
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "intermediate_size": 32, "vocab_size": 40, "head_dim": 16}
    model = Gemma3ForCausalLM(Gemma3TextConfig(**sizes, num_attention_heads=2, num_key_value_heads=1)).eval()
    table = quantize_model(model, include=[TABLE], formats=[INT8], weight=MINMAX)[TABLE]
    calibrate(model, {TABLE: table}, [{"input_ids": IDS}])
    table.set_formats(INT8, FLOAT)
    expected = table.weight_quantizer(table.weight)[IDS] * 32**0.5
    torch.testing.assert_close(table(IDS), expected)


class Reader(nn.Module):
    """Computes logits from the table itself, without a layer that shares its weight."""

    def __init__(self):
        super().__init__()
        self.words = nn.Embedding(40, 16)
        self.layer = nn.Linear(16, 16)

    def forward(self, ids):
        return functional.linear(self.layer(self.words(ids)), self.words.weight)


def test_a_table_that_other_code_reads_stays_in_float():
    torch.manual_seed(0)
    model = Reader().eval()
    modules = quantize_model(model, include=["words", "layer"], formats=[INT4])
    calibrate(model, modules, [IDS])
    assert modules["words"].reach == "read"
    set_formats(modules, dict.fromkeys(modules, (INT4, INT4)))
    assert modules["words"].formats == (FLOAT, FLOAT)
    assert modules["layer"].formats == (INT4, INT4)


def test_calibrating_again_under_an_assignment_takes_a_table_for_looked_up():
    model = llama()
    modules = quantized(model)
    set_formats(modules, dict.fromkeys(modules, (INT8, FLOAT)))
    calibrate(model, modules, [{"input_ids": IDS}], learned=False)
    assert modules[TABLE].reach == "looked_up" and modules[TABLE].formats == (INT8, FLOAT)


def test_tables_that_are_more_than_look_ups_are_no_layers():
    model = nn.ModuleDict({"clipped": nn.Embedding(4, 8, max_norm=1.0), "layer": nn.Linear(8, 8)})
    assert list(find_layers(model, tables=True)) == ["layer"]
    with pytest.raises(UserError, match="'clipped' matches no layer"):
        find_layers(model, include=["clipped"])
