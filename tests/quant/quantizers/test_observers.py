"""Range estimators against numpy and brute force."""

from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from quant.formats import IntFormat, parse_format
from quant.quant_utils import fake_quantize, scale_from_range
from quant.quantizers import observers
from quant.quantizers.observers import (
    AVERAGING,
    OBSERVERS,
    mse_range,
    observe,
    percentile_range,
    squared_error,
    token_observer,
)
from quant.quantizers.quantizer import Quantizer, QuantizerConfig


@pytest.mark.parametrize("percentile", [50, 99, 99.9, 100])
@pytest.mark.parametrize("groups", [1, 5])
def test_percentile_equals_numpy(percentile, groups):
    x = torch.randn(groups, 4000, generator=torch.Generator().manual_seed(0)) + 0.5
    low, high = percentile_range(percentile)(observe(x), IntFormat(8), True)
    bound = np.percentile(np.abs(x.numpy()), percentile, axis=1)
    np.testing.assert_allclose(high, np.minimum(x.numpy().max(axis=1), bound), rtol=1e-5)
    np.testing.assert_allclose(low, np.maximum(x.numpy().min(axis=1), -bound), rtol=1e-5)


def test_percentile_of_many_channels():
    """More values than the 2^24 that torch.quantile accepts."""
    x = torch.randn(40_000, 600, generator=torch.Generator().manual_seed(0))
    seen = observe(x, whole=True)
    assert seen.values.numel() > 2**24
    _, high = percentile_range(90)(seen, IntFormat(8), True)
    np.testing.assert_allclose(high[::999], np.percentile(x[::999].abs(), 90, axis=1), rtol=1e-5)


@pytest.mark.parametrize("name", ["int2", "int4", "int8", "e2m1", "e4m3"])
@pytest.mark.parametrize("symmetric", [True, False])
def test_mse_equals_brute_force(name, symmetric):
    generator, format = torch.Generator().manual_seed(0), parse_format(name)
    x = torch.randn(3, 500, generator=generator) ** 3 + torch.tensor([[0.0], [1.0], [9.0]])
    low, high = mse_range(observe(x), format, symmetric)
    for row, found_low, found_high in zip(x, low, high, strict=True):
        errors = {}
        for share in np.linspace(1, 0.1, 40):
            scale, zero_point = scale_from_range(row.min() * share, row.max() * share, format, symmetric)
            errors[share] = float((fake_quantize(row, format, scale, zero_point) - row).double().square().mean())
        scale, zero_point = scale_from_range(found_low, found_high, format, symmetric)
        found = float((fake_quantize(row, format, scale, zero_point) - row).double().square().mean())
        assert found <= min(errors.values()) * (1 + 1e-5)
        assert min(abs(float(found_high) - float(row.max()) * share) for share in errors) < 1e-6 * float(row.max())


def test_mse_clips_outliers_at_few_bits():
    x = torch.cat([torch.randn(1, 5000, generator=torch.Generator().manual_seed(0)), torch.tensor([[20.0]])], dim=1)
    assert mse_range(observe(x), IntFormat(3), True)[1] < 6
    assert OBSERVERS["minmax"](observe(x), IntFormat(3), True)[1] == 20


def test_extrema_see_every_value_of_a_large_tensor_and_the_sample_is_uniform():
    x = torch.arange(3_000_000.0).view(1, -1)
    seen = observe(x)
    assert (seen.low, seen.high, seen.count) == (0, 2_999_999, 3_000_000)
    assert seen.values.shape == (1, observers.SAMPLE_SIZE)
    fractions = (seen.values.sort().values / 3e6).squeeze()
    torch.testing.assert_close(fractions, torch.linspace(0, 1, len(fractions)), rtol=0, atol=0.01)


