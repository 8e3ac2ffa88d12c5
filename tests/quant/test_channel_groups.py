"""Groups of output channels: each is rounded as in its own format alone, the layer and its float outputs stay."""

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from quant import QuantizerConfig, calibrate, quantize_model, set_formats, split_channels
from quant.channel_groups import groups_of, order_channels, split_layers
from quant.convert import describe_quantizers, quantize_as_described
from quant.errors import UserError
from quant.formats import FLOAT, MixedFormat, format_pairs, group_sizes, parse_format

INT8 = parse_format("int8")
WEIGHTS = {"symmetric": {}, "asymmetric": {"symmetric": False}, "dynamic": {"range": "dynamic"}}


class Net(nn.Module):
    """A convolution, a grouped and a depthwise one, a Linear and GPT-2's Conv1D, with odd numbers of channels."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 10, 3, padding=1)
        self.grouped = nn.Conv2d(10, 15, 3, groups=5, bias=False)
        self.depthwise = nn.Conv2d(15, 15, 3, groups=15)
        self.linear = nn.Linear(15 * 2 * 2, 9)
        self.conv1d = Conv1D(7, 9)

    def forward(self, x):
        x = self.depthwise(self.grouped(self.conv(x)).relu())
        return self.conv1d(self.linear(x.flatten(1)).relu())


def divided(mix, config=None, seed=0):
    torch.manual_seed(seed)
    model = Net().eval()
    nn.init.normal_(model.conv1d.weight, std=0.3)
    modules = quantize_model(model, weight=QuantizerConfig(granularity="channel", **(config or {})))
    format = parse_format(mix)
    split_channels(modules, len(format.parts), {n: torch.rand(group.numel()) for n, group in sizes(modules).items()})
    x = torch.randn(4, 3, 6, 6)
    set_formats(modules, dict.fromkeys(modules, (format, INT8)))
    set_formats(modules, dict.fromkeys(modules, (FLOAT, FLOAT)))
    calibrate(model, modules, [x])
    set_formats(modules, dict.fromkeys(modules, (format, INT8)))
    return model, modules, x


def sizes(modules):
    return {name: torch.empty(module.scale_shape()) for name, module in modules.items()}


@pytest.mark.parametrize("mix", ["int8+int4", "int4+int2", "e4m3+int3", "int8+int5+int4+int2", "int4+int4+int4+e2m1"])
@pytest.mark.parametrize("config", WEIGHTS.values(), ids=WEIGHTS)
def test_each_group_is_rounded_and_differentiated_as_in_its_own_format_alone(mix, config):
    _, modules, _ = divided(mix, config)
    for module in modules.values():
        quantizer, axis = module.weight_quantizer, module.channel_dim
        upstream = torch.randn_like(module.weight)

        def rounded(format, quantizer=quantizer, module=module, upstream=upstream):
            quantizer.set_format(format)
            weight = module.weight.detach().requires_grad_()
            made = quantizer(weight)
            made.backward(upstream)
            found = {n: p.grad.clone() for n, p in quantizer.named_parameters() if p.grad is not None}
            quantizer.zero_grad()
            return made.detach(), weight.grad, found

        made, gradient, of_scales = rounded(parse_format(mix))
        for number, channels in enumerate(groups_of(module)):
            part = parse_format(mix).parts[number]
            own, own_gradient, own_scales = rounded(part)
            assert torch.equal(made.index_select(axis, channels), own.index_select(axis, channels))
            assert torch.equal(gradient.index_select(axis, channels), own_gradient.index_select(axis, channels))
            for name, grad in own_scales.items():
                expected = grad.flatten()[channels]
                torch.testing.assert_close(of_scales[name].flatten()[channels], expected, rtol=1e-5, atol=1e-7)


def test_dividing_changes_no_float_output_and_no_name_of_a_tensor():
    torch.manual_seed(0)
    model, x = Net().eval(), torch.randn(2, 3, 6, 6)
    before, names = model(x), set(model.state_dict())
    modules = quantize_model(model)
    assert split_channels(modules, 2) == list(modules) and split_layers(modules) == dict.fromkeys(modules, 2)
    assert torch.equal(model(x), before)
    assert {name for name in model.state_dict() if "_quantizer." not in name} == names


def test_the_most_sensitive_channels_come_first_and_sizes_differ_by_one_at_most():
    modules = quantize_model(nn.Sequential(nn.Linear(4, 10)))
    split_channels(modules, 4, {"0": torch.tensor([5, 1, 9, 2, 8, 3, 7, 4, 6, 0])})
    assert [group.tolist() for group in groups_of(modules["0"])] == [[2, 4, 6], [0, 7, 8], [3, 5], [1, 9]]
    order_channels(modules, {"0": torch.arange(10)})
    assert [group.tolist() for group in groups_of(modules["0"])] == [[7, 8, 9], [4, 5, 6], [2, 3], [0, 1]]
    assert group_sizes(10, 4) == [3, 3, 2, 2]


def test_embeddings_shared_weights_and_layers_of_few_channels_stay_whole():
    model = nn.ModuleDict({"table": nn.Embedding(8, 4), "head": nn.Linear(4, 8), "twin": nn.Linear(4, 8)})
    model.update({"few": nn.Linear(4, 3), "own": nn.Linear(4, 4)})
    model["twin"].weight = model["head"].weight
    modules = quantize_model(model, ["table", "head", "twin", "few", "own"])
    assert split_channels(modules, 4) == ["own"]


def test_a_described_model_gets_its_groups_back():
    model, modules, x = divided("int4+int2")
    again = Net().eval()
    layers = quantize_as_described(again, modules, describe_quantizers(modules))
    again.load_state_dict(model.state_dict())
    set_formats(layers, {name: module.formats for name, module in modules.items()})
    assert torch.equal(again(x), model(x))


def test_names_bits_and_pairs():
    mix = parse_format("INT4+e2m1")
    assert (mix.name, mix.bits, parse_format("4+3").bits_of(5)) == ("int4+e2m1", 4, 3.6)
    int2, int4 = parse_format("2"), parse_format("4")
    mixed = MixedFormat((int4, int2))
    assert format_pairs([int2, int4], groups=2) == ((int2, int2), (int4, int4), (mixed, int4))
    assert (mixed, FLOAT) in format_pairs([int2, int4], weight_only=True, groups=2)
    apart = format_pairs([int2, int4], separate_activations=True, groups=2)
    assert len(apart) == 6 and {(mixed, int2), (mixed, int4)} <= set(apart)
    assert len(format_pairs([parse_format(bits) for bits in (2, 3, 4, 6, 8)], groups=4)) == 70


@pytest.mark.parametrize("name", ["int4+", "int4+mxfp4", "int4+float", "int4+int4", "int4g32+int2", "+"])
def test_what_is_no_mix_is_refused(name):
    with pytest.raises(ValueError, match="unknown format"):
        parse_format(name)


def test_wrong_groups_are_refused():
    modules = quantize_model(nn.Sequential(nn.Linear(4, 8)))
    with pytest.raises(UserError, match="one of 2, 4: 3"):
        split_channels(modules, 3)
    with pytest.raises(UserError, match="for 2 groups of output channels, this weight has 1"):
        modules["0"].set_formats(parse_format("int4+int2"), FLOAT)
    with pytest.raises(UserError, match="none of 1 layers"):
        split_channels(quantize_model(nn.Sequential(nn.Linear(4, 3))), 4)
    whole = quantize_model(nn.Sequential(nn.Linear(4, 8)), weight=QuantizerConfig(granularity="tensor"))
    with pytest.raises(UserError, match="need a scale for each"):
        split_channels(whole, 2)
