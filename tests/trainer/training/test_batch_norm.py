import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from trainer.training.batch_norm import (
    LEAST_TELLING,
    ignore_recomputation,
    recalibrate_batch_norm,
    statistics_of_batch,
)


def test_batch_norm_is_recalibrated_to_the_plain_mean():
    model = nn.Sequential(nn.BatchNorm1d(3), nn.Dropout(0.5))
    batches = [torch.randn(16, 3) * 2 + 1 for _ in range(4)]
    model[0].running_mean.fill_(9)
    assert recalibrate_batch_norm(model, batches) == 1
    torch.testing.assert_close(model[0].running_mean, torch.stack([b.mean(0) for b in batches]).mean(0))
    torch.testing.assert_close(model[0].running_var, torch.stack([b.var(0) for b in batches]).mean(0))
    assert model.training and model[0].momentum == 0.1


def test_frozen_norms_keep_their_statistics_and_their_mode():
    model = nn.Sequential(nn.BatchNorm1d(3), nn.BatchNorm1d(3))
    model[0].eval()
    batch = torch.randn(16, 3) * 2 + 1
    assert recalibrate_batch_norm(model, [batch]) == 1
    assert not model[0].running_mean.any() and model[1].running_mean.any()
    assert model.training and model[1].training and not model[0].training


def test_a_model_in_eval_mode_is_recalibrated_and_stays_in_it():
    model = nn.Sequential(nn.BatchNorm1d(3), nn.BatchNorm1d(3)).eval()
    assert recalibrate_batch_norm(model, [torch.randn(16, 3) * 2 + 1]) == 2
    assert model[0].running_mean.any() and not any(module.training for module in model.modules())


def test_a_batch_is_normalized_by_its_own_statistics_and_leaves_nothing_behind():
    model = nn.Sequential(nn.BatchNorm2d(3), nn.Dropout(0.5)).eval()
    images = torch.randn(LEAST_TELLING, 3, 4, 4) * 2 + 1
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with statistics_of_batch(model, {"input": images}):
        seen = model(images)
    torch.testing.assert_close(seen, nn.BatchNorm2d(3)(images))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not any(module.training for module in model.modules())
    torch.testing.assert_close(model[0](images), images / (1 + model[0].eps) ** 0.5)


def test_the_statistics_of_a_few_examples_are_not_used():
    model, few = nn.Sequential(nn.BatchNorm1d(3)).eval(), torch.randn(LEAST_TELLING - 1, 3)
    with statistics_of_batch(model, {"input": few}):
        torch.testing.assert_close(model(few), few / (1 + model[0].eps) ** 0.5)


@pytest.mark.parametrize("reentrant", [True, False])
def test_recomputed_batches_count_once(reentrant):
    def trained(recomputes):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.ReLU())
        x = torch.randn(16, 4, requires_grad=True)
        if recomputes:
            ignore_recomputation(model)
        y = checkpoint(model, x, use_reentrant=reentrant) if recomputes else model(x)
        y.square().sum().backward()
        return model[1]

    plain, recomputed = trained(False), trained(True)
    assert recomputed.momentum == plain.momentum
    for name, buffer in plain.named_buffers():
        assert torch.equal(buffer, dict(recomputed.named_buffers())[name]), name
