"""Block formats against a slow reference, block by block in Python and float64; eager and compiled."""

import importlib
import math

import numpy as np
import pytest
import torch

from quant.formats import parse_format
from quant.kernels.block_formats import round_blocks
from quant.quant_utils import fake_quantize, use_compiled
from tests.quant.oracles import assert_same_bits, bit_patterns, float_values, nearest

MX = {  # name -> values of the element, exponent of the largest
    "mxfp8": (float_values(4, 3, 1), 8),
    "mxfp6": (float_values(3, 2), 4),
    "mxfp4": (float_values(2, 1), 2),
    "mxint8": (np.arange(128) / 64, 0),
}
NAMES = [*MX, "nvfp4"]
E4M3, E2M1 = float_values(4, 3, 1), float_values(2, 1)


@pytest.fixture(scope="module", params=["eager", "native", "inductor"], autouse=True)
def mode(request):
    if request.param != "eager" and not use_compiled("auto", compiler=request.param):
        pytest.skip("no compiler here")
    yield request.param
    use_compiled("off")


def mx_block(block: np.ndarray, name: str) -> np.ndarray:
    """Round one block of float32 values by the definition; frexp returns the exponent without a logarithm."""
    values, emax = MX[name]
    largest = np.abs(block).max()
    if not np.isfinite(largest):
        return np.full_like(block, np.nan)
    exponent = math.frexp(largest)[1] - 1 if largest else -127
    scale = 2.0 ** min(max(exponent - emax, -127), 127)
    rounded = nearest(block.astype(np.float64) / scale, values) * scale
    if name == "mxint8":  # integers have no -0.0
        rounded = rounded + 0.0
    return rounded.astype(np.float32)


def nvfp4_tensor(x: np.ndarray) -> np.ndarray:
    """Round a whole tensor (rows, length) by the definition, with its three float32 divisions."""
    blocks = [[row[i : i + 16] for i in range(0, len(row), 16)] for row in x]
    largest = [[np.abs(block).max() for block in row] for row in blocks]
    f = np.float32
    g = f(max((m for row in largest for m in row if np.isfinite(m)), default=0)) / f(448 * 6)
    with np.errstate(all="ignore"):
        out = []
        for row, tops in zip(blocks, largest, strict=True):
            parts = []
            for block, top in zip(row, tops, strict=True):
                b = nearest(np.array(f(top) / f(6) / g, dtype=f), E4M3).astype(f) if np.isfinite(top) else f(np.nan)
                if b * g > 0 or not np.isfinite(top):
                    parts.append(nearest(block / f(b * g), E2M1).astype(f) * b * g)
                else:
                    parts.append(block * f(0))
            out.append(np.concatenate(parts))
    return np.stack(out)


def reference(x: torch.Tensor, name: str) -> torch.Tensor:
    """Round x (rows, length) in blocks along the rows."""
    rows = x.float().numpy()
    if name == "nvfp4":
        return torch.from_numpy(nvfp4_tensor(rows))
    return torch.from_numpy(
        np.stack([np.concatenate([mx_block(row[i : i + 32], name) for i in range(0, len(row), 32)]) for row in rows])
    )


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("length", [1, 16, 31, 32, 33, 100])
def test_random_values_and_tails(name, length):
    generator = torch.Generator().manual_seed(length)
    x = torch.randn(7, length, generator=generator) * torch.logspace(-6, 6, 7).unsqueeze(1)
    assert_same_bits(fake_quantize(x, parse_format(name)), reference(x, name))


@pytest.mark.parametrize("name", NAMES)
def test_random_bit_patterns(name):
    """Blocks of similar magnitudes from 2^-149 to 2^128, including subnormals, saturation, NaN and infinities."""
    x = torch.from_numpy(bit_patterns(32 * 600)).view(600, 32)
    x = x[:, torch.randperm(32, generator=torch.Generator().manual_seed(0))]
    assert_same_bits(fake_quantize(x, parse_format(name)), reference(x, name))


