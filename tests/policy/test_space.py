"""Search spaces: which layers a choice reaches, and that costs add up."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cost.cost import COSTS
from cost.profile import LayerProfile
from policy.solve import solve_assignment
from policy.space import build_space, uniform_cost
from quant.errors import UserError
from quant.formats import FLOAT, parse_format, parse_search_space

LAYERS = ["stem", "body.0", "body.1", "head"]
INT4, INT8, FP8 = (parse_format(name) for name in ("int4", "int8", "fp8"))


def profiles(layers=LAYERS, attention=0):
    return [
        LayerProfile(name, 1000 * (i + 1) * 7, 1000 * (i + 1), 7, 8, "linear", 1, attention)
        for i, name in enumerate(layers)
    ]


def test_weights_in_groups_go_with_inputs_in_float():
    group = parse_format("int4g32")
    paired = build_space(LAYERS, [group, INT8]).decisions[0].choices
    assert paired == ((group, FLOAT), (INT8, INT8))
    apart = build_space(LAYERS, [group, INT8], separate_activations=True).decisions[0].choices
    assert apart == ((group, FLOAT), (group, INT8), (INT8, FLOAT), (INT8, INT8))


def test_decisions_whose_layers_have_as_many_groups_of_channels_also_mix_formats():
    int2, int4_int2 = parse_format("int2"), parse_format("int4+int2")
    groups = {"stem": 2, "body.0": 2, "body.1": 2}  # the head is an embedding, say
    space = build_space(LAYERS, [int2, INT4], channel_groups=groups)
    mixed, whole = space.decisions[0].choices, space.decisions[3].choices
    assert mixed == ((int2, int2), (INT4, INT4), (int4_int2, INT4))
    assert whole == ((int2, int2), (INT4, INT4), (INT4, INT4))  # the last is repeated
    blocks = {"ends": ["stem", "head"], "body": ["body.0", "body.1"]}
    ends, body = build_space(LAYERS, [int2, INT4], blocks, channel_groups=groups).decisions
    assert (ends.choices, body.choices) == (whole, mixed)
    table = space.cost_table(profiles(), "memory")
    np.testing.assert_allclose(table[0, 2], table[0, :2].mean(), rtol=1e-12)


def test_a_decision_per_layer():
    space = build_space(LAYERS, [INT4, INT8])
    assert [(d.name, d.layers) for d in space.decisions] == [(name, (name,)) for name in LAYERS]
    assert (space.num_decisions, space.num_choices) == (4, 2)
    assert space.assignment([0, 1, 1, 0]) == dict(
        zip(LAYERS, [(INT4, INT4), (INT8, INT8), (INT8, INT8), (INT4, INT4)], strict=True)
    )


def test_one_decision_for_all():
    space = build_space(LAYERS, [INT4, INT8], "single")
    assert space.assignment([1]) == dict.fromkeys(LAYERS, (INT8, INT8))


def test_blocks_share_a_choice():
    space = build_space(LAYERS, [INT4, INT8], {"body": ["body.0", "body.1"], "ends": ["stem", "head"]})
    assert space.assignment([1, 0]) == {
        "body.0": (INT8, INT8),
        "body.1": (INT8, INT8),
        "stem": (INT4, INT4),
        "head": (INT4, INT4),
    }


def test_weight_only_leaves_activations_in_float():
    space = build_space(LAYERS, [INT4, FP8], weight_only=True)
    assert space.decisions[0].choices == ((INT4, FLOAT), (FP8, FLOAT))


def test_separate_activations_are_every_pair():
    space = build_space(LAYERS, [INT4, FP8], separate_activations=True)
    assert space.decisions[0].choices == ((INT4, INT4), (INT4, FP8), (FP8, INT4), (FP8, FP8))


@pytest.mark.parametrize(
    ("partition", "fault"),
    [
        ({"a": LAYERS, "b": []}, "blocks without a layer: b"),
        ({"a": LAYERS, "b": ["tail"]}, "unknown layers: tail"),
        ({"a": ["stem", "head"]}, r"layers in no block: body\.0, body\.1"),
        ({"a": LAYERS, "b": ["head"]}, "layers in several blocks: head"),
        ({"a": [*LAYERS, "stem"]}, "layers in several blocks: stem"),
        ("blocks", "'blocks': choose from layer, single"),
    ],
)
def test_partitions_that_do_not_cover_are_refused(partition, fault):
    with pytest.raises(UserError, match=fault):
        build_space(LAYERS, [INT4, INT8], partition)


def test_contradicting_requests_are_refused():
    with pytest.raises(UserError, match="no layers"):
        build_space([], [INT4, INT8])
    with pytest.raises(UserError, match="weight-only"):
        build_space(LAYERS, [INT4, INT8], weight_only=True, separate_activations=True)


@st.composite
def spaces(draw):
    formats = ["int2", "int3", "int8", "e4m3", "e2m1", "mxfp4", "nvfp4", "float"]
    names = draw(st.lists(st.sampled_from(formats), min_size=2, unique=True))
    kind = draw(st.sampled_from(["weight_only", "separate_activations", "both"]))
    partition = draw(st.sampled_from(["layer", "single", {"body": LAYERS[1:3], "ends": [LAYERS[0], LAYERS[3]]}]))
    formats = parse_search_space(",".join(names))
    space = build_space(LAYERS, formats, partition, **({kind: True} if kind != "both" else {}))
    return space, [draw(st.integers(0, space.num_choices - 1)) for _ in space.decisions]


@pytest.mark.parametrize("cost_type", COSTS)
@settings(deadline=None, derandomize=True)
@given(drawn=spaces(), attention=st.sampled_from([0, 12345]))
def test_table_range_and_cost_agree(cost_type, drawn, attention):
    space, choice = drawn
    records = profiles(attention=attention)
    table = space.cost_table(records, cost_type)
    assert table.shape == (space.num_decisions, space.num_choices)
    cost = COSTS[cost_type](records, space.assignment(choice))
    assert table[np.arange(len(choice)), choice].sum() == pytest.approx(cost, rel=1e-14)
    low, high = space.cost_range(records, cost_type)
    assert low * (1 - 1e-14) <= cost <= high * (1 + 1e-14)
    assert space.choice(space.assignment(choice)) == choice


def test_a_choice_needs_formats_of_the_space():
    space = build_space(LAYERS, [INT4, INT8], {"body": LAYERS[1:3], "ends": [LAYERS[0], LAYERS[3]]})
    assignment = space.assignment([0, 1])
    with pytest.raises(ValueError, match="body cannot have"):
        space.choice(assignment | {"body.0": (INT8, INT8)})
    with pytest.raises(ValueError, match="ends cannot have e4m3/e4m3"):
        space.choice(assignment | dict.fromkeys(["stem", "head"], (FP8, FP8)))
    with pytest.raises(ValueError):
        space.assignment([0])


@pytest.mark.parametrize("cost_type", COSTS)
@pytest.mark.parametrize("bits", [4, 8, 16])
def test_uniform_cost_is_the_cost_of_a_uniform_assignment(cost_type, bits):
    fmt = parse_format(bits)
    records = profiles(attention=99)
    assert uniform_cost(records, bits, cost_type) == COSTS[cost_type](records, dict.fromkeys(LAYERS, (fmt, fmt)))
    weight_only = COSTS[cost_type](records, dict.fromkeys(LAYERS, (fmt, FLOAT)))
    assert uniform_cost(records, bits, cost_type, weight_only=True) == weight_only


def test_uniform_cost_takes_fractions():
    records = profiles()
    assert uniform_cost(records, 4.5, "memory") == 10_000 * 4.5 / 8 / 2**20
    assert uniform_cost(records, 4.5, "compute") == 70_000 * 4.5**2 / 1e9
    for bits in (0, -1, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="bits"):
            uniform_cost(records, bits, "memory")


@pytest.mark.parametrize("cost_type", COSTS)
@pytest.mark.parametrize("index", range(3))
def test_the_uniform_cost_is_a_target_that_its_own_assignment_meets(cost_type, index):
    """And the cost then reported, summed by layer, is not above the target even in the last bit."""
    layers = [f"layer.{i}" for i in range(70)]
    records = [LayerProfile(name, 7 * 3**i % 10007, 3**i % 10007, 7, 8, "linear", 1) for i, name in enumerate(layers)]
    space = build_space(layers, [parse_format(bits) for bits in (3, 5, 7)])
    target = uniform_cost(records, (3, 5, 7)[index], cost_type)
    values = np.eye(3)[[index] * 70]
    choice = solve_assignment(values, space.cost_table(records, cost_type), target)
    assert choice == [index] * 70
    assert COSTS[cost_type](records, space.assignment(choice)) <= target


def test_caches_are_decisions_of_their_own_with_their_own_formats():
    formats, caches = parse_search_space("int3,int4,int8"), {"a.kv_cache": parse_search_space("int4,e4m3")}
    space = build_space(["a", "b", "a.kv_cache"], formats, "single", weight_only=True, caches=caches)
    assert [(decision.name, decision.layers) for decision in space.decisions] == [
        ("model", ("a", "b")),
        ("a.kv_cache", ("a.kv_cache",)),
    ]
    names = [[(str(weight), str(act)) for weight, act in decision.choices] for decision in space.decisions]
    assert names[1] == [("int4", "float"), ("e4m3", "float"), ("e4m3", "float")]  # filled up with the last one
    profiles = [LayerProfile(name, 0, 1000, 1, 1, "linear", 1) for name in ("a", "b", "a.kv_cache")]
    table = space.cost_table(profiles, "memory") * 2**20
    assert table.tolist() == [[750, 1000, 2000], [500, 1000, 1000]]
    chosen = space.assignment([0, 2])
    assert space.choice(chosen) == [0, 1] and chosen["a.kv_cache"] == (parse_format("e4m3"), FLOAT)
