"""Hessian-vector products, traces and eigenvalues against the explicit Hessian of a small network in float64."""

import math

import pytest
import torch
from torch import nn

from policy.hessian import EigenEstimate, gradients, hessian_traces, top_eigenvalues
from quant.errors import UserError

INPUTS, HIDDEN, CLASSES = 4, 5, 3


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(INPUTS, HIDDEN), nn.Linear(HIDDEN, CLASSES)
        self.drop = nn.Dropout(0.5)

    def forward(self, x):
        return self.second(self.drop(torch.tanh(self.first(x))))


def loss(model, batch):
    return nn.functional.cross_entropy(model(batch[0]), batch[1])


@pytest.fixture
def problem():
    torch.manual_seed(0)
    model = Net().double().train()
    batches = [(torch.randn(6, INPUTS).double() * 2, torch.randint(0, CLASSES, (6,))) for _ in range(3)]
    layers = {"first": model.first, "second": model.second}
    return model, layers, batches


def explicit(model, layer, batch):
    """Hessian block of one layer's weight: float64 (n, n), by torch.autograd.functional on the weight as an input."""
    name = f"{layer}.weight"
    weight = dict(model.named_parameters())[name].detach()
    model.eval()

    def of(flat):
        out = torch.func.functional_call(model, {name: flat.view_as(weight)}, (batch[0],))
        return nn.functional.cross_entropy(out, batch[1])

    hessian = torch.autograd.functional.hessian(of, weight.flatten())
    model.train()
    return hessian


@pytest.mark.parametrize("layer", ["first", "second"])
def test_products_equal_the_explicit_hessian(problem, layer):
    model, layers, batches = problem
    vector = torch.randn_like(layers[layer].weight)
    with gradients(model, layers, batches[0], loss) as blocks:
        product = blocks[layer].product(vector)
    expected = explicit(model, layer, batches[0]) @ vector.flatten()
    assert (product.flatten() - expected).abs().max() < 1e-9 * expected.abs().max()


@pytest.mark.parametrize("jointly", [False, True])
def test_trace_lies_within_four_standard_errors(problem, jointly):
    model, layers, batches = problem
    found = hessian_traces(model, layers, batches, loss, max_draws=200, tolerance=0.02, jointly=jointly)
    for layer, estimate in found.items():
        trace = sum(float(explicit(model, layer, batch).trace()) for batch in batches) / len(batches)
        assert abs(estimate.trace - trace) <= 4 * estimate.error
        assert 0 < estimate.error <= 0.3 * abs(trace)
        assert estimate.draws == 200 or estimate.error <= 0.02 * abs(estimate.trace)


def test_vectors_on_all_layers_at_once_are_unbiased_with_more_variance(problem):
    model, layers, batches = problem
    alone, together = (
        hessian_traces(model, layers, batches[:1], loss, max_draws=300, tolerance=0, jointly=jointly)
        for jointly in (False, True)
    )
    assert all(together[name].error > alone[name].error for name in layers)
    for name in layers:
        block = explicit(model, name, batches[0])
        variance = 2 * float(block.square().sum() - block.diagonal().square().sum())
        assert alone[name].error == pytest.approx(math.sqrt(variance / 300), rel=0.2)


def test_draws_stop_at_the_tolerance_layer_by_layer(problem):
    model, layers, batches = problem
    loose = hessian_traces(model, layers, batches, loss, max_draws=100, tolerance=0.3)
    assert all(8 <= estimate.draws < 100 for estimate in loose.values())
    assert all(estimate.error <= 0.3 * abs(estimate.trace) for estimate in loose.values())


def test_a_diagonal_hessian_is_exact_at_the_first_draw():
    model = nn.Linear(4, 1, bias=False).double()
    scales = torch.tensor([[1.0, 2.0, 3.0, 4.0]]).double()
    found = hessian_traces(model, {"": model}, [None], lambda m, _: (scales * m.weight.square()).sum() / 2)
    assert found[""].trace == pytest.approx(10.0, abs=1e-12) and found[""].error < 1e-12 and found[""].draws == 8


@pytest.mark.parametrize("layer", ["first", "second"])
def test_top_eigenvalue(problem, layer):
    model, layers, batches = problem
    found = top_eigenvalues(model, layers, batches, loss, max_iterations=2000, tolerance=1e-6)[layer]
    values = []
    for batch in batches:
        spectrum = torch.linalg.eigvalsh(explicit(model, layer, batch))
        values.append(float(spectrum[spectrum.abs().argmax()]))
    expected = torch.tensor(values)
    assert found.mean == pytest.approx(float(expected.mean()), rel=1e-4)
    assert found.spread == pytest.approx(float(expected.std(correction=0)), rel=1e-3)
    assert found.score == abs(found.mean) + found.spread and found.residual <= 1e-6