@pytest.mark.parametrize("name", MX)
def test_the_exponent_is_read_from_the_bits_just_under_and_at_powers_of_two(name):
    powers = torch.tensor([2.0**e for e in range(-126, 128)], dtype=torch.float32)
    largest = torch.cat([powers, torch.nextafter(powers, torch.zeros(())), torch.nextafter(powers, torch.tensor(9e38))])
    generator = torch.Generator().manual_seed(0)
    x = largest.unsqueeze(1) * (torch.rand(len(largest), 32, generator=generator) * 2 - 1)
    x[:, 5] = largest
    assert_same_bits(fake_quantize(x, parse_format(name)), reference(x, name))


@pytest.mark.parametrize("name", MX)
def test_the_exponent_is_clamped_and_subnormal_blocks_survive(name):
    tiny = torch.tensor([2.0**-149, 2.0**-140, 2.0**-127, 2.0**-126], dtype=torch.float32)
    x = tiny.unsqueeze(1) * torch.linspace(-1, 1, 32)
    out = fake_quantize(x, parse_format(name))
    assert_same_bits(out, reference(x, name))
    assert out[-1].abs().max() > 0
    large = torch.full((1, 32), 3.4e38)
    assert_same_bits(fake_quantize(large, parse_format(name)), reference(large, name))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("poison", [torch.nan, torch.inf, -torch.inf])
def test_nan_and_infinity_spoil_their_own_block_only(name, poison):
    size = parse_format(name).block_size
    x = torch.randn(3, 2 * size, generator=torch.Generator().manual_seed(0))
    x[0, :size] *= 0.01  # not the largest of the tensor: nvfp4's g must stay what it was
    clean = fake_quantize(x, parse_format(name))
    x[0, 3] = poison
    out = fake_quantize(x, parse_format(name))
    assert out[0, :size].isnan().all()
    assert_same_bits(out[0, size:], clean[0, size:])
    assert_same_bits(out[1:], clean[1:])


@pytest.mark.parametrize("name", NAMES)
def test_zeros_stay_zero_and_get_a_gradient(name):
    x = torch.zeros(2, 40, requires_grad=True)
    out = fake_quantize(x, parse_format(name))
    out.sum().backward()
    assert torch.equal(out, torch.zeros(2, 40)) and torch.equal(x.grad, torch.ones(2, 40))
    mixed = torch.cat([torch.zeros(1, 32), torch.ones(1, 32)], dim=1).requires_grad_()
    out = fake_quantize(mixed, parse_format(name))
    out.sum().backward()
    assert torch.equal(out, mixed.detach()) and torch.equal(mixed.grad, torch.ones(1, 64))


def test_nvfp4_block_scales_may_be_subnormal_or_zero():
    """Blocks from the tensor's largest down to where b = e4m3(...) is subnormal (under 2^-6) and then zero."""
    tops = 2.0 ** -torch.arange(24.0)
    x = tops.unsqueeze(1) * torch.linspace(-1, 1, 16)
    out = fake_quantize(x, parse_format("nvfp4"))
    assert_same_bits(out, reference(x, "nvfp4"))
    b = np.array([nearest(np.float32(t / 6) / np.float32(1 / 2688), E4M3) for t in tops.numpy()])
    assert (b == 0).any() and ((b > 0) & (b < 2.0**-6)).any()
    assert torch.equal(out.abs().amax(dim=1) > 0, torch.from_numpy(b > 0))


def test_nvfp4_of_a_tensor_too_small_for_its_scale_is_zero():
    for largest in (1e-45, 1e-42, 1e-38):
        x = largest * torch.linspace(-1, 1, 32).view(2, 16)
        assert_same_bits(fake_quantize(x, parse_format("nvfp4")), reference(x, "nvfp4"))


def test_element_values_by_hand():
    x = torch.tensor([[6.0, 5.0, 2.5, 0.26, -0.25, 1.25, 7.9, -3.5]])
    # largest 7.9: 2^(2 - 2) = 1
    assert fake_quantize(x, parse_format("mxfp4")).tolist() == [[6, 4, 2, 0.5, 0, 1, 6, -4]]
    # largest 7.9: element step 2^2 / 64
    assert fake_quantize(x, parse_format("mxint8")).tolist() == [[6, 5, 2.5, 0.25, -0.25, 1.25, 7.875, -3.5]]


