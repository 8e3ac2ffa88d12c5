"""Quantized layers against the plain formulation: round input and weight, then call the float layer's function."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils.checkpoint import checkpoint
from transformers.pytorch_utils import Conv1D

import quant.quant_module
from quant.convert import from_float
from quant.formats import FLOAT, IntFormat, parse_format
from quant.quant_utils import fake_quantize, use_compiled
from quant.quantizers.quantizer import ACTIVATION, QuantizerConfig, Rounder

PAIRS = [("int2", "int8"), ("int4", "e4m3"), ("e2m1", "int3"), ("mxfp4", "nvfp4"), ("mxint8", "int8"), ("bf16", "int4")]
HALF_OPEN = [("int4", "float"), ("float", "int4")]


def generator():
    return torch.Generator().manual_seed(0)


def conv(**kwargs):
    return nn.Conv2d(8, 16, 3, **kwargs), torch.randn(4, 8, 9, 9, generator=generator())


LAYERS = {
    "linear": lambda: (nn.Linear(12, 7), torch.randn(4, 5, 12, generator=generator())),
    "linear without bias": lambda: (nn.Linear(12, 7, bias=False), torch.randn(4, 12, generator=generator())),
    "one output": lambda: (nn.Linear(12, 1), torch.randn(4, 12, generator=generator())),
    "Conv1D": lambda: (Conv1D(7, 12), torch.randn(4, 5, 12, generator=generator())),
    "conv": lambda: conv(padding=1),
    "conv without bias": lambda: conv(bias=False),
    "grouped": lambda: conv(groups=4),
    "depthwise": lambda: conv(groups=8),
    "dilated and strided": lambda: conv(dilation=2, stride=(2, 1), padding="valid"),
    "same": lambda: conv(padding="same", dilation=2),
    "reflect": lambda: conv(padding=2, padding_mode="reflect"),
    "replicate": lambda: conv(padding=(2, 1), padding_mode="replicate"),
    "circular": lambda: conv(padding=1, padding_mode="circular"),
    "zeros": lambda: conv(padding=2, padding_mode="zeros"),
    "conv1d": lambda: (nn.Conv1d(8, 12, 3, groups=2, dilation=2), torch.randn(4, 8, 9, generator=generator())),
    "conv1d same": lambda: (nn.Conv1d(8, 12, 3, padding="same"), torch.randn(4, 8, 9, generator=generator())),
    "conv3d": lambda: (nn.Conv3d(4, 6, 3, stride=2, padding=1), torch.randn(2, 4, 5, 6, 7, generator=generator())),
}


def quantized(layer, weight, activation, x):
    """The quantized layer, calibrated on x."""
    module = from_float(layer).train()
    module.set_formats(parse_format(weight), parse_format(activation))
    for quantizer, tensor in ((module.weight_quantizer, module.weight), (module.input_quantizer, x)):
        quantizer.observe(tensor)
        quantizer.finish_calibration()
    return module


def plainly(quantizer, x):
    """Round x with the public function and the quantizer's scale."""
    format = quantizer.format
    if format == FLOAT:
        return x
    if format.name not in quantizer.grids:
        return fake_quantize(x, format, dim=quantizer.reduction_dim)
    grid = quantizer.grids[format.name]
    zero_point = grid.zero_point if grid.moved else None
    factor = quantizer.rounding(x).gradient_scale
    return fake_quantize(x, format, grid.scale, zero_point, gradient_scale=factor)


def plain_forward(module, layer, x):
    """Compute the float layer's function on rounded tensors."""
    return torch.func.functional_call(layer, {"weight": plainly(module.weight_quantizer, module.weight)},
                                      (plainly(module.input_quantizer, x),))  # fmt: skip


def gradients(output, module, x):
    weights = torch.randn(output.shape, generator=generator())
    targets = [x, *(p for p in module.parameters() if p.requires_grad)]
    return torch.autograd.grad((output * weights).sum(), targets, allow_unused=True)


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("pair", PAIRS + HALF_OPEN, ids="-".join)
def test_outputs_and_gradients_equal_the_plain_formulation_bit_for_bit(kind, pair):
    layer, x = LAYERS[kind]()
    module = quantized(layer, *pair, x)
    x.requires_grad_()
    actual, expected = module(x), plain_forward(module, layer, x)
    assert torch.equal(actual, expected)
    for one, other in zip(gradients(actual, module, x), gradients(expected, module, x), strict=True):
        assert (one is None and other is None) or torch.equal(one, other)


