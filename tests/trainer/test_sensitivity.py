import numpy as np
import pytest
import torch
from scipy.special import softmax
from scipy.stats import entropy
from torch import nn

from policy.space import build_space
from quant.convert import calibrate, get_formats, in_float, quantize_model, set_formats
from quant.formats import FLOAT, parse_format
from trainer.sensitivity import divergence, increase, measure_sensitivity

FORMATS = [parse_format(bits) for bits in (2, 4, 8)]


@pytest.fixture
def measured():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3))
    layers = quantize_model(model, formats=FORMATS)
    batches = [{"input": torch.randn(count, 6)} for count in (7, 7, 3)]
    calibrate(model, layers, batches)
    return model, layers, build_space(list(layers), FORMATS), batches


def logits(model, batch):
    return model(**batch)


def alone(model, layers, space, batches, d, c):
    """The logits with one decision in one format and all others in float, (examples, classes), after a plain pass."""
    with in_float(layers), torch.no_grad():
        if d is not None:
            set_formats(layers, dict.fromkeys(space.decisions[d].layers, space.decisions[d].choices[c]))
        return torch.cat([model.eval()(**batch) for batch in batches]).double().numpy()


def test_effects_are_means_of_every_examples_divergence(measured):
    model, layers, space, batches = measured
    told = measure_sensitivity(model, layers, space, batches, logits, divergence)
    reference = softmax(alone(*measured, None, None), axis=1)
    for d in range(3):
        for c in range(3):
            kl = entropy(reference, softmax(alone(*measured, d, c), axis=1), axis=1)
            assert told.effect[d, c] == pytest.approx(kl.mean(), rel=1e-3, abs=1e-6)
    assert (told.effect[:, 0] > told.effect[:, 2]).all()


def test_batch_norms_go_by_the_batch_not_by_averages_of_other_formats():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Linear(8, 3))
    layers = quantize_model(model, formats=FORMATS)
    space, batches = build_space(list(layers), FORMATS), [{"input": torch.randn(20, 6)}]
    calibrate(model, layers, batches)
    told = measure_sensitivity(model, layers, space, batches, logits, divergence).effect
    model[1].running_mean.fill_(5)  # what training left behind
    model[1].running_var.fill_(0.01)
    np.testing.assert_array_equal(measure_sensitivity(model, layers, space, batches, logits, divergence).effect, told)


def test_the_error_of_a_plain_mean_is_its_standard_error(measured):
    model, layers, space, batches = measured
    told = measure_sensitivity(model, layers, space, batches, logits, divergence)
    kl = entropy(softmax(alone(*measured, None, None), axis=1), softmax(alone(*measured, 1, 0), axis=1), axis=1)
    assert told.error[1, 0] == pytest.approx(kl.std(ddof=1) / np.sqrt(17), rel=1e-3)


def test_a_scalar_is_averaged_over_the_batches_and_may_fall(measured):
    model, layers, space, batches = measured
    told = measure_sensitivity(model, layers, space, batches, lambda m, b: -m(**b).square().mean(), increase)

    def of(values):
        return np.array([-(part**2).mean() for part in np.split(values, [7, 14])])

    wanted = (of(alone(*measured, 2, 0)) - of(alone(*measured, None, None))).mean()
    assert told.effect[2, 0] == pytest.approx(wanted, rel=1e-4)


def test_mode_and_formats_come_back(measured):
    model, layers, space, batches = measured
    set_formats(layers, {"0": (FORMATS[0], FLOAT)})
    model.train()
    before = get_formats(layers)
    measure_sensitivity(model, layers, space, batches, logits, divergence)
    assert model.training
    assert get_formats(layers) == before