@pytest.mark.parametrize("name", NAMES)
def test_blocks_run_along_the_given_axis_and_memory_order_is_kept(name):
    format = parse_format(name)
    x = torch.randn(2, 40, 3, 5, generator=torch.Generator().manual_seed(0))
    along_channels = reference(x.movedim(1, -1).reshape(-1, 40), name).view(2, 3, 5, 40).movedim(-1, 1)
    flattened = reference(x.flatten(1), name).view_as(x)
    for memory_format in (torch.contiguous_format, torch.channels_last):
        x = x.contiguous(memory_format=memory_format)
        for out, expected in (
            (fake_quantize(x, format, dim=1), along_channels),
            (fake_quantize(x, format, dim=None), flattened),
        ):
            assert torch.equal(out, expected) and out.stride() == x.stride()
    assert torch.equal(fake_quantize(x[0, 0, 0, 0], format, dim=None), fake_quantize(x[0, 0, 0, 0], format))


@pytest.mark.parametrize("name", MX)
def test_the_gradient_passes_inside_the_clipping_range_only(name):
    x = torch.randn(40, 32, generator=torch.Generator().manual_seed(0))
    x[:, 0] = 3.999  # past the largest element of every format, mxint8's 127/64 included
    weights = torch.rand(40, 32) + 0.1
    x.requires_grad_()
    (fake_quantize(x, parse_format(name)) * weights).sum().backward()
    values, emax = MX[name]
    scale = torch.tensor([[2.0 ** (math.frexp(float(row.abs().max()))[1] - 1 - emax)] for row in x.detach()])
    clipped = x.detach().abs() > scale * values[-1]
    assert clipped.any()
    assert torch.equal(x.grad, torch.where(clipped, 0, weights))


def test_the_gradient_passes_nvfp4_where_its_block_scale_was_not_rounded_down():
    x = torch.randn(40, 16, generator=torch.Generator().manual_seed(0), requires_grad=True)
    fake_quantize(x, parse_format("nvfp4")).sum().backward()
    top = x.detach().abs().amax(dim=1, keepdim=True).numpy()
    g = top.max() / np.float32(2688)
    b = nearest(top / np.float32(6) / g, E4M3).astype(np.float32)
    clipped = x.detach().abs() > torch.from_numpy(b * g) * 6
    assert 0 < clipped.sum() <= 40
    assert torch.equal(x.grad, (~clipped).float())


def test_nvfp4_differs_from_torchao_at_ties_alone():
    """This code divides by b * g, as defined; torchao multiplies by the rounded reciprocal."""
    theirs = pytest.importorskip("torchao.prototype.mx_formats.nvfp4_tensor", reason="needs the extra export (torchao)")
    kernels = importlib.import_module("torchao.prototype.mx_formats.kernels")
    x = torch.randn(64, 256, generator=torch.Generator().manual_seed(0))
    ties = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0])
    x[0, 0] = 448 * 6 / 64  # g = 1 / 64
    for row in range(1, 64, 2):  # blocks whose scale b is row, an e4m3 value up to 16, and all of whose values are ties
        b = min(row, 15)
        x[row, :16] = torch.cat([torch.tensor([6.0]), ties, -ties, torch.zeros(1)]) * b / 64
    g = theirs.per_tensor_amax_to_scale(x.abs().max())
    scales, packed = theirs.nvfp4_quantize(x, per_tensor_scale=g)
    their_elements = kernels.f4_unpacked_to_f32(kernels.unpack_uint4(packed)).view(x.shape)
    elements, b, tensor_scale = round_blocks(x, parse_format("nvfp4"))
    assert torch.equal(b, scales.float().view(b.shape)) and float(tensor_scale) == float(g)
    differ = elements.abs() != their_elements.abs()
    exact = x.double() / (b.double() * float(g)).repeat_interleave(16, dim=1)
    distance = (exact.abs().unsqueeze(-1) - ties.double()).abs().amin(dim=-1) / exact.abs()
    assert (distance[differ] < 2**-22).all() and differ.any()
    assert torch.equal(elements[~differ], their_elements[~differ])
    # At a tie, the definition chooses the neighbour with the even mantissa: 0, 1, 2 or 4.
    at_tie = elements[distance == 0].abs().unique().tolist()
    assert at_tie == [0.0, 1.0, 2.0, 4.0]