@pytest.mark.parametrize("kind", LAYERS)
def test_in_float_a_layer_is_what_it_was(kind):
    layer, x = LAYERS[kind]()
    module = from_float(copy.deepcopy(layer))
    assert torch.equal(module(x), layer(x)) and isinstance(module, type(layer))
    assert dict(module.named_parameters()).keys() == dict(layer.named_parameters()).keys()
    assert [p.data_ptr() for p in from_float(layer).parameters()] == [p.data_ptr() for p in layer.parameters()]


@pytest.mark.parametrize("kind", LAYERS)
def test_weights_have_one_scale_for_each_output_channel(kind):
    layer, x = LAYERS[kind]()
    module = quantized(layer, "int2", "float", x)
    axis = 1 if kind == "Conv1D" else 0
    scale = module.weight_quantizer.grids["int2"].scale
    assert [scale.shape[d] for d in range(scale.dim())] == [
        layer.weight.shape[d] if d == axis else 1 for d in range(layer.weight.dim())
    ]
    rounded = module.weight_quantizer(module.weight)
    for channel in rounded.unbind(axis):
        assert len(channel.unique()) <= 3
    assert (rounded - module.weight).norm() > 0.1 * module.weight.norm()  # two bits are never lossless


def test_blocks_run_over_what_a_layer_sums():
    linear, conv2d, conv1d = from_float(nn.Linear(40, 3)), from_float(nn.Conv2d(40, 3, 3)), from_float(Conv1D(3, 40))
    for module, x in (
        (linear, torch.randn(2, 5, 40)),
        (conv2d, torch.randn(2, 40, 5, 5)),
        (conv1d, torch.randn(2, 40)),
    ):
        module.set_formats(parse_format("mxfp4"), parse_format("mxfp4"))
        w = module.weight.detach()
        summed = w.t() if module is conv1d else w.flatten(1)
        rounded = fake_quantize(summed.contiguous(), parse_format("mxfp4"))
        assert torch.equal(module.weight_quantizer(w), rounded.t() if module is conv1d else rounded.view_as(w))
        channels = 1 if module is conv2d else -1
        expected = fake_quantize(x.movedim(channels, -1).contiguous(), parse_format("mxfp4")).movedim(-1, channels)
        assert torch.equal(module.input_quantizer(x), expected)


def test_after_relu_the_input_uses_every_code():
    layer = nn.Linear(50, 3)
    x = torch.randn(200, 50, generator=generator()).relu()
    module = quantized(layer, "float", "int2", x)
    levels = module.input_quantizer(x).unique()
    assert len(levels) == 4 and levels[0] == 0
    signed = quantized(nn.Linear(50, 3), "float", "int2", x - 1.5)
    assert (signed.input_quantizer(x - 1.5) < 0).any()


# ------------------------------------------------------ memory


@pytest.fixture
def rounded(monkeypatch):
    """Weak references to the memory of every tensor that is rounded."""
    storages = []

    def record(name):
        call = getattr(Rounder, name)

        def recording(self, x):
            out = call(self, x)
            storages.append(StorageWeakRef(out.untyped_storage()))
            return out

        monkeypatch.setattr(Rounder, name, recording)

    record("__call__")
    record("values")
    return storages


@pytest.mark.parametrize("kind", ["linear", "Conv1D", "conv", "depthwise", "same"])
@pytest.mark.parametrize("needs_gradient", [True, False])
def test_rounded_tensors_are_not_kept_for_the_backward(kind, needs_gradient, rounded):
    layer, x = LAYERS[kind]()
    module = quantized(layer, "int4", "int8", x)
    output = module(x.requires_grad_(needs_gradient))
    assert len(rounded) == 2 and all(storage.expired() for storage in rounded)
    output.sum().backward()
    # The weight is rounded again; the input's values come with its gradients, unless autograd differentiates the layer.
    assert len(rounded) == (4 if kind == "same" else 3)
    assert all(storage.expired() for storage in rounded)


def test_without_gradients_nothing_is_kept(rounded):
    layer, x = LAYERS["conv"]()
    module = quantized(layer, "int4", "int8", x)
    with torch.no_grad():
        module(x)
    assert all(storage.expired() for storage in rounded)


