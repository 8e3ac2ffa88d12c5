"""The policy against torch.distributions."""

import math

import pytest
import torch
from torch.distributions import Categorical

from policy.simple_policy import SimplePolicy

PRIOR = torch.tensor([[0.0, 1.0, -2.0], [3.0, 0.0, 0.0]], dtype=torch.float64)


def test_starts_uniform_or_at_the_prior():
    torch.testing.assert_close(SimplePolicy(2, 4).probabilities(), torch.full((2, 4), 0.25, dtype=torch.float64))
    policy = SimplePolicy(2, 3, PRIOR)
    torch.testing.assert_close(policy.probabilities(), PRIOR.softmax(-1))
    assert policy.mode().tolist() == [1, 0]
    assert policy.logits.dtype == torch.float64
    policy.logits.data.zero_()
    assert PRIOR.abs().sum() == 6  # a copy


@pytest.mark.parametrize("prior", [PRIOR[:1], PRIOR.T, PRIOR.log(), PRIOR / 0])
def test_a_prior_that_does_not_fit_is_refused(prior):
    with pytest.raises(ValueError, match="prior"):
        SimplePolicy(2, 3, prior)


def test_log_prob_and_entropy_are_summed_over_decisions():
    policy, oracle = SimplePolicy(2, 3, PRIOR), Categorical(logits=PRIOR)
    choices = torch.cartesian_prod(torch.arange(3), torch.arange(3))
    torch.testing.assert_close(policy.log_prob(choices), oracle.log_prob(choices).sum(-1))
    torch.testing.assert_close(policy.log_prob(choices).exp().sum().item(), 1.0)
    torch.testing.assert_close(policy.log_prob(choices[5]), policy.log_prob(choices)[5])
    torch.testing.assert_close(policy.entropy(), oracle.entropy().sum())
    with pytest.raises(RuntimeError):
        policy.log_prob(choices[:, :1])


def test_samples_follow_the_probabilities_and_the_seed():
    policy = SimplePolicy(2, 3, PRIOR)
    generator = torch.Generator().manual_seed(0)
    draws = torch.stack([policy.sample(generator) for _ in range(4000)])
    assert draws.dtype == torch.int64
    frequencies = torch.nn.functional.one_hot(draws, 3).double().mean(0)
    torch.testing.assert_close(frequencies, policy.probabilities().detach(), atol=4 * math.sqrt(0.25 / 4000), rtol=0)
    generator.manual_seed(0)
    assert torch.equal(draws[:50], torch.stack([policy.sample(generator) for _ in range(50)]))


def test_a_choice_of_vanishing_probability_keeps_its_gradient():
    policy = SimplePolicy(1, 2, torch.tensor([[0.0, -900.0]]))
    log_prob = policy.log_prob(torch.tensor([1]))
    log_prob.backward()
    assert log_prob.item() == -900
    torch.testing.assert_close(policy.logits.grad, torch.tensor([[-1.0, 1.0]], dtype=torch.float64))
    policy.logits.grad = None
    policy.entropy().backward()
    assert policy.logits.grad.isfinite().all()
