"""Ranges of weights by the error of the layer's output, against a slow search in numpy and the real output."""

import copy

import numpy as np
import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from quant import quant_conv2d
from quant.convert import calibrate, find_layers, from_float, quantize_model, set_formats
from quant.errors import NotFiniteError
from quant.formats import FLOAT, parse_format
from quant.kernels.groups import to_rows
from quant.quant_experts import ExpertLinear
from quant.quantizers import weighted_mse
from quant.quantizers.observers import OBSERVERS, mse_range, observe
from quant.quantizers.quantizer import QuantizerConfig
from quant.quantizers.weighted_mse import InputSketch, Weighed
from tests.quant.oracles import float_values, nearest


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def sketch_of(*batches):
    """The sums of a layer with a single block."""
    sketch = InputSketch()
    for number, batch in enumerate(batches):
        sketch.batch = number
        sketch.add(batch.unsqueeze(0))
    return sketch.halves()


# ------------------------------------------------------ the search


def rounded(weight, low, high, name, symmetric):
    """The weight, float64, in a format that covers low..high (rows, 1)."""
    low, high = np.minimum(low, 0), np.maximum(high, 0)
    if name == "e2m1":
        scale = np.maximum(-low, high) / 6
        return nearest(weight / scale, float_values(2, 1)) * scale
    codes = 2 ** int(name.removeprefix("int"))
    if symmetric:
        scale = np.maximum(-low, high) / (codes / 2 - 1)
        return np.clip(np.round(weight / scale), 1 - codes / 2, codes / 2 - 1) * scale
    scale = (high - low) / (codes - 1)
    zero = np.round(-low / scale)
    return (np.clip(np.round(weight / scale) + zero, 0, codes - 1) - zero) * scale


def slow_errors(weight, sketch, name, symmetric, per_row=True):
    """(halves, factors, rows), the definition in loops, float64; `sketch` is (halves, sums + 1, columns)."""
    weight, sketch = weight.double().numpy(), sketch.double().numpy()
    low, high = extrema(weight, per_row)
    errors = np.zeros((2, 40, len(weight)))
    for number, share in enumerate(SHARES):
        off = rounded(weight, low * share, high * share, name, symmetric) - weight
        for half in range(2):
            for row, d in enumerate(off):
                by_sums = sum(float(d @ s) ** 2 for s in sketch[half, :-1]) / (sketch.shape[1] - 1)
                errors[half, number, row] = by_sums + float(sketch[half, -1] @ d**2)
    return errors if per_row else errors.sum(axis=2, keepdims=True)


SHARES = np.linspace(1, 0.1, 40)


def extrema(weight, per_row):
    axis = 1 if per_row else None
    return [getattr(weight, end)(axis=axis, keepdims=True) for end in ("min", "max")]


def slow_choice(errors):
    """Factors (groups,) of errors (halves, factors, groups)."""
    groups = np.arange(errors.shape[2])
    for own, other in ((0, 1), (1, 0)):
        if errors[other, errors[own].argmin(axis=0), groups].sum() >= errors[other, 0].sum():
            return np.ones(len(groups))
    return SHARES[errors.sum(axis=0).argmin(axis=0)]


@pytest.mark.parametrize("name", ["int2", "int4", "int8", "e2m1"])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("per_row", [True, False])
def test_the_search_equals_a_slow_one(name, symmetric, per_row):
    weight = randn(6, 20) ** 3 + 0.2
    halves = sketch_of(randn(50, 20, seed=1) + 1, randn(50, 20, seed=2) + 1)
    seen = Weighed(weight if per_row else weight.reshape(1, -1), weight, halves)
    low, high = OBSERVERS["weighted_mse"](seen, parse_format(name), symmetric)
    share = slow_choice(slow_errors(weight, halves[:, 0], name, symmetric, per_row))
    for found, end in zip((low, high), extrema(weight.numpy(), per_row), strict=True):
        np.testing.assert_allclose(found, end.flatten() * share, rtol=1e-5)