@pytest.mark.parametrize("reentrant", [True, False])
def test_activation_checkpointing_gives_the_same_gradients_and_keeps_no_inputs(reentrant):
    torch.manual_seed(0)
    x = torch.randn(4, 12, requires_grad=True)
    layers = nn.Sequential(*(quantized(nn.Linear(12, 12), "int4", "int8", x.detach()) for _ in range(3)))

    def run(forward):
        output = forward(x)
        return output, lambda: torch.autograd.grad(output.sum(), [x, *layers.parameters()], allow_unused=True)

    inputs = []
    for layer in layers[1:]:
        layer.register_forward_pre_hook(lambda module, args: inputs.append(StorageWeakRef(args[0].untyped_storage())))
    _, plain = run(layers)
    assert not any(storage.expired() for storage in inputs)
    expected = plain()
    inputs.clear()
    if reentrant:  # its gradients come by backward alone
        output = checkpoint(layers, x, use_reentrant=True)
        assert all(storage.expired() for storage in inputs)
        output.sum().backward()
        actual = [x.grad, *(parameter.grad for parameter in layers.parameters())]
    else:
        _, recomputed = run(lambda x: checkpoint(layers, x, use_reentrant=False))
        assert all(storage.expired() for storage in inputs)
        actual = recomputed()
    for one, other in zip(actual, expected, strict=True):
        assert torch.equal(one, other)


# ------------------------------------------------------ what happens between forward and backward


def test_a_layer_used_twice_in_one_forward_under_two_assignments():
    layer = nn.Linear(12, 12)
    x = torch.randn(4, 12, generator=generator()).requires_grad_()
    module = quantized(layer, "int4", "int8", x)
    quantized(layer, "int2", "e4m3", x)

    def twice(forward):
        module.set_formats(IntFormat(4), IntFormat(8))
        h = forward(x)
        module.set_formats(IntFormat(2), parse_format("e4m3"))
        y = forward(h)
        module.set_formats(FLOAT, FLOAT)
        return y

    module.set_formats(IntFormat(2), parse_format("e4m3"))
    module(x)  # first use: ranges
    actual = twice(module)
    expected = twice(lambda h: plain_forward(module, layer, h))
    assert torch.equal(actual, expected)
    for one, other in zip(gradients(actual, module, x), gradients(expected, module, x), strict=True):
        assert (one is None and other is None) or torch.equal(one, other)


@pytest.mark.parametrize("what", ["input", "weight"])
def test_a_tensor_changed_in_place_before_the_backward_is_an_error(what):
    layer, x = LAYERS["linear"]()
    module = quantized(layer, "int4", "int8", x)
    module.weight.requires_grad_(what == "input")
    output = module(x.requires_grad_(what == "weight"))
    with torch.no_grad():
        (x if what == "input" else module.weight).add_(1)
    with pytest.raises(RuntimeError, match=r"in ?place"):
        output.sum().backward()


def test_a_forward_that_changes_its_input_in_place_keeps_what_it_saved():
    class Doubling(nn.Linear):
        def forward(self, input):
            return F.linear(input.mul_(2), self.weight, self.bias)

    torch.manual_seed(0)
    x = torch.randn(4, 12)
    module = quantized(Doubling(12, 7), "int4", "int8", x)
    module(x).sum().backward()
    expected = plainly(module.input_quantizer, x).mul(2).sum(0).expand(7, -1)
    inside = (module.weight_quantizer(module.weight.detach()) - module.weight).abs() < 1  # all: nothing is clipped here
    assert inside.all()
    clipped = module.weight.grad == 0
    torch.testing.assert_close(module.weight.grad[~clipped], expected[~clipped])


def test_second_derivatives_pass_through_the_recomputed_tensors():
    layer, x = LAYERS["linear"]()
    module = quantized(layer, "int8", "int8", x)

    def curvature(forward):
        (gradient,) = torch.autograd.grad(forward(x).pow(3).sum(), module.weight, create_graph=True)
        return torch.autograd.grad(gradient.pow(2).sum(), module.weight)[0]

    torch.testing.assert_close(curvature(module), curvature(lambda x: plain_forward(module, layer, x)))


# ------------------------------------------------------ modes


@pytest.mark.parametrize("kind", ["linear", "conv"])
def test_an_example_alone_gives_what_it_gives_in_a_batch(kind):
    layer, x = LAYERS[kind]()
    module = quantized(layer, "int4", "int8", x).eval()
    alone = torch.cat([module(example) for example in x.split(1)])
    torch.testing.assert_close(alone, module(x))
    x[1] *= 100
    torch.testing.assert_close(module(x)[0], alone[0])


@pytest.mark.parametrize("name", ["mxfp4", "nvfp4", "int8"])
@pytest.mark.parametrize("kind", ["linear without bias", "conv", "conv1d", "conv3d"])
def test_an_example_without_a_batch_is_rounded_as_in_one(kind, name):
    layer, x = LAYERS[kind]()
    module = quantized(layer, name, name, x[:1]).eval()
    torch.testing.assert_close(module(x[0]), module(x[:1])[0])


