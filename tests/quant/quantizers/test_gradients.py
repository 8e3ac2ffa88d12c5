"""Gradients against float64 autograd of the definitions: straight-through and LSQ."""

import pytest
import torch

from quant.formats import IntFormat, parse_format
from quant.quant_utils import MIN_LEARNED_SCALE, fake_quantize, lsq_gradient_scale, use_compiled
from tests.quant.oracles import float_values, nearest


@pytest.fixture(params=["native", "inductor"])
def compiled(request):
    if not use_compiled("auto", compiler=request.param):
        pytest.skip("no compiler here")
    yield
    use_compiled("off")


class Rounded(torch.autograd.Function):
    """Rounding in float64 with a gradient of 1, the straight-through estimator."""

    @staticmethod
    def forward(ctx, v, name):
        if name.startswith("int"):
            return torch.round(v)
        values = {"e4m3": float_values(4, 3, 1), "e2m1": float_values(2, 1)}[name]
        return torch.from_numpy(nearest(v.numpy(), values))

    @staticmethod
    def backward(ctx, grad):
        return grad, None


def reference(x, scale, name, zero_point=None):
    """The definition in float64: autograd of clamp gives the clipping, the product rule gives LSQ."""
    format = parse_format(name)
    if zero_point is None:
        low, high = -format.qmax, format.qmax
    else:
        low, high = -format.qmax - 1 - zero_point, format.qmax - zero_point
    v = torch.clamp(x / scale, torch.as_tensor(low).double(), torch.as_tensor(high).double())
    return Rounded.apply(v, name) * scale


SHAPES = {
    "tensor": ((6, 5, 8), ()),
    "row": ((6, 5, 8), (6, 1, 1)),
    "token": ((6, 5, 8), (6, 5, 1)),
    "last": ((6, 5, 8), (8,)),
    "channel": ((6, 5, 3, 3), (1, 5, 1, 1)),
    "channels_last": ((6, 5, 3, 3), (1, 5, 1, 1)),
    "apart": ((6, 5, 3, 2), (6, 1, 3, 1)),
    "0-d": ((), ()),
}


