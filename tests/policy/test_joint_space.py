"""Cost of joint choices of architecture and formats: by hand, by profiling the sized model, and by enumeration."""

import itertools

import pytest
import torch
from torch import nn

from cost.cost import compute_cost, memory_cost
from cost.profile import profile_model
from policy.budget import Limit
from policy.joint_space import JointSpace, layer_cost
from policy.space import build_space
from quant.convert import calibrate, quantize_model
from quant.elastic import ElasticNet
from quant.errors import UserError
from quant.formats import parse_search_space

X = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(0))


def chain():
    """Two convolutions on 4 x 4 pixels and a head: 3 -> 8 -> 4 channels -> 2 classes."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(8, 4, 1),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(4, 2),
    )


def joint(formats="2,4", model=None, **choices):
    model = chain() if model is None else model
    net = ElasticNet(model, X, **{"widths": (0.5, 1), **choices})
    parsed = parse_search_space(formats)
    modules = quantize_model(model, formats=parsed)
    calibrate(model, modules, [X])
    return JointSpace.of(build_space(list(modules), parsed), net), profile_model(model, X, modules), modules


def test_the_cost_of_a_small_space_by_hand():
    space, profiles, _ = joint()
    assert space.names == ["0", "2", "5", "0 width", "2 width"]
    budget = space.budget(profiles, "compute", 1.0, [])
    for a, b, c, first, second in itertools.product((2, 4), (2, 4), (2, 4), (4, 8), (2, 4)):
        choice = [*((bits == 4) for bits in (a, b, c)), first == 8, second == 4]
        by_hand = 16 * 27 * first * a * a + 16 * first * second * b * b + 2 * second * c * c
        assert budget.costs([int(index) for index in choice])[0] == pytest.approx(by_hand / 1e9, rel=1e-15)
    low, high = space.cost_range(profiles, "compute")
    assert (low, high) == (budget.costs([0] * 5)[0], budget.costs([1] * 5)[0])
    assert space.cost_range(profiles, "memory")[1] * 2**23 == pytest.approx(4 * (216 + 32 + 8))


def residual(channels=6):
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Conv2d(channels, channels, 3, padding=1), nn.Conv2d(channels, channels, 3, padding=1)

        def forward(self, x):
            return x + self.b(self.a(x).relu())

    torch.manual_seed(0)
    stem, head = nn.Conv2d(3, channels, 1), nn.Conv2d(channels, 2, 1)
    return nn.Sequential(stem, nn.Sequential(Block(), Block()), head)


@pytest.mark.parametrize("cost_type", ["compute", "memory"])
def test_costs_equal_those_of_the_profiled_model(cost_type):
    space, profiles, modules = joint(model=residual(), kernels=(1, 3), depths=(1, 2))
    limit = Limit("memory", "MiB", 1.0, lambda layer, pair: 0.0)
    budget = space.budget(profiles, cost_type, 1.0, [limit])
    cost = {"compute": compute_cost, "memory": memory_cost}[cost_type]
    generator = torch.Generator().manual_seed(0)
    draws = torch.randint(space.num_choices, (20, space.num_decisions), generator=generator).tolist()
    for choice in [*draws, [0] * space.num_decisions]:
        space.apply(modules, choice)
        kept = {name: modules[name] for name in space.kept(choice)}
        assert {name: module.formats for name, module in kept.items()} == space.assignment(choice)
        sized = profile_model(space.net.model, X, kept)
        own, memory = budget.costs(choice)
        assert own == pytest.approx(cost(sized, space.assignment(choice)), rel=1e-14)
        assert memory == pytest.approx(memory_cost(sized, space.assignment(choice)), rel=1e-14)


def test_the_last_choice_of_a_short_decision_is_repeated():
    space, profiles, _ = joint("2,4,8")
    budget = space.budget(profiles, "compute", 1.0, [])
    assert space.num_choices == 3
    assert budget.costs([0, 0, 0, 1, 1]) == budget.costs([0, 0, 0, 2, 2])
    assert space.structure([0, 0, 0, 2, 0]) == [1, 0]


def test_a_measured_cost_of_a_smaller_layer_is_its_share_of_the_multiplications():
    space, profiles, modules = joint(model=residual(), kernels=(1, 3), depths=(1, 2))
    times = {profile.name: 1.0 + index for index, profile in enumerate(profiles)}
    limit = Limit("latency", "ms", 5.0, lambda layer, pair: times[layer] * pair[0].bits)
    budget = space.budget(profiles, "compute", 1.0, [limit])
    macs = {profile.name: profile.macs for profile in profiles}
    for choice in ([0] * space.num_decisions, [space.num_choices - 1] * space.num_decisions):
        space.apply(modules, choice)
        assignment = space.assignment(choice)
        sized = profile_model(space.net.model, X, {name: modules[name] for name in assignment})
        bits = {name: pair[0].bits for name, pair in assignment.items()}
        expected = sum(times[one.name] * bits[one.name] * one.macs / macs[one.name] for one in sized)
        assert budget.costs(choice)[1] == pytest.approx(expected, rel=1e-14)


def test_weights_in_groups_are_refused():
    _, profiles, _ = joint()
    model = chain()
    net = ElasticNet(model, X, widths=(0.5, 1))
    with pytest.raises(UserError, match="int4g32"):
        JointSpace.of(build_space(["0", "2", "5"], parse_search_space("int4g32,8")), net)
    assert layer_cost("memory")(profiles[0], parse_search_space("8,4")[:1] * 2) == 216 / 2**20