@pytest.mark.parametrize("width", [3, 11, 64, 768, 1280])
def test_the_sample_does_not_follow_the_layout(width):
    """Every column of a layer's activations is sampled, whatever their number."""
    x = torch.arange(width).repeat(2_000_000 // width).view(1, -1)
    shares = torch.bincount(observe(x).values.squeeze().long(), minlength=width) / observers.SAMPLE_SIZE
    assert shares.min() > 0.3 / width and shares.max() < 2 / width


@pytest.mark.parametrize("sizes", [[50_000] * 8, [1000, 400_000, 10], [5, 5], [70_000, 5]], ids=str)
def test_merged_observations_weigh_every_value_alike(sizes):
    parts = [torch.full((1, size), float(number)) for number, size in enumerate(sizes)]
    seen = observe(parts[0])
    for part in parts[1:]:
        seen = seen.merge(observe(part))
    shares = torch.bincount(seen.values.squeeze().long(), minlength=len(sizes)) / seen.values.shape[1]
    torch.testing.assert_close(shares, torch.tensor(sizes) / sum(sizes), rtol=0, atol=0.01)
    assert seen.values.shape[1] == min(sum(sizes), observers.SAMPLE_SIZE)
    assert (seen.low, seen.high, seen.count) == (0, len(sizes) - 1, sum(sizes))


def test_observing_is_deterministic_and_leaves_the_global_generator_alone():
    x = torch.randn(1, 200_000)
    state = torch.get_rng_state()
    one, two = observe(x), observe(x)
    assert torch.equal(one.values, two.values) and torch.equal(torch.get_rng_state(), state)
    assert torch.equal(one.merge(two).values, two.merge(one).values)


@settings(deadline=None, max_examples=50)
@given(
    st.lists(st.floats(min_value=-1e6, max_value=1e6, width=32), min_size=1, max_size=30),
    st.sampled_from(["minmax", "mse", 50.0, 99.0, 100.0]),
    st.booleans(),
)
def test_ranges_lie_within_the_extrema_and_make_a_usable_scale(numbers, estimator, symmetric):
    x = torch.tensor([numbers])
    estimate = OBSERVERS[estimator] if isinstance(estimator, str) else percentile_range(estimator)
    low, high = estimate(observe(x), IntFormat(4), symmetric)
    slack = 1e-6 * x.abs().max()
    assert min(x.min(), 0) - slack <= low and high <= max(x.max(), 0) + slack
    scale, zero_point = scale_from_range(low, high, IntFormat(4), symmetric)
    assert scale > 0 and scale.isfinite()
    out = fake_quantize(x, IntFormat(4), scale, zero_point)
    assert out.isfinite().all()
    if estimator in ("minmax", 100.0):
        assert ((out - x).abs() <= scale * 1.01).all()


def errors_of(x, low, high, format, symmetric):
    scale, zero_point = scale_from_range(torch.tensor(low), torch.tensor(high), format, symmetric)
    return float((fake_quantize(x, format, scale, zero_point) - x).double().square().mean())


def distributions():
    generator = torch.Generator().manual_seed(0)
    normal = torch.randn(1, 1500, generator=generator)
    gelu = torch.nn.functional.gelu(normal * 2)
    return {
        "normal": normal,
        "relu": normal.relu(),
        "negative": -normal.relu() - 1,
        "gelu": gelu,
        "cubic": normal**3 + 2,
    }


@pytest.mark.parametrize("shape", list(distributions()))
@pytest.mark.parametrize("symmetric", [True, False])
def test_mse_grid_equals_brute_force(shape, symmetric):
    x, format = distributions()[shape], IntFormat(3)
    low, high = OBSERVERS["mse_grid"](observe(x), format, symmetric)
    smallest, largest = float(x.min()), float(x.max())
    candidates = []
    for i in range(1, 101):
        if symmetric or smallest >= 0 or largest <= 0:
            bound = max(-smallest, largest) * i / 100
            candidates.append((0.0 if smallest >= 0 else -bound, 0.0 if largest <= 0 else bound))
        else:
            width = (largest - smallest) * i / 100
            for below in range(8):
                start = -below * width / 7
                candidates.append((max(start, smallest), min(start + width, largest)))
    best = min(errors_of(x, *candidate, format, symmetric) for candidate in candidates)
    assert errors_of(x, float(low), float(high), format, symmetric) == pytest.approx(best, rel=1e-4)


@pytest.mark.parametrize("shape", list(distributions()))
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [3, 4, 8])
def test_mse_fast_loses_at_most_two_percent_to_the_grid(shape, symmetric, bits):
    x, format = distributions()[shape], IntFormat(bits)
    found = {name: OBSERVERS[name](observe(x), format, symmetric) for name in ("mse_grid", "mse_fast")}
    grid, fast = (errors_of(x, float(low), float(high), format, symmetric) for low, high in found.values())
    assert fast <= 1.02 * grid


def test_a_large_sample_is_condensed_without_losing_its_outliers():
    x = torch.randn(1, 60_000, generator=torch.Generator().manual_seed(0))
    x[0, 7] = 80.0
    low, high = OBSERVERS["mse_grid"](observe(x), IntFormat(8), False)
    assert high < 80 and errors_of(x, float(low), float(high), IntFormat(8), False) < errors_of(
        x, float(x.min()), 80.0, IntFormat(8), False
    )


def observed(name, *batches):
    seen = None
    for batch in batches:
        seen = OBSERVERS[name].see(batch, seen)
    return OBSERVERS[name](seen, IntFormat(8), False)


