"""Learned scales stay positive under any optimizer, channel by channel, and are not changed otherwise."""

import copy
import pickle

import pytest
import torch
from torch import nn

from quant.convert import calibrate, quantize_model, set_formats
from quant.export.packed import read_packed, restore, write_packed
from quant.formats import parse_format
from quant.quant_utils import MIN_LEARNED_SCALE, use_compiled

INT4, INT8 = parse_format("int4"), parse_format("int8")


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 4))


def quantized():
    """(model, its layers, data, a channel's scale of a weight and the scale of an input)."""
    model, x = net(), torch.randn(64, 16)
    modules = quantize_model(model, formats=[INT4, INT8])
    calibrate(model, modules, [x])
    set_formats(modules, dict.fromkeys(modules, (INT4, INT4)))
    grids = modules["0"].weight_quantizer.grids["int4"], modules["2"].input_quantizer.grids["int4"]
    return model, modules, x, *(grid.scale for grid in grids)


OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, lr=1e-3, momentum=0.9),
    "adamw": lambda p: torch.optim.AdamW(p, lr=1e-3, foreach=False, weight_decay=0.0),
    "adam in one pass": lambda p: torch.optim.Adam(p, lr=1e-3, foreach=True),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=1e-3),
    "adagrad": lambda p: torch.optim.Adagrad(p, lr=1e-3),
}


@pytest.mark.parametrize("optimizer", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_a_step_takes_at_most_half_of_a_scale_whatever_pushes(optimizer):
    model, _, _, weights, inputs = quantized()
    moving = optimizer([weights, inputs])
    for _ in range(3):
        before = [p.detach().clone() for p in (weights, inputs)]
        push = torch.zeros_like(weights)
        push[2] = 1e6
        weights.grad, inputs.grad = push, torch.tensor(1e6)
        moving.step()
        for p, old in zip((weights, inputs), before, strict=True):
            assert (p >= old / 2).all() and (p > 0).all()
        others = torch.arange(len(weights)) != 2
        assert torch.equal(weights[others], before[0][others]), "channels that nobody pushes"
    assert model[0].weight.grad is None


def test_steps_that_keep_a_scale_positive_are_the_optimizers_own():
    model, _, x, weights, inputs = quantized()
    optimizer = torch.optim.SGD([weights, inputs], lr=1e-4)
    for _ in range(3):
        optimizer.zero_grad()
        model(x).square().sum().backward()
        expected = [p.detach() - 1e-4 * p.grad for p in (weights, inputs)]
        optimizer.step()
        assert all(map(torch.equal, (weights.detach(), inputs.detach()), expected))


def test_a_loop_that_writes_to_parameters_itself():
    model, modules, x, weights, _ = quantized()
    before = weights.detach().clone()
    with torch.no_grad():
        weights[0] -= 1.0
        weights[1] = 0.25
    loss = model(x).square().sum()
    assert weights[0] == before[0] / 2 and weights[1] == 0.25 and torch.equal(weights[2:], before[2:])
    loss.backward()
    assert weights.grad[0] != 0 and modules["0"].weight.grad[0].abs().sum() > 0, "the channel is alive"


def test_what_is_set_by_hand_is_not_the_optimizers_doing():
    model, _, x, weights, _ = quantized()
    with torch.no_grad():
        weights.fill_(1e-4)  # far less than half
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    model(x).sum().backward()
    optimizer.step()
    assert torch.equal(weights, torch.full_like(weights, 1e-4))


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "native"])
def test_a_channel_that_training_drove_below_zero_learns_again(compiled):
    if compiled and not use_compiled("auto"):
        pytest.skip("no compiler")
    try:
        model, _, x, weights, _ = quantized()
        goal = net()(x).detach()
        with torch.no_grad():
            weights[:] = -1e-3
        optimizer = torch.optim.SGD([weights], lr=1e-3)
        losses = []
        for _ in range(100):
            optimizer.zero_grad()
            losses.append((model(x) - goal).square().sum())
            losses[-1].backward()
            optimizer.step()
        assert losses[-1] < 0.5 * losses[0] and (weights > 1e-3).all()
    finally:
        use_compiled("off")


def test_a_layer_called_twice_between_a_step_and_its_backward():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8))
    modules, x = quantize_model(model, formats=[INT4]), torch.randn(16, 8)
    calibrate(model, modules, [x])
    set_formats(modules, {"0": (INT4, INT4)})
    scale = modules["0"].weight_quantizer.grids["int4"].scale
    with torch.no_grad():
        scale[3] = -1.0
    model(model(x)).sum().backward()  # autograd would refuse a scale that the second call had changed
    assert scale.grad.isfinite().all() and (scale > 0).all()


def test_scales_that_are_no_numbers_stay_so():
    """NaN scales stay NaN, so that a diverged run is noticed."""
    model, _, x, weights, _ = quantized()
    weights.grad = torch.full_like(weights, float("nan"))
    torch.optim.SGD([weights], lr=0.1).step()
    assert weights.isnan().all()
    assert model(x).isnan().any()


def test_what_is_saved_copied_and_exported_has_the_scales_that_are_used(tmp_path):
    model, modules, x, weights, inputs = quantized()
    model.eval()

    def spoil():
        with torch.no_grad():
            weights[0], inputs[...] = -1e-3, -1.0

    known = weights.detach().clone(), inputs.detach().clone()
    spoil()
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        with torch.inference_mode():
            outputs = other(x)
        grid = other[0].weight_quantizer.grids["int4"]
        assert grid.scale[0] == known[0][0] / 2
    state = copy.deepcopy(model.state_dict())
    assert all((value > 0).all() for name, value in state.items() if name.endswith("scale"))
    again = quantized()[0].eval()
    again.load_state_dict(state)
    spoil()
    write_packed(tmp_path / "m", model, modules)
    fresh = net().eval()
    restore(fresh, *read_packed(tmp_path / "m"))
    with torch.no_grad():
        wanted = fresh(x)
    assert wanted.abs().max() > 0.1 and outputs.shape == wanted.shape
    torch.testing.assert_close(model(x).detach(), wanted)


def test_copies_are_looked_after_themselves():
    model, _, _, weights, _ = quantized()
    twin = copy.deepcopy(model)
    own = twin[0].weight_quantizer.grids["int4"].scale
    own.grad = torch.full_like(own, 1e6)
    torch.optim.SGD(twin.parameters(), lr=1.0).step()
    assert torch.equal(own, weights / 2), "and the original is left alone"


def test_a_scale_never_falls_below_the_least():
    model, *_, inputs = quantized()
    optimizer = torch.optim.SGD([inputs], lr=1.0)
    for _ in range(60):
        inputs.grad = torch.tensor(1.0)
        optimizer.step()
    assert inputs == torch.tensor(MIN_LEARNED_SCALE) and model is not None
