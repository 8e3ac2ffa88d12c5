"""Costs computed by hand, and properties of all rewards."""

import json
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel

from cost.cost import (
    COSTS,
    REWARDS,
    assignment_from_json,
    assignment_to_json,
    compute_cost,
    cost_of_bits,
    memory_cost,
    overhead_memory,
    unsearched_memory,
)
from cost.profile import LayerProfile, profile_model
from quant.convert import quantize_model, set_formats
from quant.errors import UserError
from quant.export.packed import packed_sizes, write_packed
from quant.formats import FLOAT, parse_format, parse_search_space

MIB = 2**20


def layer(name, params=1024, positions=3, channels=8, attention=0):
    return LayerProfile(name, params * positions, params, positions, channels, "linear", 1, attention)


def formats(**pairs):
    return {name: tuple(parse_format(part) for part in pair.split("/")) for name, pair in pairs.items()}


def test_two_layers_by_hand():
    model = nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 2, bias=False))
    profiles = profile_model(model, torch.zeros(1, 4))
    assignment = {"0": formats(x="int4/int8")["x"], "1": formats(x="int2/float")["x"]}
    assert memory_cost(profiles, assignment) == (32 * 4 + 16 * 2) / 8 / MIB
    assert compute_cost(profiles, assignment) == (32 * 4 * 8 + 16 * 2 * 16) / 1e9


@pytest.mark.parametrize("name", ["float", "0", "fp16", "bf16", "int16"])
def test_float_costs_sixteen_bits(name):
    assert memory_cost([layer("a")], formats(a=f"{name}/{name}")) == 1024 * 2 / MIB
    assert compute_cost([layer("a")], formats(a=f"{name}/{name}")) == 3072 * 256 / 1e9


@pytest.mark.parametrize(("name", "bits"), [("mxfp4", 4.25), ("mxint8", 8.25), ("nvfp4", 4.5), ("e3m2", 6)])
def test_block_formats_charge_effective_bits(name, bits):
    assert memory_cost([layer("a")], formats(a=f"{name}/{name}")) == 1024 * bits / 8 / MIB
    assert compute_cost([layer("a")], formats(a=f"{name}/int8")) == 3072 * bits * 8 / 1e9


@pytest.mark.parametrize(
    ("layer", "shape", "name", "bits"),
    [
        (nn.Linear(40, 3), (40,), "int4g32", 3 * (40 * 4 + 2 * 16)),
        (nn.Linear(40, 3), (40,), "uint3g16", 3 * (40 * 3 + 3 * (16 + 3))),
        (nn.Linear(7, 5), (7,), "int8g32", 5 * (7 * 8 + 16)),
        (nn.Conv2d(3, 6, 3), (3, 5, 5), "int4g16", 6 * (27 * 4 + 2 * 16)),
        (nn.Conv2d(6, 6, 3, groups=6), (6, 5, 5), "mxfp4", 6 * (9 * 4 + 8)),
        (nn.Linear(64, 3), (64,), "int4g32", 3 * (64 * 4 + 2 * 16)),
    ],
)
def test_a_short_last_group_has_a_whole_scale(layer, shape, name, bits, tmp_path):
    """By hand, and in a packed file, whose codes end at whole bytes."""
    profiles = profile_model(nn.Sequential(layer), torch.zeros(1, *shape))
    assignment = formats(**{"0": f"{name}/float"})
    assert memory_cost(profiles, assignment) * MIB * 8 == pytest.approx(bits, rel=1e-12)
    modules = quantize_model(model := nn.Sequential(layer), formats=[parse_format(name)])
    set_formats(modules, assignment)
    verdict = write_packed(path := tmp_path / "model.safetensors", model, modules)["0"]
    assert verdict.weight_bits * layer.weight.numel() == pytest.approx(bits, rel=1e-12)
    sizes = packed_sizes(path)
    assert 0 <= sizes["codes"] + sizes["block_scales"] - bits / 8 < 2


