"""Quantizer: how scales are set, when they change, and that they survive device moves, saving and format switches."""

import copy
import math

import pytest
import torch
from safetensors.torch import load, save

from quant.convert import calibrate, quantize_model, set_formats
from quant.formats import FLOAT, IntFormat, parse_format
from quant.quant_utils import fake_quantize, lsq_gradient_scale, scale_from_range
from quant.quantizers.quantizer import ACTIVATION, WEIGHT, Quantizer, QuantizerConfig

FORMATS = [parse_format(name) for name in ("int2", "int4", "int8", "e4m3", "e2m1")]


def randn(*sizes, seed=0):
    return torch.randn(sizes, generator=torch.Generator().manual_seed(seed))


def activation(range="calibrated", format="int4", **kwargs):
    quantizer = Quantizer(QuantizerConfig(range=range, symmetric=False, observer="minmax", **kwargs))
    quantizer.set_format(parse_format(format))
    return quantizer


# ------------------------------------------------------ dynamic


@pytest.mark.parametrize("format", FORMATS, ids=str)
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("shape", [(6, 1), (6, 1, 1, 1), (1, 6)], ids=str)
def test_dynamic_weights_per_channel(format, symmetric, shape):
    sizes = {(6, 1): (6, 8), (6, 1, 1, 1): (6, 2, 3, 3), (1, 6): (8, 6)}[shape]
    w, axis = randn(*sizes) + 0.3, shape.index(6)
    config = QuantizerConfig(range="dynamic", granularity="channel", observer="minmax", symmetric=symmetric)
    quantizer = Quantizer(config, shape, batched=False)
    quantizer.set_format(format)
    out = quantizer(w)
    for channel, rounded in zip(w.unbind(axis), out.unbind(axis), strict=True):
        scale, zero_point = scale_from_range(channel.min(), channel.max(), format, symmetric)
        assert torch.equal(rounded, fake_quantize(channel, format, scale, zero_point))


@pytest.mark.parametrize("symmetric", [True, False])
def test_dynamic_activations_per_token_do_not_see_their_neighbours(symmetric):
    config = QuantizerConfig(range="dynamic", granularity="token", observer="minmax", symmetric=symmetric)
    quantizer = Quantizer(config)
    quantizer.set_format(IntFormat(4))
    x = randn(3, 5, 16)
    x[1, 2] *= 1000
    out = quantizer(x)
    for token, rounded in zip(x.reshape(-1, 16), out.reshape(-1, 16), strict=True):
        scale, zero_point = scale_from_range(token.min(), token.max(), IntFormat(4), symmetric)
        assert torch.equal(rounded, fake_quantize(token, IntFormat(4), scale, zero_point))


def test_the_token_of_a_convolution_is_a_position():
    quantizer = Quantizer(QuantizerConfig(range="dynamic", granularity="token", observer="minmax"), reduction_dim=1)
    quantizer.set_format(IntFormat(8))
    x = randn(2, 6, 3, 4)
    for memory_format in (torch.contiguous_format, torch.channels_last):
        scale = x.abs().amax(dim=1, keepdim=True) / torch.tensor(127.0)
        assert torch.equal(quantizer(x.contiguous(memory_format=memory_format)), fake_quantize(x, IntFormat(8), scale))


@pytest.mark.parametrize("percentile,observer", [(0, "minmax"), (0, "mse"), (99.0, "minmax")])
def test_dynamic_ranges_follow_the_tensor(percentile, observer):
    quantizer = Quantizer(QuantizerConfig(range="dynamic", observer=observer, percentile=percentile))
    quantizer.set_format(IntFormat(4))
    x = randn(1000)
    assert torch.equal(quantizer(x * 4), quantizer(x) * 4)
    assert len(quantizer.state_dict()) == 0