def test_averages_are_of_what_each_batch_has():
    batches = [torch.tensor([[-1.0, 3.0]]), torch.tensor([[-5.0, 1.0]])]
    assert [float(end) for end in observed("avg_minmax", *batches)] == [-3, 2]
    assert [float(end) for end in observed("minmax", *batches)] == [-5, 3]
    singles = [observed("mse_fast", batch) for batch in batches]
    low, high = observed("avg_mse_fast", *batches)
    assert float(low) == pytest.approx(float(singles[0][0] + singles[1][0]) / 2)
    assert float(high) == pytest.approx(float(singles[0][1] + singles[1][1]) / 2)


def test_avg_quantile_clips_where_the_histogram_has_reached_its_share():
    generator, bounds = torch.Generator().manual_seed(0), []
    batches = [torch.randn(1, 300_000, generator=generator) * factor for factor in (1, 2)]
    for batch in batches:
        counts, edges = np.histogram(batch.abs().numpy(), bins=2048, range=(0, float(batch.abs().max())))
        reached = next(i for i in range(2048) if counts[: i + 1].sum() >= 0.99999 * batch.numel())
        bounds.append((edges[reached] + edges[reached + 1]) / 2)
    _, high = observed("avg_quantile", *batches)
    expected = np.mean([min(float(batch.max()), bound) for batch, bound in zip(batches, bounds, strict=True)])
    assert float(high) == pytest.approx(expected, rel=2e-3) and high < observed("avg_minmax", *batches)[1]


@pytest.mark.parametrize("bits", [4, 8])
def test_lsq_plus_spans_three_sigma(bits):
    batches = [torch.randn(2, 500, generator=torch.Generator().manual_seed(s)) * (s + 1) + 1 for s in range(2)]
    seen = None
    for batch in batches:
        seen = OBSERVERS["lsq_plus"].see(batch, seen)
    every = torch.cat(batches, dim=1).double()
    mean, sigma = every.mean(dim=1), every.std(dim=1, correction=0)
    low, high = OBSERVERS["lsq_plus"](seen, IntFormat(bits), False)
    torch.testing.assert_close(low, (mean - 3 * sigma).float())
    torch.testing.assert_close(high, (mean + 3 * sigma).float())
    scale, _ = scale_from_range(*OBSERVERS["lsq_plus"](seen, IntFormat(bits), True), IntFormat(bits), True)
    expected = torch.maximum((mean - 3 * sigma).abs(), (mean + 3 * sigma).abs()) / 2 ** (bits - 1)
    torch.testing.assert_close(scale, expected.float())


def test_pruned_bounds_are_the_largest_token_bounds_within_the_quantile():
    tokens = torch.tensor([[-1.0, 2.0], [-3.0, 4.0], [-2.0, 80.0], [-9.0, 1.0]])
    ends = {r: [float(end) for end in token_observer(r)(token_observer(r).see(tokens, None), IntFormat(8), False)]
            for r in (1.0, 0.75, 0.5)}  # fmt: skip
    # |t_max| = 1 2 4 80: quantiles 80, 23, 3; |t_min| = 1 2 3 9: 9, 4.5, 2.5
    assert ends == {1.0: [-9, 80], 0.75: [-3, 4], 0.5: [-2, 2]}


@pytest.mark.parametrize("quantile", [0.01, 0.5, 1.0])
def test_pruning_never_widens_and_always_finds_a_bound(quantile):
    for shift in (-5.0, 0.0, 5.0):
        tokens = torch.randn(50, 8, generator=torch.Generator().manual_seed(0)) + shift
        low, high = token_observer(quantile)(token_observer(quantile).see(tokens, None), IntFormat(8), False)
        assert tokens.min() <= low and high <= tokens.max() and high.isfinite() and low.isfinite()