def test_each_group_of_channels_costs_its_own_bits_and_the_number_of_its_group():
    profile = layer("a", params=70, positions=3, channels=7)  # 10 weights a channel, 4 and 3 channels
    mixed = formats(a="int4+int2/int8")
    assert memory_cost([profile], mixed) == pytest.approx((40 * 4 + 30 * 2) / 8 / MIB, rel=1e-12)
    assert compute_cost([profile], mixed) == pytest.approx((40 * 4 + 30 * 2) * 3 * 8 / 1e9, rel=1e-12)
    assert overhead_memory([profile], mixed) == (7 * 4 + 1 + 5) / MIB  # scales, 7 bits in a byte, input
    four = formats(a="int8+int4+int4+int2/float")
    assert overhead_memory([profile], four) == (7 * 4 + 2) / MIB
    assert memory_cost([profile], four) == pytest.approx(10 * (2 * 8 + 2 * 4 + 2 * 4 + 2) / 8 / MIB, rel=1e-12)


def test_attention_is_charged_at_the_activation_width_twice():
    plain, charged = layer("a"), layer("a", attention=500)
    extra = compute_cost([charged], formats(a="int4/int8")) - compute_cost([plain], formats(a="int4/int8"))
    assert extra == pytest.approx(500 * 8 * 8 / 1e9)
    assert memory_cost([charged], formats(a="int4/int8")) == memory_cost([plain], formats(a="int4/int8"))


@pytest.mark.parametrize("cost_type", COSTS)
def test_grouping_and_order_do_not_change_a_cost(cost_type):
    profiles = [layer(str(i), params=3**i, positions=7) for i in range(20)]
    assignment = dict.fromkeys(map(str, range(20)), formats(a="int5/int3")["a"])
    cost = COSTS[cost_type](profiles, assignment)
    assert cost == COSTS[cost_type](profiles[::-1], assignment)
    assert cost == cost_of_bits(profiles, [(5, 3)] * 20, cost_type)


@pytest.mark.parametrize("cost_type", COSTS)
def test_layers_must_agree(cost_type):
    with pytest.raises(ValueError, match="but not both: b"):
        COSTS[cost_type]([layer("a"), layer("b")], formats(a="4/4"))
    with pytest.raises(ValueError, match="but not both: c"):
        COSTS[cost_type]([layer("a")], formats(a="4/4", c="4/4"))


@pytest.mark.parametrize(
    ("pair", "per_channel", "bytes_"),
    [
        ("int4/int8", True, 8 * 4 + 4 + 1),
        ("int4/int8", False, 4 + 4 + 1),
        ("int16/int16", True, 8 * 4 + 4 + 2),
        ("e4m3/e4m3", True, 8 * 4 + 4),
        ("mxfp4/mxfp8", True, 0),
        ("nvfp4/nvfp4", True, 4 + 4),
        ("bf16/fp16", True, 0),
        ("float/float", True, 0),
        ("int8/float", True, 8 * 4),
    ],
)
def test_overhead_by_hand(pair, per_channel, bytes_):
    assert overhead_memory([layer("a")], formats(a=pair), per_channel) == bytes_ / MIB
    twice = overhead_memory([layer("a"), layer("b")], formats(a=pair, b=pair), per_channel)
    assert twice == 2 * bytes_ / MIB


def test_unsearched_is_everything_but_searched_weights():
    model = nn.Sequential(nn.Embedding(10, 4), nn.Linear(4, 6), nn.LayerNorm(6), nn.Linear(6, 2, bias=False))
    assert unsearched_memory(model, ["1", "3"]) == (40 + 6 + 12) * 2 / MIB
    assert unsearched_memory(model, []) == (40 + 24 + 6 + 12 + 12) * 2 / MIB
    model[1].register_parameter("scale", nn.Parameter(torch.ones(1)))
    assert unsearched_memory(model, ["1", "3"]) == (40 + 6 + 12) * 2 / MIB
    with pytest.raises(ValueError, match="no modules of Sequential: 7"):
        unsearched_memory(model, ["7"])


def test_tied_parameters_count_once():
    with torch.device("meta"):
        model = GPT2LMHeadModel(
            GPT2Config(n_embd=8, n_layer=1, n_head=2, vocab_size=50, n_positions=16, bos_token_id=0, eos_token_id=0)
        )
        names = [p.name for p in profile_model(model, {"input_ids": torch.zeros(1, 4, dtype=torch.long)})]
    assert model.lm_head.weight is model.transformer.wte.weight
    everything = sum(p.numel() for p in model.parameters())
    assert unsearched_memory(model, []) == everything * 2 / MIB
    body = [name for name in names if name != "lm_head"]
    weights = sum(model.get_submodule(name).weight.numel() for name in body)
    assert unsearched_memory(model, body) == (everything - weights) * 2 / MIB
    assert unsearched_memory(model, names) == (everything - weights) * 2 / MIB, "the embedding reads its rows in float"


