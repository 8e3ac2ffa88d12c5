"""Exact checks of the policy gradient, its baselines and schedules, and a toy search."""

import itertools
import math

import pytest
import torch
from safetensors.torch import load, save

from policy.reinforce import Reinforce, entropy_weight
from policy.simple_policy import SimplePolicy
from quant.errors import UserError

REWARDS = torch.tensor([[0.1, 0.9, 0.3, 0.2], [0.5, 0.4, 0.2, 0.8], [0.7, 0.1, 0.6, 0.0]], dtype=torch.float64)


def reward(choice):
    """Additive: the best choice is the best of each decision."""
    return REWARDS.gather(1, choice.unsqueeze(-1)).sum()


def search(baseline, draws, steps=500, seed=0, **options):
    policy = SimplePolicy(3, 4)
    settings = {"learning_rate": 0.05, "schedule": "cosine", "max_entropy_beta": 0.01, "total_steps": steps} | options
    reinforce = Reinforce(policy, **settings, baseline=baseline)
    generator = torch.Generator().manual_seed(seed)
    for step in range(steps):
        choices = torch.stack([policy.sample(generator) for _ in range(draws)])
        reinforce.step(choices, torch.stack([reward(choice) for choice in choices]), step)
    return policy


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(("baseline", "draws"), [("leave_one_out", 2), ("leave_one_out", 4), ("ema", 1), ("ema", 2)])
def test_solves_a_toy_search(baseline, draws, seed):
    policy = search(baseline, draws, seed=seed)
    assert torch.equal(policy.mode(), REWARDS.argmax(1))
    assert policy.probabilities().max(1).values.min() > 0.6


def test_the_same_seed_gives_the_same_policy():
    first, second, other = (search("ema", 1, steps=20, seed=seed).logits for seed in (0, 0, 1))
    assert torch.equal(first, second)
    assert not torch.equal(first, other)


def gradient(policy, choices, rewards, baseline="leave_one_out", beta=0.0):
    """What one step leaves in logits.grad, with the policy put back."""
    before = policy.logits.detach().clone()
    Reinforce(policy, 0.1, "constant", beta, 1, baseline).step(choices, rewards, 0)
    with torch.no_grad():
        policy.logits.copy_(before)
    return policy.logits.grad.clone()


def test_the_expected_gradient_is_that_of_the_expected_reward():
    torch.manual_seed(0)
    policy = SimplePolicy(2, 3, torch.randn(2, 3))
    table = torch.randn(3, 3, dtype=torch.float64)  # rewards that are not additive
    choices = list(itertools.product(range(3), repeat=2))
    mean = torch.zeros(2, 3, dtype=torch.float64)
    for pair in itertools.product(choices, repeat=2):
        draws = torch.tensor(pair)
        rewards = torch.stack([table[tuple(choice)] for choice in pair])
        mean += policy.log_prob(draws).sum().exp().detach() * gradient(policy, draws, rewards)
    policy.logits.grad = None
    expected_reward = sum(policy.log_prob(torch.tensor(choice)).exp() * table[choice] for choice in choices)
    (-expected_reward).backward()
    torch.testing.assert_close(mean, policy.logits.grad, rtol=1e-10, atol=1e-12)


def test_one_gradient_by_hand():
    policy = SimplePolicy(2, 2)
    draws, rewards = torch.tensor([[0, 1], [1, 1], [0, 0]]), torch.tensor([1.0, 3.0, 8.0])
    advantages = [1 - 5.5, 3 - 4.5, 8 - 2]
    expected = torch.zeros(2, 2, dtype=torch.float64)
    for choice, advantage in zip(draws, advantages, strict=True):
        for decision, index in enumerate(choice):
            expected[decision] += advantage * 0.5 / 3  # d log p / d logit = onehot - p
            expected[decision, index] -= advantage / 3
    torch.testing.assert_close(gradient(policy, draws, rewards), expected)


def test_the_entropy_is_a_penalty():
    policy = SimplePolicy(1, 3, torch.tensor([[1.0, 0.0, -1.0]]))
    equal = torch.ones(2, dtype=torch.float64)  # no advantage: the entropy alone moves the policy
    actual = gradient(policy, torch.tensor([[0], [1]]), equal, beta=0.5)
    policy.logits.grad = None
    (0.5 * policy.entropy()).backward()
    torch.testing.assert_close(actual, policy.logits.grad)
    entropy = policy.entropy().item()
    reinforce = Reinforce(policy, 0.1, "constant", 0.5, 10)
    logs = [reinforce.step(torch.tensor([[0], [1]]), equal, step) for step in range(10)]
    assert logs[0]["entropy"] == entropy > logs[-1]["entropy"] > policy.entropy().item()
    assert logs[0]["policy_loss"] == pytest.approx(0.5 * entropy)
    assert {log["entropy_weight"] for log in logs} == {0.5}