def check_gradients(shape, name):
    sizes, scale_sizes = SHAPES[shape]
    generator = torch.Generator().manual_seed(0)
    name, _, moved = name.partition(" ")
    x = torch.randn(sizes, generator=generator) * 2
    if shape == "channels_last":
        x = x.contiguous(memory_format=torch.channels_last)
    high = parse_format(name).qmax
    scale = (torch.rand(scale_sizes, generator=generator) + 1) / high  # clips about a fifth
    zero_point = torch.randint(-5, 6, scale_sizes, generator=generator) if moved else None
    upstream = torch.randn(sizes, generator=generator)

    x64, scale64 = x.double().requires_grad_(), scale.double().requires_grad_()
    out64 = reference(x64, scale64, name, zero_point)
    out64.backward(upstream.double())
    x, scale = x.requires_grad_(), scale.requires_grad_()
    out = fake_quantize(x, parse_format(name), scale, zero_point, gradient_scale=0.25)
    out.backward(upstream)
    torch.testing.assert_close(out.double(), out64, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(x.grad.double(), x64.grad, rtol=0, atol=0)
    torch.testing.assert_close(scale.grad.double(), scale64.grad * 0.25, rtol=1e-5, atol=1e-6 * high)
    if sizes:
        assert (x.grad == 0).any() and (x.grad != 0).any()
        assert x.grad.stride() == x.stride()


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", ["int2", "int4", "int8", "int4 moved", "e4m3", "e2m1"])
def test_gradients_equal_float64_autograd(shape, name):
    check_gradients(shape, name)


@pytest.mark.parametrize("name", ["int4", "int4 moved", "e4m3"])
def test_compiled_gradients_equal_float64_autograd(name, compiled):
    for shape in ("tensor", "channel"):
        check_gradients(shape, name)


def test_lsq_by_hand():
    x = torch.tensor([0.3, 1.2, -0.9, 5.0, -7.0], requires_grad=True)
    scale = torch.tensor(0.5, requires_grad=True)
    upstream = torch.tensor([1.0, 10.0, 100.0, 1000.0, 10000.0])
    fake_quantize(x, IntFormat(3), scale).backward(upstream)
    assert x.grad.tolist() == [1, 10, 100, 0, 0]
    # inside q - x/s: 1 - 0.6, 2 - 2.4, -2 + 1.8; outside the bound: 3, -3
    expected = 1 * 0.4 + 10 * -0.4 + 100 * -0.2 + 1000 * 3 + 10000 * -3
    assert float(scale.grad) == pytest.approx(expected, rel=1e-6)


def test_lsq_gradient_scale():
    assert lsq_gradient_scale(100, 7) == pytest.approx(1 / 700**0.5)
    assert lsq_gradient_scale(0, 1) == 1


def test_the_boundary_itself_is_inside():
    x = torch.tensor([-3.5, 3.5, 3.5001, -3.5001], requires_grad=True)
    fake_quantize(x, IntFormat(4), 0.5).sum().backward()
    assert x.grad.tolist() == [1, 1, 0, 0]


def test_only_what_asks_for_a_gradient_gets_one():
    x, scale = torch.randn(4, requires_grad=True), torch.tensor(0.1)
    fake_quantize(x, IntFormat(4), scale).sum().backward()
    assert scale.grad is None and x.grad is not None
    x, scale = torch.randn(4), torch.tensor(0.1, requires_grad=True)
    fake_quantize(x, IntFormat(4), scale).sum().backward()
    assert x.grad is None and scale.grad is not None


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_inputs_get_half_gradients_and_float32_scale_gradients(dtype):
    x = torch.randn(64, 8, generator=torch.Generator().manual_seed(0)).to(dtype)
    half, full = x.clone().requires_grad_(), x.float().requires_grad_()
    scales = [torch.full((8,), 0.2, requires_grad=True) for _ in range(2)]
    for value, scale in zip((half, full), scales, strict=True):
        fake_quantize(value, IntFormat(4), scale).backward(torch.ones_like(value))
    assert half.grad.dtype == dtype and torch.equal(half.grad.float(), full.grad)
    assert scales[0].grad.dtype == torch.float32
    torch.testing.assert_close(scales[0].grad, scales[1].grad)


def test_an_expanded_gradient_and_empty_inputs():
    x, scale = torch.randn(3, 4, requires_grad=True), torch.tensor(0.1, requires_grad=True)
    fake_quantize(x, IntFormat(8), scale).sum().backward()  # the sum's gradient is one number, expanded
    assert torch.equal(x.grad, torch.ones(3, 4))
    empty = torch.empty(0, 4, requires_grad=True)
    fake_quantize(empty, IntFormat(8), scale).sum().backward()
    assert empty.grad.shape == (0, 4)


@pytest.mark.parametrize("name", ["int2", "int8", "e4m3", "e2m1"])
def test_an_all_zero_input_gives_finite_gradients(name):
    for value in (1.0, 0.0, -1.0):
        x, scale = torch.zeros(8, requires_grad=True), torch.tensor(value, requires_grad=True)
        fake_quantize(x, parse_format(name), scale).sum().backward()
        assert torch.equal(x.grad, torch.ones(8)) and scale.grad == 0


def test_a_learned_scale_driven_negative_is_used_as_the_smallest_and_recovers():
    x = torch.linspace(-1, 1, 101)
    scale = torch.nn.Parameter(torch.tensor(-0.3))
    out = fake_quantize(x, IntFormat(4), scale)
    assert torch.equal(out, fake_quantize(x, IntFormat(4), MIN_LEARNED_SCALE))
    optimizer = torch.optim.SGD([scale], lr=0.01)
    for _ in range(200):
        optimizer.zero_grad()
        (fake_quantize(x, IntFormat(4), scale) - x).square().mean().backward()
        assert scale.grad.isfinite()
        optimizer.step()
    assert 0.1 < scale.item() < 0.2  # 1/7 spans the tensor
    frozen = torch.nn.Parameter(torch.tensor(-0.3), requires_grad=False)
    assert torch.equal(fake_quantize(x, IntFormat(4), frozen), out)


def test_a_given_scale_may_be_smaller_than_a_learned_one():
    x = torch.tensor([1e-10, 7e-10])
    assert fake_quantize(x, IntFormat(4), 1e-10).tolist() == pytest.approx([1e-10, 7e-10])


@pytest.mark.parametrize("name", ["int4", "e4m3"])
def test_second_derivatives_see_the_straight_through_estimator(name):
    """Hessian-vector products of a loss of rounded weights, as sensitivity allocators compute."""
    generator = torch.Generator().manual_seed(0)
    w, data = torch.randn(6, generator=generator) * 2, torch.randn(9, 6, generator=generator)
    vector = torch.randn(6, generator=generator)

    def product(rounded, w):
        loss = (data.to(w) @ rounded(w)).pow(4).sum()
        (gradient,) = torch.autograd.grad(loss, w, create_graph=True)
        return torch.autograd.grad(gradient @ vector.to(w), w)[0]

    actual = product(lambda w: fake_quantize(w, parse_format(name), 0.3), w.clone().requires_grad_())
    scale = torch.tensor(0.3, dtype=torch.float32).double()
    expected = product(lambda w: reference(w, scale, name), w.double().requires_grad_())
    torch.testing.assert_close(actual.double(), expected, rtol=1e-4, atol=1e-3)


def test_the_offset_of_lsq_plus_gets_the_gradient_of_what_is_clipped():
    """LSQ+ (arXiv 2004.09576): x^ = Q((x - beta) / s) s + beta, so that d beta = sum of g outside the range."""
    x, upstream = torch.linspace(-3, 3, 61), torch.randn(61, generator=torch.Generator().manual_seed(0))
    beta, scale = torch.tensor(0.25, requires_grad=True), torch.tensor(0.25, requires_grad=True)
    (fake_quantize(x - beta, IntFormat(4), scale, grid="full") + beta).backward(upstream)
    outside = ((x - 0.25) / 0.25 < -8) | ((x - 0.25) / 0.25 > 7)
    assert outside.any()
    torch.testing.assert_close(beta.grad, upstream[outside].sum())


def test_the_clipping_value_of_pact_gets_the_gradient_of_what_it_clips():
    """PACT (arXiv 1805.06085): d alpha = sum of g where x >= alpha, with the steps alpha / (2^k - 1) as constants."""
    x, upstream = torch.linspace(-3, 3, 61), torch.randn(61, generator=torch.Generator().manual_seed(0))
    alpha = torch.tensor(1.5, requires_grad=True)
    clipped = torch.where(x >= alpha, alpha, x.clamp(min=0))
    out = clipped + (fake_quantize(clipped, IntFormat(4), alpha.detach() / 15, grid="unsigned") - clipped).detach()
    out.backward(upstream)
    assert out.unique().numel() == 16
    torch.testing.assert_close(alpha.grad, upstream[x >= 1.5].sum())
