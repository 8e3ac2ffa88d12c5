import numpy as np
import pytest
import torch
from scipy.special import xlogy

from policy.budget import Budget
from policy.space import build_space
from quant.errors import UserError
from quant.formats import parse_search_space
from trainer.search.config import ReinforceConfig, resolve_target
from trainer.search.search_state import Phases, Search
from trainer.search.sensitivity import sensitivity_prior

NAMES = ["a", "b", "c", "d"]
COSTS = np.array([[2.0, 4.0, 8.0], [1.0, 2.0, 4.0], [2.0, 4.0, 8.0], [3.0, 6.0, 12.0]])
BUDGET = Budget((COSTS,), (20.0,))


def make(config, phases, prior=None, pressure=None, seed=0):
    space = build_space(NAMES, parse_search_space("2,4,8"))
    generator = torch.Generator().manual_seed(seed)
    return Search(space, BUDGET, config, phases, generator, prior, pressure)


@pytest.mark.parametrize(
    ("field", "value"),
    [("method", "mesured"), ("policy_prior", "measure"), ("reward_quality", "acc"), ("cost_gradient", "exact"),
     ("cost_function", "tunas"), ("cost_type", "latency"), ("entropy_schedule_type", "cos")],
)  # fmt: skip
def test_a_misspelt_word_is_refused_with_the_choices(field, value):
    with pytest.raises(ValueError, match=rf"^{field} must be one of \w+, \w+.*, got '{value}'"):
        ReinforceConfig(**{"target_bits": 4, field: value})
    assert ReinforceConfig(target_bits=[3.0, 4.0]).target_bits == (3.0, 4.0)


def test_finds_the_layer_that_needs_bits():
    """Only layer b gains from bits: the policy must give it 8 and stay within the budget."""
    config = ReinforceConfig(target_bits=4, policy_prior="none", rl_learning_rate=0.1, cost_beta=0.2)
    search = make(config, Phases(0, 300, 300))
    for step in range(300):
        choices = torch.stack([search.draw(), search.draw()])
        search.learn(choices, [0.2 + 0.3 * choice[1].item() for choice in choices], step)
    best = search.best()
    assert best[1] == 2
    assert search.cost(best) <= 20.0


def test_state_continues_identically():
    config = ReinforceConfig(target_bits=4)

    def go(search, steps):
        for step in steps:
            choices = torch.stack([search.draw(), search.draw()])
            search.learn(choices, [0.3 + 0.1 * choice.sum().item() / 8 for choice in choices], step)

    whole = make(config, Phases(0, 20, 20), seed=3)
    go(whole, range(20))
    first = make(config, Phases(0, 20, 20), seed=3)
    go(first, range(7))
    second = make(config, Phases(0, 20, 20), seed=99)
    second.load_state_dict(first.state_dict())
    go(second, range(7, 20))
    assert torch.equal(second.policy.logits, whole.policy.logits)
    assert torch.equal(second.draw(), whole.draw())


def test_prior_follows_the_measurement_at_the_target_cost():
    sensitivity = np.array([[0.9, 0.1, 0.0], [0.01, 0.0, 0.0], [0.05, 0.01, 0.0], [0.02, 0.01, 0.0]])
    logits, pressure = sensitivity_prior(sensitivity, BUDGET)
    probabilities = logits.softmax(1).numpy()
    assert (probabilities * COSTS).sum() == pytest.approx(20.0, rel=1e-6)
    entropy = -xlogy(probabilities, probabilities).sum()
    assert entropy == pytest.approx(0.2 * len(COSTS) * np.log(3), rel=1e-3)
    assert probabilities[0, 0] < 0.01  # 2 bits ruin layer a
    search = make(ReinforceConfig(target_bits=4), Phases(0, 10, 10), logits, pressure)
    from policy.solve import solve_assignment

    assert search.best() == solve_assignment(-sensitivity, COSTS, 20.0)


def test_phases_add_up():
    phases = Phases.of(ReinforceConfig(target_bits=4, settle_fraction=0.5), 400)
    assert [phases.name(step) for step in (0, phases.delay - 1, phases.delay, 199, 200, 399)] == [
        "delay", "delay", "search", "search", "settle", "settle",
    ]  # fmt: skip
    assert Phases.of(ReinforceConfig.fliqs(target_bits=4), 400) == Phases(100, 400, 400)
    assert Phases.of(ReinforceConfig(target_bits=4), 400) == Phases(50, 100, 400)
    assert Phases.of(ReinforceConfig(target_bits=4), 400, architecture=True) == Phases(12, 25, 400)
    assert Phases.of(ReinforceConfig(target_bits=4), 6, architecture=True) == Phases(0, 1, 6)
    with pytest.raises(ValueError, match="--delay_steps 300 leaves the policy no step"):
        Phases.of(ReinforceConfig(target_bits=4, delay_steps=300), 400)


@pytest.mark.parametrize(
    "changes", [{}, {"cost_target": 1.0, "target_bits": 4.0}, {"target_bits": 4, "settle_fraction": 1.0}]
)
def test_contradictory_configurations_are_refused(changes):
    with pytest.raises(ValueError, match=r"cost_target|settle_fraction"):
        ReinforceConfig(**changes)


def test_a_target_outside_the_range_states_the_range():
    from cost.profile import LayerProfile

    profiles = [LayerProfile("a", 1000, 2**20, 1, 4, "linear", 1)]
    space = build_space(["a"], parse_search_space("4,8"))
    assert resolve_target(space, profiles, "memory", None, 4) == pytest.approx(0.5)
    with pytest.raises(UserError, match=r"--cost_target 2 MiB, .* cost 0\.5 to 1 MiB"):
        resolve_target(space, profiles, "memory", 2.0, None)