def test_the_eigenvalue_of_the_largest_magnitude_may_be_negative():
    model = nn.Linear(2, 1, bias=False).double()
    scales = torch.tensor([[1.0, -3.0]]).double()
    found = top_eigenvalues(model, {"": model}, [None], lambda m, _: (scales * m.weight.square()).sum() / 2)
    assert found[""].mean == pytest.approx(-3, rel=1e-3)


def test_a_layer_that_the_loss_is_linear_in_or_does_not_read_has_no_curvature():
    model = nn.ModuleDict({"linear": nn.Linear(2, 2), "idle": nn.Linear(2, 2)}).double()

    def linear_loss(m, batch):
        return m["linear"](batch).sum()

    for jointly in (False, True):
        traces = hessian_traces(model, dict(model), [torch.ones(3, 2).double()], linear_loss, jointly=jointly)
        assert [(t.trace, t.error) for t in traces.values()] == [(0, 0), (0, 0)]
    assert top_eigenvalues(model, dict(model), [torch.ones(3, 2).double()], linear_loss)["idle"] == EigenEstimate(
        0, 0, 0
    )


def test_same_generator_same_estimate_and_the_model_is_left_as_it_was(problem):
    model, layers, batches = problem
    model.first.bias.requires_grad_(False)
    model.first.eval()
    before = {name: p.requires_grad for name, p in model.named_parameters()}
    one, two = (
        hessian_traces(model, layers, batches, loss, max_draws=8, generator=torch.Generator().manual_seed(3))
        for _ in range(2)
    )
    assert one == two != hessian_traces(model, layers, batches, loss, max_draws=8)
    assert before == {name: p.requires_grad for name, p in model.named_parameters()}
    assert (model.training, model.first.training, model.drop.training) == (True, False, True)
    assert all(p.grad is None for p in model.parameters())


def test_transformers_attention_has_second_derivatives():
    from transformers import BertConfig, BertForSequenceClassification

    from quant.convert import in_float, quantize_model
    from quant.formats import parse_format

    torch.manual_seed(0)
    settings = BertConfig(
        vocab_size=20, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8, num_labels=2
    )
    model = BertForSequenceClassification(settings)
    modules = quantize_model(model, formats=[parse_format("int4")])
    batch = {"input_ids": torch.randint(0, 20, (4, 6)), "labels": torch.randint(0, 2, (4,))}
    with in_float(modules):
        found = hessian_traces(model, modules, [batch], lambda m, b: m(**b).loss, max_draws=2, jointly=True)
    assert set(found) == set(modules) and any(t.trace != 0 for t in found.values())
    assert all(math.isfinite(t.trace) for t in found.values())


def test_no_batches_are_refused(problem):
    model, layers, batches = problem
    with pytest.raises(ValueError, match="at least 1 batch"):
        hessian_traces(model, layers, [], loss)
    with pytest.raises(ValueError, match="2 draws"):
        hessian_traces(model, layers, batches, loss, max_draws=1)
    with pytest.raises(ValueError, match="at least 1 batch"):
        top_eigenvalues(model, layers, [], loss)


def test_a_weight_that_cannot_be_held_is_refused():
    class Doubled(nn.Linear):
        weight = property(lambda self: 2 * self.stored)

        def __init__(self):
            nn.Module.__init__(self)
            self.stored, self.bias = nn.Parameter(torch.randn(CLASSES, INPUTS)), None

    model = Doubled()
    batch = torch.randn(6, INPUTS), torch.randint(0, CLASSES, (6,))
    with pytest.raises(UserError, match="layer odd: its weight is computed in a way"):
        hessian_traces(model, {"odd": model}, [batch], loss)


def test_eigenvalues_and_traces_equal_pyhessians(problem):
    """PyHessian (Yao et al., arXiv 1912.07145) on a model of which one weight alone is trained."""
    hessian = pytest.importorskip("pyhessian").hessian
    model, layers, batches = problem
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    torch.set_default_dtype(torch.float64)
    try:
        for name, layer in layers.items():
            layer.weight.requires_grad_(True)
            theirs = hessian(model, nn.functional.cross_entropy, data=batches[0], cuda=False)
            (largest,), _ = theirs.eigenvalues(maxIter=1000, tol=1e-10)
            draws = torch.tensor(theirs.trace(maxIter=400, tol=0.0))
            model.zero_grad(set_to_none=True)
            layer.weight.requires_grad_(False)
            eigen = top_eigenvalues(model, {name: layer}, batches[:1], loss, max_iterations=1000, tolerance=1e-7)
            assert eigen[name].mean == pytest.approx(largest, rel=1e-5)
            trace = hessian_traces(model, {name: layer}, batches[:1], loss, max_draws=400, tolerance=0.0)[name]
            assert abs(trace.trace - draws.mean()) < 4 * math.hypot(trace.error, draws.std() / len(draws) ** 0.5)
    finally:
        torch.set_default_dtype(torch.float32)
