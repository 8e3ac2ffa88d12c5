"""Histogram estimators against numpy, brute force and a slow double loop."""

import math

import numpy as np
import pytest
import scipy.stats
import torch

from quant.formats import IntFormat, parse_format
from quant.quant_utils import fake_quantize, scale_from_range
from quant.quantizers.histogram import BINS, MAX_BINS, Histogram, histogram_entropy, histogram_mse, histogram_percentile
from quant.quantizers.observers import OBSERVERS


def noise(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def outliers():
    """N(0, 1) with 0.1 % of N(0, 15)."""
    x = noise(1, 100_000)
    x[:, ::1000] = noise(1, 100, seed=1) * 15
    return x


def seen_in_parts(x, parts):
    seen = None
    for part in x.chunk(parts, dim=1):
        seen = Histogram.of(part, seen)
    return seen


@pytest.mark.parametrize("groups", [1, 3])
def test_larger_batches_extend_the_histogram_at_constant_bin_width(groups):
    batches = [noise(groups, 5000) * factor for factor in (1.0, 0.1, 2.5)]
    seen = None
    for batch in batches:
        seen = Histogram.of(batch, seen)
    width = batches[0].abs().amax(dim=1) / BINS
    torch.testing.assert_close(seen.width, width, rtol=0, atol=0)
    every = torch.cat(batches, dim=1)
    assert torch.equal(seen.low, every.amin(dim=1)) and torch.equal(seen.high, every.amax(dim=1))
    for row, counts, step in zip(every, seen.counts, width, strict=True):
        bins = np.minimum((np.abs(row.numpy()) / step.numpy()).astype(int), len(counts) - 1)
        bins[np.abs(row[:5000].numpy()).argmax()] = BINS - 1  # the first batch's maximum closes its last bin
        np.testing.assert_array_equal(counts, np.bincount(bins, minlength=len(counts)))
    assert seen.counts.sum() == every.numel() and seen.counts.shape[1] > BINS


def test_a_far_outlier_joins_bins_instead_of_taking_all_memory():
    seen = Histogram.of(torch.tensor([[1e6, 0.0]]), Histogram.of(noise(1, 1000)))
    assert seen.counts.shape[1] <= MAX_BINS and seen.counts.sum() == 1002 and seen.high == 1e6
    assert seen.counts[0, -1] <= 1 and seen.counts[0, int(1e6 / seen.width) - 1 :].sum() == 1


def test_zeros_first_say_nothing_about_the_width():
    seen = Histogram.of(noise(1, 100), Histogram.of(torch.zeros(1, 50)))
    assert seen.counts.shape[1] == BINS and seen.counts[0, 0] >= 50 and seen.counts.sum() == 150
    for estimate in (histogram_percentile, histogram_mse, histogram_entropy):
        low, high = estimate(Histogram.of(torch.zeros(2, 50)), IntFormat(8), True)
        assert not low.any() and not high.any()


@pytest.mark.parametrize("parts", [1, 4])
def test_percentile_within_one_bin_of_numpy(parts):
    x = torch.cat([noise(1, 60_000), outliers()], dim=1)
    seen = seen_in_parts(x, parts)
    low, high = histogram_percentile(seen, IntFormat(8), True)
    expected = np.percentile(np.abs(x.numpy()), 99.99)
    assert abs(float(high) - expected) <= float(seen.width) and float(low) == -float(high)


@pytest.mark.parametrize("name", ["int2", "int4", "int8", "e2m1"])
@pytest.mark.parametrize("symmetric", [True, False])
def test_mse_equals_brute_force(name, symmetric, monkeypatch):
    monkeypatch.setattr("quant.quantizers.histogram.BINS", 64)
    format, x = parse_format(name), noise(2, 3000) ** 3 + torch.tensor([[0.0], [-2.0]])
    seen = Histogram.of(x)
    low, high = histogram_mse(seen, format, symmetric)
    for group in range(2):
        counts, width = seen.counts[group], float(seen.width[group])
        sign = 1 if seen.high[group] >= -seen.low[group] else -1
        centres = torch.tensor([(j + 0.5) * width * sign for j in range(64)])
        errors = []
        for edge in range(1, 65):
            bound = torch.tensor(edge * width)
            ends = torch.maximum(seen.low[group], -bound), torch.minimum(seen.high[group], bound)
            scale, zero_point = scale_from_range(*ends, format, symmetric)
            off = (fake_quantize(centres, format, scale, zero_point) - centres).double().square()
            errors.append(((off * counts).sum().item(), *map(float, ends)))
        _, best_low, best_high = min(errors, key=lambda entry: entry[0])
        assert float(low[group]) == pytest.approx(best_low, rel=1e-5)
        assert float(high[group]) == pytest.approx(best_high, rel=1e-5)


def slow_entropy(counts, levels, fewest):
    """The number of bins to keep by pytorch-quantization's definition, tried one after another."""
    h = np.array(counts, dtype=np.float64)
    h[0] = h[1]
    best, kept = math.inf, len(h)
    for i in range(max(fewest, levels), len(h) + 1):
        p = h[:i].copy()
        p[-1] += h[i:].sum()
        level = np.digitize(np.arange(i), np.linspace(0, i, levels + 1)) - 1
        q = np.zeros(i)
        for one in range(levels):
            filled = (level == one) & (h[:i] > 0)
            q[filled] = h[:i][level == one].sum() / max(filled.sum(), 1)
        divergence = scipy.stats.entropy(p, q) if q.any() else math.inf
        if divergence <= best + 1e-12:
            best, kept = min(divergence, best), i
    return kept


@pytest.mark.parametrize("bits", [2, 4, 5])
@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("shape", ["two-sided", "one-sided"])
def test_entropy_equals_a_slow_double_loop(bits, seed, shape, monkeypatch):
    monkeypatch.setattr("quant.quantizers.histogram.BINS", 200)
    size = [300, 2000, 5000, 140][seed]
    x = noise(1, size, seed=seed) * torch.tensor([1.0, 4.0]).repeat_interleave(20).repeat(125)[:size]
    x = x.relu() if shape == "one-sided" else x
    seen = Histogram.of(x)
    before = seen.counts.clone()
    for symmetric in (True, False):
        _, high = histogram_entropy(seen, IntFormat(bits), symmetric)
        levels = 2**bits if shape == "one-sided" and not symmetric else 2 ** (bits - 1)
        kept = slow_entropy(seen.counts[0].tolist(), levels, 128)
        assert float(high) == pytest.approx(min(float(x.max()), kept * float(seen.width)), rel=1e-6)
    assert torch.equal(seen.counts, before)


def test_entropy_equals_that_of_model_optimizer(monkeypatch):
    """NVIDIA's successor of pytorch-quantization."""
    calib = pytest.importorskip("modelopt.torch.quantization.calib", reason="needs the extra bench (nvidia-modelopt)")
    bins = 512  # its loops over as many bins as a run has would take half a minute
    monkeypatch.setattr("quant.quantizers.histogram.BINS", bins)
    for x in (noise(1, 50_000), noise(1, 50_000).relu()):
        theirs = calib.HistogramCalibrator(num_bits=8, axis=None, unsigned=bool((x >= 0).all()), num_bins=bins)
        theirs.collect(x)
        _, high = histogram_entropy(Histogram.of(x), IntFormat(8), False)
        width = float(Histogram.of(x).width)
        assert abs(float(high) - float(theirs.compute_amax("entropy"))) <= 1.01 * width


def test_the_mass_at_zero_does_not_rule_the_entropy():
    """After ReLU or dropout most values are 0, which every range represents."""
    relu = noise(1, 100_000).relu()
    sparse = noise(1, 100_000, seed=1).mul(3) * (
        torch.rand(1, 100_000, generator=torch.Generator().manual_seed(2)) > 0.9
    )
    for x in (relu, sparse, torch.nn.functional.gelu(noise(1, 100_000).mul(2))):
        seen = Histogram.of(x)
        _, high = histogram_entropy(seen, IntFormat(8), False)
        assert high > 0.7 * x.abs().max()


def error(x, name, format):
    observer = OBSERVERS[name]
    scale, zero_point = scale_from_range(*observer(observer.see(x, None), format, True), format, True)
    return float((fake_quantize(x, format, scale.view(-1, 1), zero_point) - x).square().mean())


@pytest.mark.parametrize("name", ["mse_histogram", "mse", "mse_grid", "mse_fast"])
def test_mse_calibrators_beat_the_maximum_where_there_are_outliers(name):
    x = outliers()
    assert error(x, "minmax", IntFormat(4)) >= 3 * error(x, name, IntFormat(4))


@pytest.mark.parametrize("name", ["percentile", "entropy"])
def test_the_other_calibrators_clip_outliers_too(name):
    observer = OBSERVERS[name]
    high = observer(observer.see(outliers(), None), IntFormat(8), True)[1]
    assert 2 < high < outliers().max() * 0.9