@pytest.mark.parametrize("name", ["bf16", "fp16", "mxfp4", "nvfp4", "e8m3"])
def test_formats_without_a_scale_need_no_calibration(name):
    quantizer = activation("learned", name).eval()
    x = randn(4, 40)
    assert torch.equal(quantizer(x), fake_quantize(x, parse_format(name)))
    assert len(quantizer.state_dict()) == 0


# ------------------------------------------------------ learned offsets (LSQ+)


def lsq_plus(x, format="int4"):
    quantizer = Quantizer(QuantizerConfig(symmetric=False, observer="minmax", learned_offset=True))
    quantizer.set_format(parse_format(format))
    quantizer.observe(x)
    quantizer.finish_calibration()
    return quantizer


def test_a_learned_offset_starts_as_the_zero_point():
    x = randn(16, 8) + 0.7
    fixed = activation("calibrated")
    fixed.observe(x)
    fixed.finish_calibration()
    torch.testing.assert_close(lsq_plus(x)(x), fixed(x), rtol=0, atol=1e-6)
    assert lsq_plus(x.bfloat16())(x.bfloat16()).dtype == torch.bfloat16


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_learned_offsets_compute_in_float32_too(dtype):
    x = randn(64, 64, seed=3).to(dtype)
    quantizer = lsq_plus(x.float(), "int8")
    torch.testing.assert_close(quantizer(x), quantizer(x.float()).to(dtype), rtol=0, atol=0)


