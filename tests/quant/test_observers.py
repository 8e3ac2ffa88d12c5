"""Range estimators against numpy and brute force."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import quant.observers
from quant.formats import IntFormat, parse_format
from quant.observers import OBSERVERS, mse_range, observe, percentile_range
from quant.quant_utils import fake_quantize, scale_from_range


@pytest.mark.parametrize("percentile", [50, 99, 99.9, 100])
@pytest.mark.parametrize("groups", [1, 5])
def test_percentile_equals_numpy(percentile, groups):
    x = torch.randn(groups, 4000, generator=torch.Generator().manual_seed(0)) + 0.5
    low, high = percentile_range(percentile)(observe(x), IntFormat(8), True)
    bound = np.percentile(np.abs(x.numpy()), percentile, axis=1)
    np.testing.assert_allclose(high, np.minimum(x.numpy().max(axis=1), bound), rtol=1e-5)
    np.testing.assert_allclose(low, np.maximum(x.numpy().min(axis=1), -bound), rtol=1e-5)


def test_percentile_of_many_channels():
    """More than the 2^24 values torch.quantile has refused."""
    x = torch.randn(40_000, 600, generator=torch.Generator().manual_seed(0))
    seen = observe(x)
    assert seen.values.numel() > 2**24
    _, high = percentile_range(90)(seen, IntFormat(8), True)
    np.testing.assert_allclose(high[::999], np.percentile(seen.values[::999].abs(), 90, axis=1), rtol=1e-5)


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
    assert seen.values.shape == (1, quant.observers.SAMPLE_SIZE)
    fractions = (seen.values.sort().values / 3e6).squeeze()
    torch.testing.assert_close(fractions, torch.linspace(0, 1, len(fractions)), rtol=0, atol=0.01)


@pytest.mark.parametrize("width", [3, 11, 64, 768, 1280])
def test_the_sample_does_not_follow_the_layout(width):
    """Every column of a layer's activations has its share, whatever their number."""
    x = torch.arange(width).repeat(2_000_000 // width).view(1, -1)
    shares = torch.bincount(observe(x).values.squeeze().long(), minlength=width) / quant.observers.SAMPLE_SIZE
    assert shares.min() > 0.3 / width and shares.max() < 2 / width


@pytest.mark.parametrize("sizes", [[50_000] * 8, [1000, 400_000, 10], [5, 5], [70_000, 5]], ids=str)
def test_merged_observations_weigh_every_value_alike(sizes):
    parts = [torch.full((1, size), float(number)) for number, size in enumerate(sizes)]
    seen = observe(parts[0])
    for part in parts[1:]:
        seen = seen.merge(observe(part))
    shares = torch.bincount(seen.values.squeeze().long(), minlength=len(sizes)) / seen.values.shape[1]
    torch.testing.assert_close(shares, torch.tensor(sizes) / sum(sizes), rtol=0, atol=0.01)
    assert seen.values.shape[1] == min(sum(sizes), quant.observers.SAMPLE_SIZE)
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