def test_the_running_baseline_is_from_before_the_update():
    reinforce = Reinforce(SimplePolicy(1, 2), 0.1, "constant", 0.0, 10, "ema", ema_decay=0.9)
    choice = torch.tensor([[0]])
    assert reinforce.step(choice, torch.tensor([1.0]), 0)["advantage"] == 0
    assert reinforce.step(choice, torch.tensor([3.0]), 1)["advantage"] == 2
    assert reinforce.step(choice, torch.tensor([3.0]), 2)["advantage"] == pytest.approx(3 - 1.2)


def test_leave_one_out_advantages():
    reinforce = Reinforce(SimplePolicy(1, 2), 0.1, "constant", 0.0, 10)
    actual = reinforce.advantages(torch.tensor([1.0, 2.0, 6.0]))
    torch.testing.assert_close(actual, torch.tensor([1 - 4.0, 2 - 3.5, 6 - 1.5], dtype=torch.float64))


def test_every_decision_learns_as_fast_as_if_alone():
    """Log-probabilities are summed: a mean would divide each decision's gradient by their number."""
    rewards = torch.tensor([0.0, 1.0])
    one = gradient(SimplePolicy(1, 2), torch.tensor([[0], [1]]), rewards)
    many = gradient(SimplePolicy(5, 2), torch.tensor([[0] * 5, [1] * 5]), rewards)
    torch.testing.assert_close(many, one.expand(5, 2))


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ("linear", [0, 0.5, 1.0, 1.5]),
        ("cosine", [0, 1 - math.sqrt(0.5), 1.0, 1 + math.sqrt(0.5)]),
        ("constant", [2, 2, 2, 2]),
        ("heaviside", [0, 0, 2, 2]),
    ],
)
def test_schedules(schedule, expected):
    assert [entropy_weight(schedule, step, 4, 2.0) for step in range(4)] == pytest.approx(expected)
    for step in (-1, 4):
        with pytest.raises(ValueError, match=r"step must be in \[0, 4\)"):
            entropy_weight(schedule, step, 4, 2.0)


def test_an_unknown_schedule_names_the_choices():
    with pytest.raises(UserError, match="'sine': choose from linear, cosine, constant, heaviside"):
        entropy_weight("sine", 0, 4, 2.0)
    with pytest.raises(UserError, match="sine"):
        Reinforce(SimplePolicy(1, 2), 0.1, "sine", 0.0, 10)


@pytest.mark.parametrize(
    "option",
    [{"max_entropy_beta": -1}, {"ema_decay": 1}, {"baseline": "none"}, {"learning_rate": -1}, {"total_steps": 0}],
)
def test_settings_outside_their_range_are_refused(option):
    defaults = {"learning_rate": 0.1, "schedule": "cosine", "max_entropy_beta": 0.0, "total_steps": 10}
    with pytest.raises(ValueError):
        Reinforce(SimplePolicy(1, 2), **(defaults | option))


@pytest.mark.parametrize(
    ("baseline", "choices", "rewards"),
    [
        ("leave_one_out", [[0]], [1.0]),
        ("leave_one_out", [[0], [1]], [1.0, math.nan]),
        ("leave_one_out", [[0]], [1.0, 2.0]),
        ("ema", [[0]], [math.inf]),
        ("ema", [0], 1.0),
    ],
)
def test_rewards_that_do_not_fit_are_refused(baseline, choices, rewards):
    policy = SimplePolicy(1, 2)
    reinforce = Reinforce(policy, 0.1, "constant", 0.0, 10, baseline)
    with pytest.raises(ValueError, match=r"reward|draws"):
        reinforce.step(torch.tensor(choices), torch.tensor(rewards), 0)
    assert reinforce.ema_reward is None
    assert torch.equal(policy.logits, torch.zeros(1, 2))


@pytest.mark.parametrize("baseline", ["leave_one_out", "ema"])
@pytest.mark.parametrize("stop", [0, 7])
def test_a_restored_state_continues_identically(baseline, stop):
    def make():
        policy = SimplePolicy(3, 4)
        return Reinforce(policy, 0.05, "cosine", 0.1, 20, baseline)

    def run(reinforce, steps):
        for step in steps:
            choices = torch.randint(4, (2, 3), generator=torch.Generator().manual_seed(step))
            reinforce.step(choices, torch.stack([reward(choice) for choice in choices]), step)

    whole, first, second = make(), make(), make()
    run(whole, range(20))
    run(first, range(stop))
    saved = save(first.state_dict())
    run(first, range(stop, 20))  # what was saved is a copy
    second.load_state_dict(load(saved))
    run(second, range(stop, 20))
    torch.testing.assert_close(second.state_dict(), whole.state_dict(), rtol=0, atol=0)
