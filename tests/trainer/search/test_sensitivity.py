import copy

import numpy as np
import pytest
import torch
from scipy.special import softmax
from scipy.stats import entropy
from torch import nn

from policy.space import build_space
from quant.convert import calibrate, get_formats, in_float, quantize_model, set_formats
from quant.formats import FLOAT, parse_format
from trainer.search.baselines import sensitivities
from trainer.search.evaluator import AssignmentEvaluator
from trainer.search.measured_pairs import measured_pairs
from trainer.search.sensitivity import fisher_sensitivity, increase, measure_sensitivity
from trainer.training.distillation import divergence

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


def test_sensitivities_are_means_of_every_examples_divergence(measured):
    model, layers, space, batches = measured
    found = measure_sensitivity(model, layers, space, batches, logits, divergence)
    reference = softmax(alone(*measured, None, None), axis=1)
    for d in range(3):
        for c in range(3):
            kl = entropy(reference, softmax(alone(*measured, d, c), axis=1), axis=1)
            assert found.mean[d, c] == pytest.approx(kl.mean(), rel=1e-3, abs=1e-6)
    assert (found.mean[:, 0] > found.mean[:, 2]).all()


def test_batch_norms_go_by_the_batch_not_by_averages_of_other_formats():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Linear(8, 3))
    layers = quantize_model(model, formats=FORMATS)
    space, batches = build_space(list(layers), FORMATS), [{"input": torch.randn(20, 6)}]
    calibrate(model, layers, batches)
    found = measure_sensitivity(model, layers, space, batches, logits, divergence).mean
    model[1].running_mean.fill_(5)  # what training left behind
    model[1].running_var.fill_(0.01)
    np.testing.assert_array_equal(measure_sensitivity(model, layers, space, batches, logits, divergence).mean, found)


def test_negligible_formats_cost_no_pass_and_come_out_nearly_as_measured(measured):
    model, layers, space, batches = measured

    def loss(model, batch):
        return model(**batch).square().mean()

    passes = []

    def observe(model, batch):
        passes.append(batch)
        return logits(model, batch)

    whole = measure_sensitivity(model, layers, space, batches, logits, divergence).mean
    estimates = fisher_sensitivity(model, layers, space, batches, loss)
    found = measure_sensitivity(model, layers, space, batches, observe, divergence, first_order=estimates).mean
    kept = np.array([[pair in measured_pairs(d.choices, own).pairs for pair in d.choices]
                     for d, own in zip(space.decisions, estimates, strict=True)])  # fmt: skip
    assert kept[:, 0].all() and not kept[:, 2].all()  # int2 is measured, int8 mostly not
    assert len(passes) == len(batches) * (1 + kept.sum())
    np.testing.assert_array_equal(found[kept], whole[kept])
    assert (np.abs(np.log2(found / whole)) < 1.5).all()  # formats of one layer lie up to 2 ** 12 apart


def test_the_error_of_a_plain_mean_is_its_standard_error(measured):
    model, layers, space, batches = measured
    found = measure_sensitivity(model, layers, space, batches, logits, divergence)
    kl = entropy(softmax(alone(*measured, None, None), axis=1), softmax(alone(*measured, 1, 0), axis=1), axis=1)
    assert found.error[1, 0] == pytest.approx(kl.std(ddof=1) / np.sqrt(17), rel=1e-3)


def test_a_scalar_is_averaged_over_the_batches_and_may_fall(measured):
    model, layers, space, batches = measured
    found = measure_sensitivity(model, layers, space, batches, lambda m, b: -m(**b).square().mean(), increase)

    def of(values):
        return np.array([-(part**2).mean() for part in np.split(values, [7, 14])])

    wanted = (of(alone(*measured, 2, 0)) - of(alone(*measured, None, None))).mean()
    assert found.mean[2, 0] == pytest.approx(wanted, rel=1e-4)


def test_mode_and_formats_come_back(measured):
    model, layers, space, batches = measured
    set_formats(layers, {"0": (FORMATS[0], FLOAT)})
    model.train()
    model[1].eval()  # as a frozen norm would be
    before = get_formats(layers)
    measure_sensitivity(model, layers, space, batches, logits, divergence)
    fisher_sensitivity(model, layers, space, batches, lambda m, b: m(**b).square().mean())
    assert model.training and model[2].training and not model[1].training
    assert get_formats(layers) == before


def test_progress_counts_the_layers_that_run(measured):
    """The last of three layers takes a third of the first one's time, since those before it are cached."""
    reports = []
    measure_sensitivity(*measured, logits, divergence, lambda phase, done, total, what: reports.append((done, total)))
    assert reports == [(0, 18), (3, 18), (5, 18), (6, 18), (9, 18), (11, 18), (12, 18), (15, 18), (17, 18), (18, 18)]


def normed_copies(first, second):
    """Both layers weight-normed, the second a copy of the first: torch's cache of weights takes one for the other."""
    one = nn.utils.parametrizations.weight_norm(first)
    two = copy.deepcopy(one)
    two.weight = second.weight.detach()
    two.bias = second.bias
    return one, two


def frozen(*layers):
    return (nn.utils.parametrizations.weight_norm(layer).requires_grad_(False) for layer in layers)


def normed_by_hooks(*layers):
    return (nn.utils.weight_norm(layer) for layer in layers)


@pytest.mark.filterwarnings("ignore:.*weight_norm. is deprecated")
@pytest.mark.parametrize("computed", [normed_copies, frozen, normed_by_hooks])
@pytest.mark.parametrize("method", ["fisher", "hawq_v2", "qbert"])
def test_a_layer_that_computes_its_weight_is_as_sensitive_as_any(method, computed):
    def table_of(make):
        torch.manual_seed(0)
        one, two, last = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 3)
        one, two = make(one, two)
        model = nn.Sequential(one, nn.ReLU(), two, nn.ReLU(), last)
        layers = quantize_model(model, formats=FORMATS)
        batches = [{"input": torch.randn(9, 8)} for _ in range(2)]
        calibrate(model, layers, batches)
        before = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
        evaluator = AssignmentEvaluator(
            model, layers, build_space(list(layers), FORMATS), batches,
            loss_and_outputs=lambda model, batch: (model(**batch).square().mean(), None),
        )  # fmt: skip
        evaluator.evaluation_batches = lambda assignments=None: batches
        made = sensitivities(method, evaluator, seed=0)
        assert before == {name: parameter.requires_grad for name, parameter in model.named_parameters()}
        with torch.no_grad():
            reference = logits(model, batches[0])
            for parameter in model[0].parameters():
                parameter.mul_(2)
            assert not torch.equal(logits(model, batches[0]), reference)  # its weight is computed again
        return made

    np.testing.assert_allclose(table_of(computed), table_of(lambda *layers: layers), rtol=1e-3)


def test_a_layer_that_is_called_by_keyword_is_as_sensitive_as_any():
    class Net(nn.Module):
        def __init__(self, named):
            super().__init__()
            torch.manual_seed(0)
            self.first, self.last, self.named = nn.Linear(8, 8), nn.Linear(8, 3), named

        def forward(self, x):
            return self.last(self.first(input=x).relu() if self.named else self.first(x).relu())

    def table_of(named):
        model, batches = Net(named), [{"x": torch.linspace(-1, 1, 72).view(9, 8)}]
        layers = quantize_model(model, formats=FORMATS)
        calibrate(model, layers, batches)
        space = build_space(list(layers), FORMATS)
        return fisher_sensitivity(model, layers, space, batches, lambda m, b: m(**b).square().mean())

    np.testing.assert_array_equal(table_of(True), table_of(False))
