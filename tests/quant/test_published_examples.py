"""Numbers that tools print in their own documents: neural-compressor's smooth_quant.md (Apache-2.0)."""

import pytest
import torch

from quant.formats import IntFormat
from quant.kernels.eager import round_to_grid, rounding_params
from quant.quant_utils import fake_quantize, scale_from_range

INT8 = IntFormat(8)
W = torch.tensor([[0.6839, 0.4741, 0.7451], [0.9301, 0.1742, 0.6835]])
UNSIGNED = 128
"""The document's codes are 0..255, ours -128..127."""


def mse(a, b):
    return float((a - b).square().mean())


def test_one_scale_and_zero_point_for_the_tensor():
    scale, zero_point = 0.00296431384049356, -59
    rounded = fake_quantize(W, INT8, scale, zero_point - UNSIGNED)
    expected = torch.tensor([[0.6848, 0.4743, 0.7440], [0.9308, 0.1749, 0.6848]])
    torch.testing.assert_close(rounded, expected, rtol=0, atol=5e-5)
    assert mse(rounded, W) == pytest.approx(7.385297635664756e-07, rel=1e-3)
    codes = rounded / scale + zero_point
    assert codes.round().tolist() == [[172, 101, 192], [255, 0, 172]]


def test_scales_and_zero_points_of_channels_lose_less():
    """The document divides the maximum by 255, not the range; its own scales are used here."""
    scale, zero_point = W.amax(1, keepdim=True) / 255, torch.tensor([[-162], [-48]])
    rounded = fake_quantize(W, INT8, scale, zero_point - UNSIGNED)
    expected = torch.tensor([[0.6837, 0.4734, 0.7451], [0.9301, 0.1751, 0.6821]])
    torch.testing.assert_close(rounded, expected, rtol=0, atol=5e-5)
    assert mse(rounded, W) == pytest.approx(5.637690492221736e-07, rel=1e-3)
    assert (rounded / scale + zero_point).round().tolist() == [[72, 0, 93], [207, 0, 139]]


def test_a_product_of_codes():
    weight = torch.tensor([[0.0806, 0.7589, 0.6038], [0.3815, 0.5040, 0.7174]])
    x = torch.tensor(
        [[0.5444, 0.5826, 0.7772, 0.5555], [0.3740, 0.3253, 0.0698, 0.1381], [0.5972, 0.0086, 0.0737, 0.8298]]
    )
    scales, codes = [], []
    for tensor in (weight, x):
        scale, zero_point = scale_from_range(tensor.min(), tensor.max(), INT8, symmetric=True)
        assert zero_point is None
        scales.append(scale)
        codes.append(round_to_grid(tensor / scale, rounding_params(INT8)))
    assert [float(scale) for scale in scales] == pytest.approx([0.0059755356051027775, 0.006533813662827015], rel=1e-4)
    assert codes[0].tolist() == [[13, 127, 101], [64, 84, 120]]
    assert codes[1].tolist() == [[83, 89, 119, 85], [57, 50, 11, 21], [91, 1, 11, 127]]
    product = codes[0] @ codes[1]
    assert product.tolist() == [[17509, 7608, 4055, 16599], [21020, 10016, 9860, 22444]]
    expected = torch.tensor([[0.6836, 0.2970, 0.1583, 0.6481], [0.8207, 0.3911, 0.3850, 0.8763]])
    torch.testing.assert_close(product * scales[0] * scales[1], expected, rtol=0, atol=2e-4)
    rounded = fake_quantize(weight, INT8, scales[0]) @ fake_quantize(x, INT8, scales[1])
    torch.testing.assert_close(rounded, product * scales[0] * scales[1])