def heavy_tailed(rows, length, sigma, seed=0):
    """N(0, 1) with 0.1 % of values `sigma` times as large."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, length, generator=generator)
    index = torch.rand(rows, length, generator=generator).argsort(dim=1)[:, : max(length // 1000, 1)]
    return x.scatter(1, index, x.gather(1, index) * sigma)


WEIGHT_OBSERVERS = sorted(OBSERVERS.keys() - AVERAGING)


@pytest.mark.parametrize("observer", WEIGHT_OBSERVERS)
@pytest.mark.parametrize("length, sigma", [(513, 10), (4096, 30), (4096, 100), (65_536, 100)])
@pytest.mark.parametrize("bits", [4, 8])
def test_no_observer_of_weights_loses_to_their_extrema(observer, length, sigma, bits):
    """Observers see whole weights, so outliers that a sample of 512 values per row misses are not clipped."""
    x, format = heavy_tailed(4, length, sigma), IntFormat(bits)
    quantizer = Quantizer(QuantizerConfig("calibrated", "channel", observer), (4, 1), batched=False)
    quantizer.prepare(format)
    quantizer.set_format(format)
    quantizer.observe(x)
    quantizer.finish_calibration()
    with torch.no_grad():
        error = (quantizer(x) - x).double().square().sum(dim=1)
    scale, _ = scale_from_range(x.amin(dim=1), x.amax(dim=1), format, True)
    extrema = (fake_quantize(x, format, scale.unsqueeze(1)) - x).double().square().sum(dim=1)
    assert (error <= extrema * (1 + 1e-5)).all()


def test_a_percentile_that_the_user_names_clips_weights_as_asked():
    x = heavy_tailed(2, 4096, 100)
    quantizer = Quantizer(QuantizerConfig("calibrated", "channel", percentile=99), (2, 1), batched=False)
    quantizer.prepare(IntFormat(8))
    quantizer.observe(x)
    quantizer.finish_calibration()
    expected = np.percentile(x.abs().numpy(), 99, axis=1) / 127
    np.testing.assert_allclose(quantizer.grids["int8"].scale.detach().flatten(), expected, rtol=1e-5)


@pytest.mark.parametrize("batches", [1, 4])
@pytest.mark.parametrize("outliers", [3, 200, 5000])
def test_a_sample_of_activations_knows_their_outliers(batches, outliers):
    """The sample's squared error equals that of all values, because rare large ones are stored in addition."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, 1_000_000, generator=generator)
    x[0, torch.randperm(1_000_000, generator=generator)[:outliers]] *= 100
    seen = None
    for batch in x.chunk(batches, dim=1):
        seen = observe(batch) if seen is None else seen.merge(observe(batch))
    points, weights = seen.weighted()
    assert points.shape[1] < 70_000 and weights.sum() == pytest.approx(1_000_000, rel=1e-5)
    for bits, bound in ((8, 4.0), (8, 30.0), (4, 4.0), (4, 400.0)):
        ends = torch.tensor([-bound]), torch.tensor([bound])
        found = squared_error(points, weights, *ends, IntFormat(bits), True)
        assert float(found) == pytest.approx(float(squared_error(x, None, *ends, IntFormat(bits), True)), rel=0.05)
    _, high = mse_range(seen, IntFormat(8), True)
    expected = mse_range(observe(x, whole=True), IntFormat(8), True)
    assert float(high) == pytest.approx(float(expected[1]), rel=0.05)


@pytest.mark.parametrize("observer", ["mse", "mse_grid", "mse_fast", "mse_histogram"])
@pytest.mark.parametrize("tail", ["student", "lognormal"])
@pytest.mark.parametrize("sigma", [10, 100])
@pytest.mark.parametrize("symmetric", [True, False])
def test_samples_of_activations_keep_heavy_tails(observer, tail, sigma, symmetric):
    """Of 160,000 values, 0.1 % `sigma` times as large: no estimator of the squared error loses to the extrema.

    The others clip by their definition, whatever they see, or average over batches.
    """
    random = np.random.default_rng(0)
    draw = {"student": partial(random.standard_t, 3), "lognormal": partial(random.lognormal, 0, 1)}[tail]
    x = torch.tensor(draw(160_000), dtype=torch.float32)
    x[torch.from_numpy(random.permutation(160_000)[:160])] *= sigma
    errors = {}
    for name in ("minmax", observer):
        quantizer = Quantizer(QuantizerConfig("calibrated", observer=name, symmetric=symmetric)).eval()
        quantizer.prepare(IntFormat(8))
        quantizer.set_format(IntFormat(8))
        for batch in x.view(-1, 100).chunk(3):
            quantizer.observe(batch)
        quantizer.finish_calibration()
        with torch.no_grad():
            errors[name] = float((quantizer(x) - x).double().square().mean())
    assert errors[observer] <= 1.1 * errors["minmax"]


def test_ties_at_the_edge_of_the_tails_are_counted_once():
    """ReLU6 maps a tenth of all values to 6, far more than the tails hold."""
    x = torch.randn(1, 1_000_000, generator=torch.Generator().manual_seed(0)).abs().mul(4).clamp(max=6)
    points, weights = observe(x).weighted()
    assert weights is not None
    share = float(weights[points == 6].sum()) / 1e6
    assert share == pytest.approx(float((x == 6).float().mean()), rel=0.05)


def test_the_percentile_of_a_sample_is_that_of_all_values():
    x = heavy_tailed(1, 2_000_000, 50)
    seen = observe(x[:, :900_000]).merge(observe(x[:, 900_000:]))
    for percentile in (90, 99.9, 99.99, 99.999):
        _, high = percentile_range(percentile)(seen, IntFormat(8), True)
        assert float(high) == pytest.approx(np.percentile(x.abs().numpy(), percentile), rel=0.05)