def test_gradients_of_lsq_plus():
    """LSQ+ (arXiv 2004.09576): dbeta is the gradient outside the range, ds that of LSQ on (x - beta) / s."""
    x, g = (randn(16, 8) * 3).requires_grad_(), randn(16, 8, seed=1)
    quantizer = lsq_plus(randn(16, 8, seed=2))
    grid = quantizer.grids["int4"]
    quantizer(x).backward(g)
    v = ((x - grid.offset) / grid.scale).detach()
    inside = (v >= -8) & (v <= 7)
    assert 0 < inside.sum() < x.numel()
    torch.testing.assert_close(grid.offset.grad, (g * ~inside).sum() / math.sqrt(8 * 8), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(x.grad, g * inside)
    step = torch.where(inside, v.round() - v, v.clamp(-8, 7))
    torch.testing.assert_close(grid.scale.grad, (g * step).sum() / math.sqrt(8 * 8), rtol=1e-4, atol=1e-5)


def test_what_is_symmetric_has_no_offset():
    assert lsq_plus(randn(4, 4), "e4m3").grids["e4m3"].offset is None
    with pytest.raises(
        ValueError, match="learned_offset needs range learned and symmetric False, got learned and True"
    ):
        Quantizer(QuantizerConfig(learned_offset=True))


# ------------------------------------------------------ calibrated and learned


@pytest.mark.parametrize("range", ["calibrated", "learned"])
def test_evaluation_never_depends_on_the_batch(range):
    quantizer = activation(range)
    for seed in (1, 2, 3):
        quantizer.observe(randn(16, 8, seed=seed))
    quantizer.finish_calibration()
    quantizer.eval()
    x = randn(16, 8) * 5
    together = quantizer(x)
    assert torch.equal(torch.cat([quantizer(row) for row in x.split(1)]), together)
    seen = torch.cat([randn(16, 8, seed=seed) for seed in (1, 2, 3)])
    scale, zero_point = scale_from_range(seen.min(), seen.max(), IntFormat(4), symmetric=False)
    assert torch.equal(together, fake_quantize(x, IntFormat(4), scale, zero_point))


def test_evaluation_before_calibration_says_what_to_do():
    with pytest.raises(RuntimeError, match=r"int4.*calibrate"):
        activation().eval()(randn(3))


def test_training_before_calibration_starts_from_the_first_batch():
    quantizer = activation("learned")
    x = randn(16, 8)
    first = quantizer(x)
    scale, zero_point = scale_from_range(x.min(), x.max(), IntFormat(4), symmetric=False)
    assert torch.equal(first, fake_quantize(x, IntFormat(4), scale, zero_point))
    quantizer(x * 100)
    assert torch.equal(quantizer(x), first)


def test_weights_calibrate_themselves_also_in_evaluation():
    quantizer = Quantizer(WEIGHT, (6, 1), batched=False).eval()
    quantizer.set_format(IntFormat(2))
    w = randn(6, 100)
    assert all(len(channel.unique()) == 3 for channel in quantizer(w))


@pytest.mark.parametrize("sign", [1, -1])
def test_a_one_sided_tensor_uses_every_code(sign):
    quantizer = activation(format="int2")
    x = sign * torch.linspace(0, 3, 301)
    assert quantizer(x).unique().tolist() == sorted([0.0, sign * 1.0, sign * 2.0, sign * 3.0])
    assert quantizer.grids["int2"].largest_code == 3


def test_an_all_zero_range_stays_finite_and_learns():
    quantizer = activation("learned")
    assert torch.equal(quantizer(torch.zeros(4)), torch.zeros(4))
    out = quantizer(torch.ones(4, requires_grad=True))
    out.sum().backward()
    assert out.isfinite().all() and quantizer.grids["int4"].scale.grad.isfinite()


def test_empty_tensors_pass_and_change_nothing():
    for quantizer in (activation("dynamic"), activation("learned"), activation("learned").eval()):
        quantizer.observe(torch.empty(0, 4))
        assert quantizer.observation is None and quantizer(torch.empty(0, 4)).shape == (0, 4)
    assert not quantizer.grids["int4"].is_ready


@pytest.mark.parametrize("batched", [True, False])
@pytest.mark.parametrize("symmetric", [True, False])
def test_lsq_counts_the_elements_without_the_batch_and_the_grids_own_bound(batched, symmetric):
    quantizer = Quantizer(QuantizerConfig(symmetric=symmetric, observer="minmax"), batched=batched)
    quantizer.set_format(IntFormat(4))
    x = randn(6, 5, 8).relu().requires_grad_()
    quantizer(x).sum().backward()
    scale = quantizer.grids["int4"].scale
    learned, twin = scale.grad.clone(), scale.detach().clone().requires_grad_()
    zero_point = None if symmetric else quantizer.grids["int4"].zero_point
    fake_quantize(x, IntFormat(4), twin, zero_point).sum().backward()
    factor = lsq_gradient_scale(40 if batched else 240, 7 if symmetric else 15)  # after ReLU: 0..15
    torch.testing.assert_close(learned, twin.grad * factor)


def test_a_learned_scale_is_used_positive_also_when_frozen():
    for frozen in (False, True):
        quantizer = activation("learned")
        quantizer.requires_grad_(not frozen)
        x = randn(100)
        quantizer(x)
        grid = quantizer.grids["int4"]
        before = grid.scale.detach().clone()
        with torch.no_grad():
            grid.scale.fill_(-1)
        assert torch.equal(quantizer(x), fake_quantize(x, IntFormat(4), before / 2, grid.zero_point))


# ------------------------------------------------------ switching


def test_formats_switched_between_forward_and_backward_do_not_reach_the_backward():
    def gradients(switch):
        quantizer = Quantizer(QuantizerConfig(symmetric=False))
        for format in FORMATS:
            quantizer.prepare(format)
        quantizer.observe(randn(500))
        quantizer.finish_calibration()
        quantizer.set_format(IntFormat(2))
        x = randn(64, seed=1).requires_grad_()
        out = quantizer(x) * quantizer(x)
        if switch:
            quantizer.set_format(parse_format("e4m3"))
            quantizer(randn(8))
            quantizer.set_format(FLOAT)
        out.sum().backward()
        scales = {name: grid.scale.grad for name, grid in quantizer.grids.items()}
        assert [name for name, gradient in scales.items() if gradient is not None] == ["int2"]
        return x.grad, scales["int2"]

    for plain, switched in zip(gradients(False), gradients(True), strict=True):
        assert torch.equal(plain, switched)


def test_recalibrating_between_forward_and_backward_is_an_error_not_a_wrong_gradient():
    quantizer = activation("learned")
    out = quantizer(randn(64).requires_grad_())
    quantizer.observe(randn(64) * 3)
    quantizer.finish_calibration()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


def test_each_format_has_its_own_learned_scale_from_the_start():
    quantizer = Quantizer(ACTIVATION)
    for format in FORMATS:
        quantizer.prepare(format)
    assert sorted(dict(quantizer.named_parameters())) == sorted(f"grids.{format}.scale" for format in FORMATS)
    keys = set(quantizer.state_dict())
    for format in FORMATS:
        quantizer.set_format(format)
        quantizer(randn(8))
    assert set(quantizer.state_dict()) == keys
    assert len({grid.scale.item() for grid in quantizer.grids.values()}) == len(FORMATS)


# ------------------------------------------------------ moving and saving


def trained(range="learned"):
    quantizer = Quantizer(QuantizerConfig(range=range, symmetric=False))
    for format in FORMATS:
        quantizer.prepare(format)
    quantizer.observe(randn(500) * 0.0371 + 0.01)
    quantizer.finish_calibration()
    quantizer.set_format(IntFormat(8))
    return quantizer.eval()


@pytest.mark.parametrize("range", ["calibrated", "learned"])
@pytest.mark.parametrize("move", ["half", "bfloat16", "double", "cpu"])
def test_scales_stay_the_same_float32_values_when_the_model_changes_precision(range, move):
    quantizer, before = trained(range), trained(range).state_dict()
    getattr(quantizer, move)()
    after = quantizer.state_dict()
    assert before.keys() == after.keys()
    for key, value in before.items():
        assert after[key].dtype == value.dtype and torch.equal(after[key], value)
    assert all(grid.rounding_params.dtype == torch.float32 for grid in quantizer.grids.values())


def test_to_another_device():
    quantizer = trained().to("meta")
    assert all(tensor.is_meta for tensor in quantizer.state_dict().values())
    assert quantizer.grids["int8"].rounding_params.is_meta
    quantizer.set_format(IntFormat(3))
    assert quantizer.grids["int3"].scale.is_meta


@pytest.mark.parametrize("range", ["calibrated", "learned"])
@pytest.mark.parametrize("prepared", [True, False], ids=["prepared", "fresh"])
def test_a_saved_quantizer_is_the_same_after_loading(range, prepared):
    quantizer, x = trained(range), randn(100)
    fresh = Quantizer(QuantizerConfig(range=range, symmetric=False)).eval()
    if prepared:
        for format in FORMATS:
            fresh.prepare(format)
    fresh.load_state_dict(load(save(quantizer.state_dict())))
    for format in FORMATS:
        for one in (quantizer, fresh):
            one.set_format(format)
        assert torch.equal(fresh(x), quantizer(x))
    assert fresh.grids["int8"].is_ready and fresh.grids["int8"].largest_code == quantizer.grids["int8"].largest_code


def test_loading_what_was_never_calibrated_is_still_not_calibrated():
    fresh, saved = activation(), activation()
    fresh(randn(4))
    fresh.load_state_dict(saved.state_dict())
    with pytest.raises(RuntimeError, match="never calibrated"):
        fresh.eval()(randn(4))


def test_a_copy_is_independent():
    quantizer, x = trained(), randn(100)
    before = quantizer(x)
    twin = copy.deepcopy(quantizer)
    with torch.no_grad():
        twin.grids["int8"].scale.mul_(2)
    twin.set_format(IntFormat(2))
    assert torch.equal(quantizer(x), before) and quantizer.format == IntFormat(8)
    twin.load_state_dict(quantizer.state_dict())
    twin.set_format(IntFormat(8))
    assert torch.equal(twin(x), before)


def test_calibrating_in_inference_mode_leaves_a_quantizer_that_trains():
    quantizer = activation("learned")
    with torch.inference_mode():
        quantizer.observe(randn(100))
        quantizer.finish_calibration()
        quantizer.set_format(IntFormat(3))
        quantizer.train()(randn(100))
        quantizer.eval()(randn(100))
    for width in (3, 4):
        quantizer.set_format(IntFormat(width))
        quantizer(randn(10).requires_grad_()).sum().backward()
        assert quantizer.grids[f"int{width}"].scale.grad is not None


# ------------------------------------------------------ configuration


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"granularity": "token"}, "dynamic, got learned"),
        ({"granularity": "token", "range": "calibrated"}, "dynamic, got calibrated"),
        ({"observer": "median"}, "observer must be one of minmax, mse, .*entropy.*, got 'median'"),
        ({"observer": "avg_minmax", "granularity": "channel"}, "avg_minmax averages over batches .* got channel"),
        (
            {"learned_offset": True, "range": "calibrated"},
            "learned_offset needs range learned and symmetric False, got calibrated",
        ),
        ({"range": "static"}, "range must be one of dynamic, calibrated, learned"),
        ({"percentile": 101}, "101"),
        ({"percentile": -1}, "-1"),
        ({"percentile": float("nan")}, "nan"),
    ],
)
def test_configurations_that_make_no_sense_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        QuantizerConfig(**fields)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(
    "layer, shape",
    [(torch.nn.Linear(6, 4), (9, 5, 6)), (torch.nn.Conv2d(6, 4, 3), (3, 6, 8, 8))],
    ids=["rows", "image"],
)
def test_activations_may_have_a_scale_for_each_input_channel(layer, shape, symmetric):
    """Channels of very different magnitudes are rounded independently."""
    format, axis = IntFormat(4), len(shape) - 1 if len(shape) == 3 else 1
    sizes = torch.logspace(-2, 2, 6).view([6 if d == axis else 1 for d in range(len(shape))])
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0)) * sizes
    model = torch.nn.Sequential(copy.deepcopy(layer))
    modules = quantize_model(
        model,
        formats=[format],
        weight=QuantizerConfig("calibrated", "channel", "minmax"),
        activation=QuantizerConfig("calibrated", "channel", "minmax", symmetric=symmetric),
    )
    calibrate(model, modules, [x])
    set_formats(modules, {"0": (FLOAT, format)})
    low, high = x.amin([d for d in range(len(shape)) if d != axis]), x.amax([d for d in range(len(shape)) if d != axis])
    scale, zero_point = scale_from_range(low, high, format, symmetric)
    zero_point = None if zero_point is None else zero_point.view(sizes.shape)
    expected = layer(fake_quantize(x, format, scale.view(sizes.shape), zero_point))
    torch.testing.assert_close(model.eval()(x), expected)
    set_formats(modules, {"0": (format, format)})
    weight = modules["0"].weight_quantizer(modules["0"].weight)
    rounded = fake_quantize(x, format, scale.view(sizes.shape), zero_point)
    torch.testing.assert_close(model(x), modules["0"].compute(rounded, weight), rtol=1e-4, atol=1e-3)


def test_weights_learn_offsets_too():
    weight = torch.rand(3, 50, generator=torch.Generator().manual_seed(0)) + torch.tensor([[0.0], [5.0], [-9.0]])
    config = QuantizerConfig("learned", "channel", "minmax", symmetric=False, learned_offset=True)
    quantizer = Quantizer(config, (3, 1), batched=False)
    quantizer.prepare(IntFormat(4))
    quantizer.set_format(IntFormat(4))
    rounded = quantizer(weight)
    assert quantizer.grids["int4"].offset.shape == (3, 1)
    spans = torch.maximum(weight.amax(1), torch.zeros(3)) - torch.minimum(weight.amin(1), torch.zeros(3))
    assert ((rounded - weight).abs().amax(1) <= spans / 15 * 0.51).all()
    rounded.sum().backward()
    assert quantizer.grids["int4"].offset.grad is not None
