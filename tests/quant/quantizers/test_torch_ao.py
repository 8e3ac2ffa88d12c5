"""Scales, zero points and rounded values of integers, equal to those of torch.ao's observers and fake quantization."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.ao.quantization.observer import MinMaxObserver, PerChannelMinMaxObserver

from quant.formats import IntFormat
from quant.quant_utils import fake_quantize, scale_from_range

WIDTHS = st.integers(2, 8)
SEEDS = st.integers(0, 2**31)


@settings(max_examples=60, deadline=None)
@given(bits=WIDTHS, seed=SEEDS, shift=st.floats(-5, 5), spread=st.floats(1e-3, 1e3))
def test_asymmetric_per_tensor(bits, seed, shift, spread):
    x = (torch.randn(200, generator=torch.Generator().manual_seed(seed)) + shift) * spread
    low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    observer = MinMaxObserver(
        dtype=torch.qint8, qscheme=torch.per_tensor_affine, quant_min=low, quant_max=high, eps=torch.finfo().tiny
    )
    observer(x)
    scale, zero_point = observer.calculate_qparams()
    own_scale, own_zero = scale_from_range(x.min().view(1), x.max().view(1), IntFormat(bits), symmetric=False)
    torch.testing.assert_close(own_scale, scale, rtol=1e-6, atol=0)
    assert own_zero.item() == zero_point.item()
    theirs = torch.fake_quantize_per_tensor_affine(x, own_scale.item(), int(zero_point), low, high)
    ours = fake_quantize(x, IntFormat(bits), own_scale, own_zero)
    # torch multiplies by a reciprocal: a value at a tie may fall on the other side.
    apart = (ours - theirs).abs() > 1e-4 * own_scale
    assert apart.float().mean() <= 0.02 and (ours - theirs).abs().max() <= 1.001 * own_scale


@settings(max_examples=60, deadline=None)
@given(bits=WIDTHS.filter(lambda bits: bits > 2), seed=SEEDS, spread=st.floats(1e-3, 1e3))
def test_symmetric_per_channel(bits, seed, spread):
    weight = torch.randn(5, 40, generator=torch.Generator().manual_seed(seed)) * spread
    most = 2 ** (bits - 1) - 1
    observer = PerChannelMinMaxObserver(
        ch_axis=0,
        dtype=torch.qint8,
        qscheme=torch.per_channel_symmetric,
        quant_min=-most,
        quant_max=most,
        eps=torch.finfo().tiny,
    )
    observer(weight)
    scale, _ = observer.calculate_qparams()
    own, zero_point = scale_from_range(weight.amin(1), weight.amax(1), IntFormat(bits), symmetric=True)
    torch.testing.assert_close(own, scale, rtol=1e-6, atol=0)
    assert zero_point is None
    theirs = torch.fake_quantize_per_channel_affine(weight, own, torch.zeros(5, dtype=torch.int32), 0, -most, most)
    ours = fake_quantize(weight, IntFormat(bits), own.view(-1, 1))
    assert ((ours - theirs).abs() > 1e-4 * own.view(-1, 1)).float().mean() <= 0.02


def test_a_wrong_range_would_be_seen():
    x = torch.linspace(-1, 3, 50)
    observer = MinMaxObserver(dtype=torch.qint8, qscheme=torch.per_tensor_affine, quant_min=-128, quant_max=127)
    observer(x)
    scale, _ = observer.calculate_qparams()
    clipped, _ = scale_from_range(x.min().view(1), x.max().view(1) * 0.9, IntFormat(8), symmetric=False)
    assert clipped.item() != pytest.approx(scale.item(), rel=1e-3)
