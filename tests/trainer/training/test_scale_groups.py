import math

import pytest
import torch
from torch import nn

from quant.convert import calibrate, quantize_model, set_formats
from quant.formats import parse_format
from trainer.training.scale_groups import SCALES, freeze_weights, group_scales, needs_groups, scale_exponents


@pytest.fixture
def model():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4))
    nn.init.zeros_(model[2].weight)  # as the last layer of a residual branch often starts
    layers = quantize_model(model, formats=[parse_format("int2"), parse_format("int8")])
    calibrate(model, layers, [torch.randn(16, 8)])
    return model


def test_a_scale_moves_by_about_the_learning_rate_of_itself(model):
    scales = {name: p for name, p in model.named_parameters() if SCALES in name}
    exponents = scale_exponents(model)
    assert exponents.keys() == scales.keys() and len(set(exponents.values())) > 2
    for name, p in scales.items():
        assert 2 ** (exponents[name] - 0.51) <= float(p.detach().mean()) <= 2 ** (exponents[name] + 0.51)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.3)
    assert needs_groups(optimizer)
    group_scales(optimizer, model, exponents)
    assert not needs_groups(optimizer)
    assert sum(len(group["params"]) for group in optimizer.param_groups) == len(list(model.parameters()))
    before = {name: p.detach().clone() for name, p in scales.items()}
    for p in model.parameters():
        p.grad = -torch.ones_like(p)  # upwards: the scale of zeros is the least there is
    optimizer.step()
    for name, p in scales.items():  # Adam's first step is the learning rate
        moved = float((before[name] - p.detach()).abs().mean() / before[name].mean())
        assert 0.1 / math.sqrt(2.1) <= moved <= 0.1 * math.sqrt(2.1)


def test_sgd_follows_the_gradients_size_itself(model):
    assert not needs_groups(torch.optim.SGD(model.parameters(), lr=0.1))


def test_scales_alone_are_trained():
    torch.manual_seed(0)
    model, int4 = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4)), parse_format("int4")
    layers, x = quantize_model(model, formats=[int4]), torch.randn(16, 8)
    calibrate(model, layers, [x])
    set_formats(layers, dict.fromkeys(layers, (int4, int4)))
    freeze_weights(model)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    model(x).sub(1).square().sum().backward()
    optimizer.step()
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert len(moved) == 4 and all(SCALES in name for name in moved)
