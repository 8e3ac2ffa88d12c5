"""What a model returns as its loss."""

import pytest
import torch
from torch import nn

from quant.errors import UserError
from trainer.training.loss import check_loss, with_gradient, with_loss_first


@pytest.mark.parametrize(("loss", "got"), [(None, "None"), (torch.ones(3), r"a tensor of shape \(3,\)")])
def test_a_loss_that_is_no_scalar_is_named(loss, got):
    with pytest.raises(UserError, match=f"^Linear returns {got} where its loss should be: return"):
        check_loss(loss, nn.Linear(1, 1), devices=1)


def test_each_of_several_devices_returns_a_loss():
    check_loss(torch.ones(2), nn.Linear(1, 1), devices=2)


def test_the_loss_leads_the_outputs_that_the_trainer_takes_apart():
    loss, logits = torch.tensor(1.0), torch.ones(2)
    assert with_loss_first(loss, logits) == (loss, logits)
    assert with_loss_first(loss, (logits,)) == (loss, logits)
    assert with_loss_first(loss, {"logits": 1}) == {"logits": 1}


def test_a_loss_without_a_gradient_gets_one_of_zeros():
    model = nn.Linear(2, 1)
    model.bias.requires_grad_(False)
    loss = with_gradient(torch.tensor(3.0), model)
    loss.backward()
    assert loss == 3 and torch.equal(model.weight.grad, torch.zeros(1, 2))
    with torch.no_grad():
        assert not with_gradient(torch.tensor(3.0), model).requires_grad
    own = model(torch.ones(2)).sum()
    assert with_gradient(own, model) is own
