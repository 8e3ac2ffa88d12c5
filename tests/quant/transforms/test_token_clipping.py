"""Token-Wise Clipping: the global ratio and the fine stage on a toy problem whose unimportant tokens have outliers."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from quant.convert import calibrate, get_formats, quantize_model, set_formats
from quant.errors import UserError
from quant.formats import FLOAT, IntFormat
from quant.quantizers.quantizer import QuantizerConfig
from quant.transforms.token_clipping import clip_tokens, output_loss, outputs, ratios

INT6, INT8 = IntFormat(6), IntFormat(8)
OUTLIERS = slice(0, 8)


class Tokens(nn.Module):
    """Reads 2048 tokens; the output depends on those whose `weights` are not 0."""

    def __init__(self, weights):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second, self.weights = nn.Linear(16, 16), nn.Linear(16, 8), weights

    def forward(self, x):
        return self.second(self.first(x)) * self.weights


def problem(important, learned=False, offset=False):
    """Eight of 2048 tokens are 80; `important`: the output depends on them alone."""
    weights = torch.zeros(2048, 1) if important else torch.ones(2048, 1)
    weights[OUTLIERS] = 1.0 if important else 0.0
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(2, 2048, 16, generator=generator)
    x[:, OUTLIERS] = 80 * torch.sign(torch.randn(2, 8, 16, generator=generator))
    model = Tokens(weights)
    activation = QuantizerConfig(
        range="learned" if learned else "calibrated",
        observer="avg_prune_minmax",
        symmetric=False,
        learned_offset=offset,
    )
    modules = quantize_model(model, activation=activation, formats=[INT6, INT8])
    calibrate(model, modules, [x[:1], x[1:]])
    return model, modules, [x[:1], x[1:]]


def loss_now(model, modules, batches, format):
    targets = [outputs(model, batch) for batch in batches]
    set_formats(modules, dict.fromkeys(modules, (FLOAT, format)))
    loss = output_loss(model, batches, targets)
    set_formats(modules, dict.fromkeys(modules, (FLOAT, FLOAT)))
    return loss


@pytest.mark.parametrize("format", [INT6, INT8], ids=str)
def test_outliers_of_unimportant_tokens_are_clipped(format):
    model, modules, batches = problem(important=False)
    before = loss_now(model, modules, batches, format)
    assert clip_tokens(model, modules, batches, format) < 1
    assert before >= 20 * loss_now(model, modules, batches, format)


@pytest.mark.parametrize("format", [INT6, INT8], ids=str)
def test_outliers_that_carry_the_loss_are_kept(format):
    model, modules, batches = problem(important=True)
    before = loss_now(model, modules, batches, format)
    assert clip_tokens(model, modules, batches, format) == 1
    assert loss_now(model, modules, batches, format) == before


def test_the_ratio_is_the_one_of_least_loss_and_one_for_all_layers():
    model, modules, batches = problem(important=False)
    best = clip_tokens(model, modules, batches, INT8)
    assert {tuple(m.input_quantizer.token_quantiles.items()) for m in modules.values()} == {(("int8", best),)}
    losses = {}
    for ratio in ratios(8, 2048):
        for module in modules.values():
            module.input_quantizer.token_quantiles["int8"] = ratio
        calibrate(model, modules, batches)  # which keeps to the ratio
        losses[ratio] = loss_now(model, modules, batches, INT8)
    assert best == min(losses, key=losses.get)


@pytest.mark.parametrize("offset", [False, True])
@pytest.mark.parametrize("rate", [1e-5, 1e-3, 10.0])
def test_the_fine_stage_is_never_worse(offset, rate, monkeypatch):
    monkeypatch.setattr("quant.transforms.token_clipping.LEARNING_RATE", rate)
    model, modules, batches = problem(important=False, learned=True, offset=offset)
    coarse = clip_tokens(model, modules, batches, INT6)
    before = loss_now(model, modules, batches, INT6)
    scales = [m.input_quantizer.grids["int6"].scale.item() for m in modules.values()]
    assert clip_tokens(model, modules, batches, INT6, fine=True) == coarse
    after = loss_now(model, modules, batches, INT6)
    moved = scales != [m.input_quantizer.grids["int6"].scale.item() for m in modules.values()]
    assert after < before if moved else after == before
    assert moved or rate != 1e-3
    assert all(p.requires_grad and p.grad is None for p in model.parameters())


def test_the_fine_stage_clips_only_where_that_pays():
    """The ratio suits the first layer's outliers; the output depends on the second layer's largest token."""

    class TwoKinds(Tokens):
        def forward(self, x):
            hidden = self.first(x) * self.weights
            hidden[:, 100:115] += torch.linspace(3, 4, 15).view(-1, 1)
            return self.second(hidden)

    model, modules, batches = problem(important=False, learned=True)
    model.__class__ = TwoKinds
    ratio = clip_tokens(model, modules, batches, INT6)
    before = loss_now(model, modules, batches, INT6)
    assert ratio < 1
    assert clip_tokens(model, modules, batches, INT6, fine=True) == ratio
    assert [m.input_quantizer.token_quantiles["int6"] for m in modules.values()] == [ratio, 1.0]
    assert loss_now(model, modules, batches, INT6) < 0.9 * before


def test_formats_modes_and_other_observers_are_left_alone():
    model, modules, batches = problem(important=False)
    model.train()
    modules["second"].eval()  # as a frozen norm would be
    set_formats(modules, dict.fromkeys(modules, (INT8, INT6)))
    other = modules["second"].input_quantizer
    other.config = replace(other.config, observer="minmax")
    scale = other.grids["int8"].scale.clone()
    clip_tokens(model, modules, batches, INT8)
    assert model.training and not modules["second"].training and set(get_formats(modules).values()) == {(INT8, INT6)}
    assert torch.equal(other.grids["int8"].scale, scale) and not other.token_quantiles
    assert all(m.input_quantizer.observation is None for m in modules.values())


class Returns(nn.Module):
    """Returns its input."""

    def forward(self, **outputs):
        return outputs


def test_what_a_model_says_are_its_logits_or_all_but_its_loss():
    one, two, whole = torch.tensor([1.0]), torch.tensor([[2.0, 3.0]]), torch.tensor([4])
    model = Returns()
    assert outputs(model, {"loss": one, "scores": [two, whole], "boxes": {"a": one.double()}}).tolist() == [2, 3, 1]
    assert outputs(model, {"start_logits": one, "end_logits": two, "hidden": two}).tolist() == [1, 2, 3]
    with pytest.raises(UserError, match="Returns returns no floating-point tensor"):
        outputs(model, {"loss": one, "ids": whole})


def test_the_ratios_of_the_paper():
    assert ratios(8, 32 * 128) == [round(1 - 0.01 * i, 12) for i in range(11)]
    assert ratios(6, 32 * 128)[-1] == 0.7 and ratios(4, 32 * 128)[-1] == 0.1
    assert len(ratios(8, 32 * 256)) == 21 and ratios(8, 1)[1] == 0.99
    assert ratios(7, 4096)[-1] == 0.8 and ratios(16, 4096)[-1] == 0.9 and ratios(2, 4096)[-1] == 0.1