@pytest.mark.parametrize("name", ["int3g8", "uint4g8", "int4g32"])
@pytest.mark.parametrize("kind", ["linear", "Conv1D", "grouped conv"])
def test_groups_are_searched_alone(name, kind):
    """20 or 18 columns make two groups of 8 and a short one, or a single short one."""
    torch.manual_seed(0)
    make = {"linear": lambda: nn.Linear(20, 6), "Conv1D": lambda: Conv1D(6, 20)}
    layer = from_float(make.get(kind, lambda: nn.Conv2d(4, 6, 3, groups=2))(), QuantizerConfig(observer="weighted_mse"))
    with torch.no_grad():
        layer.weight.copy_(randn(*layer.weight.shape) ** 3)
    format, quantizer = parse_format(name), layer.weight_quantizer
    quantizer.prepare(format)
    quantizer.inputs = InputSketch()
    for number in range(2):
        quantizer.inputs.batch = number
        quantizer.inputs.add(layer.columns(randn(*((9, 4, 5, 5) if "conv" in kind else (50, 20)), seed=number) + 1))
    quantizer.observe(layer.weight)
    halves, blocks = quantizer.inputs.halves(), 2 if "conv" in kind else 1
    quantizer.finish_calibration()
    rows, element, symmetric = (
        to_rows(layer.weight.detach(), layer.reduction_dim),
        f"int{format.width}",
        not format.zero_point,
    )
    whole = rows.shape[1] // format.size * format.size
    wanted = []
    for columns in (slice(0, whole), slice(whole, rows.shape[1])):  # full groups decide together, and so do short ones
        errors, bounds = [], []
        for start in range(columns.start, columns.stop, format.size):
            own = slice(start, min(start + format.size, columns.stop))
            parts = zip(rows[:, own].chunk(blocks), halves.unbind(dim=1), strict=True)
            errors.append(np.concatenate([slow_errors(w, h[..., own], element, symmetric) for w, h in parts], axis=2))
            bounds.append(np.concatenate(extrema(rows[:, own].numpy(), per_row=True), axis=1))
        if errors:
            share = slow_choice(np.stack(errors, axis=3).reshape(2, 40, -1)).reshape(len(rows), -1)
            wanted.append(share[..., None] * np.stack(bounds, axis=1))
    low, high = np.moveaxis(np.concatenate(wanted, axis=1), 2, 0)
    codes = 2**format.width - 1
    wide = np.maximum(high, 0) - np.minimum(low, 0)
    found = to_rows(quantizer.grids[name].scale.detach(), -1 if layer.reduction_dim is None else layer.reduction_dim)
    np.testing.assert_allclose(found, np.maximum(-low, high) / (codes // 2) if symmetric else wide / codes, rtol=1e-5)


def test_weights_in_many_parts_are_searched_like_a_single_part(monkeypatch):
    weight = randn(3 * 8, 20) ** 3
    halves = torch.cat([sketch_of(randn(50, 20, seed=s), randn(50, 20, seed=s + 1)) for s in range(3)], dim=1)
    seen = Weighed(weight, weight, halves)
    whole = OBSERVERS["weighted_mse"](seen, parse_format("int3"), True)
    for size in (1, 50, 200, 500):
        monkeypatch.setattr(weighted_mse, "CHUNK", size)
        parts = OBSERVERS["weighted_mse"](seen, parse_format("int3"), True)
        assert all(torch.equal(one, two) for one, two in zip(whole, parts, strict=True))


def test_clipping_that_pays_only_on_the_data_it_was_chosen_on_is_left_out():
    """The large weight multiplies 0 in one half of the data, and large inputs in the other."""
    weight = randn(4, 64)
    weight[:, 0] = 12.0
    silent, loud = randn(80, 64, seed=1), randn(80, 64, seed=2)
    silent[:, 0], loud[:, 0] = 0.0, 50.0

    def bounds(*batches):
        return OBSERVERS["weighted_mse"](Weighed(weight, weight, sketch_of(*batches)), parse_format("int4"), True)[1]

    assert (bounds(silent, randn(80, 64, seed=3) * silent.ne(0)) < 6).all()
    for batches in ((silent, loud), (loud, silent), (torch.cat([silent, loud]),)):
        assert (bounds(*batches) == 12).all()


def test_no_evidence_no_clipping():
    weight = randn(4, 64) ** 3
    low, high = OBSERVERS["weighted_mse"](
        Weighed(weight, weight, torch.zeros(2, 1, 33, 64)), parse_format("int3"), True
    )
    assert torch.equal(low, weight.amin(1)) and torch.equal(high, weight.amax(1))


# ------------------------------------------------------ what is kept of the inputs


def test_the_sums_tell_the_second_moments(monkeypatch):
    monkeypatch.setattr(weighted_mse, "PROJECTIONS", 8192)
    x = randn(100, 6) + 1
    first, second = sketch_of(x)[:, 0]
    for half, rows in ((first, x[:50]), (second, x[50:])):
        torch.testing.assert_close(half[-1], rows.square().sum(dim=0))
        moments = rows.t() @ rows
        torch.testing.assert_close(half[:-1].t() @ half[:-1] / 8192, moments, rtol=0, atol=0.05 * float(moments.max()))


@pytest.mark.parametrize("count, halves", [(1, None), (2, ([0], [1])), (5, ([0, 2, 4], [1, 3]))])
def test_batches_take_turns_and_a_single_one_is_halved(count, halves):
    batches = [randn(10, 3, seed=seed) for seed in range(count)]
    parts = [batches[0][:5], batches[0][5:]] if halves is None else [torch.cat([batches[n] for n in h]) for h in halves]
    expected = torch.stack([part.square().sum(dim=0) for part in parts])
    torch.testing.assert_close(sketch_of(*batches)[:, 0, -1], expected)


LAYERS = {
    "linear": (lambda: nn.Linear(6, 5, bias=False), (4, 7, 6)),
    "Conv1D": (lambda: Conv1D(5, 6), (4, 7, 6)),
    "conv": (lambda: nn.Conv2d(4, 6, 3, stride=2, padding=1, bias=False), (3, 4, 9, 7)),
    "grouped, dilated": (lambda: nn.Conv2d(4, 6, (3, 2), dilation=(2, 1), groups=2, bias=False), (3, 4, 9, 7)),
    "depthwise, same": (lambda: nn.Conv2d(4, 4, 3, padding="same", groups=4, bias=False), (3, 4, 5, 5)),
    "reflected": (lambda: nn.Conv2d(4, 6, 3, padding=1, padding_mode="reflect", bias=False), (3, 4, 5, 5)),
    "one example": (lambda: nn.Conv2d(4, 6, 3, bias=False), (4, 5, 5)),
    "1d": (lambda: nn.Conv1d(4, 6, 3, padding=2, bias=False), (3, 4, 8)),
    "3d": (lambda: nn.Conv3d(4, 6, 2, stride=2, bias=False), (3, 4, 4, 5, 6)),
}


@pytest.mark.parametrize("name", LAYERS)
def test_columns_are_what_the_rows_multiply(name, monkeypatch):
    monkeypatch.setattr(quant_conv2d, "LEAST_WINDOWS", 10_000)
    make, shape = LAYERS[name]
    torch.manual_seed(0)
    layer, x = from_float(make()), randn(*shape)
    blocks = layer.columns(x)
    rows = to_rows(layer.weight, layer.reduction_dim).view(len(blocks), -1, blocks.shape[2])
    with torch.no_grad():
        out = layer(x)
    channels = out if name in ("linear", "Conv1D") else out.movedim(-x.dim() + (x.dim() == layer.weight.dim()), -1)
    expected = channels.reshape(-1, len(layer.weight) if name != "Conv1D" else 5).square().sum(dim=0)
    torch.testing.assert_close((rows @ blocks.transpose(1, 2)).square().sum(dim=2).flatten(), expected)


def test_a_convolution_samples_windows_of_every_example():
    layer = from_float(nn.Conv2d(3, 4, 3, padding=1))
    blocks = layer.columns(randn(8, 3, 32, 32))
    assert blocks.shape == (1, quant_conv2d.LEAST_WINDOWS, 27)


@pytest.mark.parametrize("transposed", [False, True])
def test_experts_know_their_own_inputs(transposed):
    weight = nn.Parameter(randn(3, 6, 5) if transposed else randn(3, 5, 6))
    layer = from_float(ExpertLinear(weight, None, transposed))
    layer.weight_quantizer.inputs = sketch = InputSketch()
    layer.observing = True
    x, experts = randn(12, 6, seed=1), torch.tensor([0, 2, 0, 0, 2, 0, 3, 0, 2, 0, 2, 0])
    with torch.no_grad():
        layer(x, experts)
    squares = sketch.halves().sum(dim=0)[:, -1]
    expected = torch.stack([x[experts == number].square().sum(dim=0) for number in range(3)])
    torch.testing.assert_close(squares, expected)
    rows = to_rows(layer.weight, layer.reduction_dim).view(3, 5, 6)
    assert torch.equal(rows, weight.transpose(1, 2) if transposed else weight)


# ------------------------------------------------------ in a model


def calibrated(model, batches, observer, formats=("int3",), granularity="channel", **activation):
    model = copy.deepcopy(model)
    weight = QuantizerConfig("calibrated", granularity, observer)
    chosen = [parse_format(name) for name in formats]
    activation = QuantizerConfig("calibrated", symmetric=False, **activation)
    modules = quantize_model(model, formats=chosen, weight=weight, activation=activation)
    calibrate(model, modules, batches)
    set_formats(modules, dict.fromkeys(modules, (chosen[0], FLOAT)))
    return model, modules


@pytest.mark.parametrize("granularity", ["channel", "tensor"])
@pytest.mark.parametrize("kind", ["linear", "conv"])
def test_a_column_with_large_inputs_counts_more(kind, granularity):
    """Every row has two large weights: one that multiplies large inputs, and one that multiplies small ones."""
    torch.manual_seed(0)
    layer = nn.Linear(64, 16) if kind == "linear" else nn.Conv2d(64, 16, 1)
    with torch.no_grad():
        layer.weight.copy_(randn(16, 64).view_as(layer.weight))
        layer.weight[:, 0], layer.weight[:, 1] = 3.5, 14.0
    shape = (64, 64) if kind == "linear" else (16, 64, 2, 2)
    size = torch.ones(64)
    size[0], size[1] = 20.0, 0.01
    size = size if kind == "linear" else size.view(-1, 1, 1)
    batches = [randn(*shape, seed=seed) * size for seed in range(5)]
    model = nn.Sequential(layer)
    errors = {}
    for observer in ("minmax", "mse", "weighted_mse"):
        quantized, _ = calibrated(model, batches[:4], observer, granularity=granularity)
        with torch.no_grad():
            errors[observer] = float((quantized(batches[4]) - model(batches[4])).square().mean())
    assert errors["weighted_mse"] < 0.7 * min(errors["mse"], errors["minmax"])


def test_layers_that_are_not_called_have_the_least_error_of_their_weight():
    class Idle(nn.Module):
        def __init__(self):
            super().__init__()
            self.used, self.idle = nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, x):
            return self.used(x)

    torch.manual_seed(0)
    model = Idle()
    _, modules = calibrated(model, [randn(9, 8)], "weighted_mse")
    low, high = mse_range(observe(model.idle.weight, whole=True), parse_format("int3"), True)
    found = modules["idle"].weight_quantizer.grids["int3"].scale.flatten()
    torch.testing.assert_close(found, torch.maximum(-low, high) / 3)
    assert all(module.weight_quantizer.inputs is None for module in modules.values())


def test_padding_does_not_count_where_it_is_ignored():
    class Tokens(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(32, 8)

        def forward(self, x, attention_mask):
            return self.layer(x)

    torch.manual_seed(0)
    model, mask = Tokens(), (torch.arange(9) < torch.tensor([[9], [2], [4], [7]])).long()

    def scale(padding, ignore):
        batches = [randn(4, 9, 32, seed=seed) for seed in range(2)]
        batches = [torch.where(mask.bool().unsqueeze(2), x, padding * x.abs()) for x in batches]
        inputs = [{"x": x, "attention_mask": mask} for x in batches]
        _, modules = calibrated(model, inputs, "weighted_mse", ignore_padding=ignore)
        return modules["layer"].weight_quantizer.grids["int3"].scale

    assert torch.equal(scale(0.0, True), scale(100.0, True))
    assert not torch.equal(scale(0.0, False), scale(100.0, False))


def test_layers_that_share_a_weight_share_what_is_known_of_their_inputs():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.one, self.two = nn.Linear(4, 4), nn.Linear(4, 4)
            self.two.weight = self.one.weight

        def forward(self, x):
            return self.two(self.one(x))

    def kept(calls):
        sketch = InputSketch()
        sketch.add(torch.cat(calls).unsqueeze(0))
        return sketch.halves()[:, 0, -1].sum(dim=0)

    torch.manual_seed(0)
    model, x = Tied(), randn(6, 4)
    modules = quantize_model(model, formats=[parse_format("int4")], weight=QuantizerConfig(observer="weighted_mse"))
    seen = []
    finish = type(modules["one"].weight_quantizer).finish_calibration

    class Spy(type(modules["one"].weight_quantizer)):
        def finish_calibration(self, *args, **kwargs):
            seen.append(self.inputs.halves()[:, 0, -1].sum(dim=0))
            finish(self, *args, **kwargs)

    modules["one"].weight_quantizer.__class__ = Spy
    calibrate(model, modules, [x])
    with torch.no_grad():
        torch.testing.assert_close(seen[0], kept([x, model.one(x)]))


@pytest.mark.parametrize("tied", [False, True])
def test_a_table_knows_the_inputs_of_the_head_that_it_is_tied_to(tied):
    class Words(nn.Module):
        def __init__(self):
            super().__init__()
            self.table, self.head = nn.Embedding(9, 6), nn.Linear(6, 9, bias=False)
            if tied:
                self.head.weight = self.table.weight

        def forward(self, words):
            return self.head(self.table(words))

    torch.manual_seed(0)
    model, format = Words(), parse_format("int3")
    layers = list(find_layers(model, tables=True))
    modules = quantize_model(
        model, layers, formats=[format], weight=QuantizerConfig("calibrated", "channel", "weighted_mse")
    )
    words = torch.arange(9).repeat(4)
    calibrate(model, modules, [words, words])
    sketch = InputSketch()
    for sketch.batch in range(2):
        sketch.add(model.table.weight.detach()[words].unsqueeze(0))
    weight = model.table.weight.detach()
    if tied:
        low, high = OBSERVERS["weighted_mse"](Weighed(weight, weight, sketch.halves()), format, True)
    else:
        low, high = mse_range(observe(weight, whole=True), format, True)
    found = modules["table"].weight_quantizer.grids["int3"].scale.flatten()
    torch.testing.assert_close(found, torch.maximum(-low, high) / 3)


def test_inputs_that_are_not_finite_are_refused_if_weights_alone_are_quantized():
    model = nn.Sequential(nn.Linear(4, 4))
    modules = quantize_model(model, formats=[parse_format("int4")], weight=QuantizerConfig(observer="weighted_mse"))
    modules["0"].input_quantizer.grids.clear()
    with pytest.raises(NotFiniteError, match="layer 0: its input holds NaN or infinity"):
        calibrate(model, modules, [torch.full((2, 4), torch.nan)])


def test_the_observer_is_for_weights():
    with pytest.raises(ValueError, match="observer weighted_mse is for weights"):
        quantize_model(nn.Sequential(nn.Linear(4, 4)), activation=QuantizerConfig(observer="weighted_mse"))