@pytest.mark.parametrize("kind", ["linear without bias", "conv", "conv1d", "conv3d"])
def test_a_scale_learns_from_an_example_without_a_batch_as_from_a_batch_of_one(kind):
    layer, x = LAYERS[kind]()
    module = quantized(layer, "int4", "int4", x)
    scale = module.input_quantizer.grids["int4"].scale
    one, alone = (torch.autograd.grad(module(x).square().sum(), scale)[0] for x in (x[:1], x[0]))
    torch.testing.assert_close(one, alone)


@pytest.mark.parametrize("kind", ["linear", "conv", "Conv1D"])
def test_autocast_half_models_and_inference_mode(kind):
    layer, x = LAYERS[kind]()
    module = quantized(layer, "int8", "int8", x)
    expected = module(x)
    with torch.autocast("cpu", torch.bfloat16):
        output = module(x)
    assert output.dtype == torch.bfloat16
    torch.testing.assert_close(output.float(), expected, rtol=0.05, atol=0.05)
    output.float().sum().backward()
    assert module.weight.grad.dtype == torch.float32 and module.weight.grad.isfinite().all()
    with torch.inference_mode():
        assert torch.equal(module(x), expected)
    module.eval()
    with torch.inference_mode():
        assert torch.equal(module(x), expected)
    module.bfloat16()
    output = module(x.bfloat16())
    assert output.dtype == torch.bfloat16
    torch.testing.assert_close(output.float(), expected, rtol=0.1, atol=0.1)
    assert module.input_quantizer.grids["int8"].scale.dtype == torch.float32
    output.sum().backward()


def test_empty_batches_pass():
    layer, x = LAYERS["linear"]()
    module = quantized(layer, "int4", "int8", x)
    output = module(x[:0])
    output.sum().backward()
    assert output.shape == (0, 5, 7) and torch.equal(module.weight.grad, torch.zeros(7, 12))


def test_granularities_that_do_not_exist_are_refused():
    with pytest.raises(ValueError, match="granularity"):
        from_float(nn.Linear(2, 2), QuantizerConfig(range="dynamic", granularity="token"), ACTIVATION)


def test_a_layer_must_say_how_it_computes():
    with pytest.raises(NotImplementedError, match="QuantModule"):
        quant.quant_module.QuantModule().compute(torch.ones(1), torch.ones(1))


@pytest.mark.parametrize("kind", ["linear", "Conv1D", "conv", "depthwise", "conv1d", "conv3d"])
@pytest.mark.parametrize("pair", [("int4", "int8"), ("e2m1", "e4m3"), ("mxfp4", "nvfp4")], ids="-".join)
def test_compiled_layers_give_what_eager_ones_give(kind, pair):
    """Outputs and gradients of tensors are bit-identical; gradients of scales are sums in another order.

    Outputs computed on codes are closer to the exact ones, see tests/quant/quantizers/test_byte_codes.py.
    """
    found = []
    for mode in ("off", "on"):
        torch.manual_seed(0)
        layer, x = LAYERS[kind]()
        if use_compiled("auto" if mode == "on" else "off") != (mode == "on"):
            pytest.skip("no compiler here")
        try:
            module = quantized(layer, *pair, x)
            output = module(x.requires_grad_())
            output.backward(torch.randn(output.shape, generator=generator()))
        finally:
            use_compiled("off")
        scales = [p.grad for name, p in module.named_parameters() if "grids" in name and p.grad is not None]
        found.append(([output, x.grad, module.weight.grad], scales))
    (eager, eager_scales), (compiled, compiled_scales) = found
    if pair == ("int4", "int8"):
        torch.testing.assert_close(compiled.pop(0), eager.pop(0), rtol=1e-6, atol=1e-6)
    assert all(torch.equal(one, other) for one, other in zip(eager, compiled, strict=True))
    assert len(eager_scales) == (2 if pair[0] != "mxfp4" else 0)
    torch.testing.assert_close(compiled_scales, eager_scales, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["linear", "Conv1D", "conv", "depthwise", "conv1d", "conv3d"])
@pytest.mark.parametrize("name", ["int4", "e2m1"])
def test_the_scale_of_an_input_that_needs_no_gradient_gets_the_same_one(kind, name):
    layer, x = LAYERS[kind]()
    module = quantized(layer, name, name, x)
    grid = module.input_quantizer.grids[name]
    grid.scale.data.mul_(0.5)  # so that a good part is clipped
    found = []
    for needs_gradient in (True, False):
        grid.scale.grad = module.weight.grad = None
        module(x.requires_grad_(needs_gradient)).pow(3).sum().backward()
        found.append((grid.scale.grad, module.weight.grad))
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-4)
    assert found[0][0].abs() > 1e-3