def test_assignments_survive_json():
    every = parse_search_space("int2,int16,e4m3,e5m2,e2m1,e8m2,e1m4,mxfp4,mxint8,nvfp4,bf16,fp16,float")
    assignment = {f"layer.{i}": (weight, FLOAT) for i, weight in enumerate(every)}
    assignment |= {f"other.{i}": (FLOAT, activation) for i, activation in enumerate(every)}
    assert assignment_from_json(json.loads(json.dumps(assignment_to_json(assignment)))) == assignment
    assert assignment_to_json(formats(a="4/fp8")) == {"a": ["int4", "e4m3"]}


@pytest.mark.parametrize("values", [{"a": ["int4", "int99"]}, {"a": ["int4"]}, {"a": "44"}, ["a"], {"a": [None, "4"]}])
def test_other_json_is_refused(values):
    with pytest.raises(UserError, match="assignment") as error:
        assignment_from_json(values)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("name", "under", "over"),
    [
        ("tunas_abs", 0.8 - 2 * 0.25, 0.8 - 2 * 0.5),
        ("one_sided_tunas_abs", 0.8, 0.8 - 2 * 0.5),
        ("soft_exponential", 0.8 / 0.75**2, 0.8 / 1.5**2),
        ("hard_exponential", 0.8, 0.8 / 1.5**2),
    ],
)
def test_rewards_by_hand(name, under, over):
    assert REWARDS[name](0.8, 3.0, 4.0, 2.0) == pytest.approx(under)
    assert REWARDS[name](0.8, 4.0, 4.0, 2.0) == pytest.approx(0.8)
    assert REWARDS[name](0.8, 6.0, 4.0, 2.0) == pytest.approx(over)
    assert REWARDS[name](0.8, 6.0, 4.0, 0.0) == 0.8


qualities = st.floats(1e-6, 1)
costs = st.floats(1e-3, 1e6)
targets = st.floats(1e-3, 1e6)
betas = st.floats(0, 10)


@pytest.mark.parametrize("name", REWARDS)
@settings(deadline=None, derandomize=True)
@given(low=qualities, high=qualities, cost=costs, target=targets, beta=betas)
def test_more_quality_never_lowers_a_reward(name, low, high, cost, target, beta):
    low, high = sorted((low, high))
    assert REWARDS[name](low, cost, target, beta) <= REWARDS[name](high, cost, target, beta)


@pytest.mark.parametrize("name", REWARDS)
@settings(deadline=None, derandomize=True)
@given(quality=qualities, factors=st.tuples(st.floats(1, 1e3), st.floats(1, 1e3)), target=targets, beta=betas)
def test_over_the_target_more_cost_never_raises_a_reward(name, quality, factors, target, beta):
    less, more = (REWARDS[name](quality, target * factor, target, beta) for factor in sorted(factors))
    assert more <= less
    assert math.isfinite(more)


@pytest.mark.parametrize("name", REWARDS)
@pytest.mark.parametrize(
    "arguments",
    [
        (-0.1, 1.0, 1.0, 1.0),
        (0.0, 1.0, 1.0, 1.0),
        (1.1, 1.0, 1.0, 1.0),
        (math.nan, 1.0, 1.0, 1.0),
        (0.5, 1.0, 0.0, 1.0),
        (0.5, 1.0, -1.0, 1.0),
        (0.5, 1.0, 1.0, -0.1),
        (0.5, 1.0, 1.0, math.nan),
        (0.5, math.inf, 1.0, 1.0),
        (0.5, -1.0, 1.0, 1.0),
    ],
)
def test_arguments_outside_their_range_are_refused(name, arguments):
    with pytest.raises(ValueError, match=r"quality|cost"):
        REWARDS[name](*arguments)


def test_soft_exponential_has_no_reward_for_nothing():
    with pytest.raises(ValueError, match="above 0"):
        REWARDS["soft_exponential"](0.5, 0.0, 1.0, 1.0)
    assert REWARDS["hard_exponential"](0.5, 0.0, 1.0, 1.0) == 0.5
