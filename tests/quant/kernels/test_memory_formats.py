"""Memory formats, mixed precision and torch.compile: options that a training script may use with quantized layers."""

import copy

import pytest
import torch
from torch import nn

from quant.convert import calibrate, quantize_model, set_formats
from quant.formats import parse_format, parse_search_space
from quant.quant_utils import use_compiled


def net():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3, groups=4, padding=1), nn.ReLU(),
        nn.Conv2d(8, 4, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3),
    )  # fmt: skip


def images():
    return torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("name", ["int4", "e2m1", "mxfp4"])
def test_channels_last_gives_the_same_outputs_and_gradients(name):
    format = parse_format(name)
    found = []
    for memory_format in (torch.contiguous_format, torch.channels_last):
        model = net().to(memory_format=memory_format)
        layers = quantize_model(model, formats=[format])
        x = images().to(memory_format=memory_format).requires_grad_()
        calibrate(model, layers, [images()])
        set_formats(layers, dict.fromkeys(layers, (format, format)))
        out = model(x)
        out.square().sum().backward()
        found.append([out, x.grad, *(p.grad for p in model.parameters() if p.grad is not None)])
    assert len(found[0]) == len(found[1]) > 8
    for wanted, got in zip(*found, strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["int8", "e4m3"])
def test_bfloat16_autocast_trains_near_float32(name):
    format = parse_format(name)
    model = net()
    layers = quantize_model(model, formats=[format])
    calibrate(model, layers, [images()])
    set_formats(layers, dict.fromkeys(layers, (format, format)))
    twin = copy.deepcopy(model)
    wanted = model(images())
    with torch.autocast("cpu", torch.bfloat16):
        got = twin(images())
    assert got.dtype == torch.bfloat16
    torch.testing.assert_close(got.float(), wanted, rtol=0.1, atol=0.05)
    wanted.square().sum().backward()
    got.float().square().sum().backward()
    for (key, p), q in zip(model.named_parameters(), twin.parameters(), strict=True):
        if p.grad is not None and p.dim() > 1:
            cosine = nn.functional.cosine_similarity(p.grad.flatten(), q.grad.flatten(), dim=0)
            assert cosine > 0.95, key


def test_fifty_assignments_share_the_graphs_of_the_first():
    torch._dynamo.reset()
    formats = parse_search_space("2,4,8,e4m3,e2m1")
    model = net()
    layers = quantize_model(model, formats=formats)
    calibrate(model, layers, [images()])
    generator = torch.Generator().manual_seed(0)

    def step():
        drawn = torch.randint(len(formats), (len(layers),), generator=generator).tolist()
        set_formats(layers, {layer: (formats[i], formats[i]) for layer, i in zip(layers, drawn, strict=True)})
        model(images()).sum().backward()

    use_compiled("on", "cpu", "inductor")
    try:
        for _ in range(6):
            step()
        seen = torch._dynamo.utils.counters["stats"]["unique_graphs"]
        assert seen > 0
        for _ in range(50):
            step()
        assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == seen
    finally:
        use_compiled("off", "cpu")
        torch._dynamo.reset()
