import pytest
import torch
from torch import nn

from quant.convert import calibrate, quantize_model, rounded_weights_cached, set_formats
from quant.formats import FLOAT, parse_format
from quant.quant_module import QuantModule
from quant.quantizers.prefix_cache import prefix_cached

INT2, INT4, INT8 = (parse_format(bits) for bits in (2, 4, 8))


class Twice(nn.Module):
    """Calls one layer at two places, and changes an output in place."""

    def __init__(self):
        super().__init__()
        self.first, self.shared, self.last = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 3)

    def forward(self, x):
        y = self.shared(torch.relu_(self.first(x)))
        return self.last(self.shared(torch.sigmoid(y)) + x)


@pytest.fixture
def quantized():
    torch.manual_seed(0)
    model = Twice().eval()
    layers = quantize_model(model, formats=[INT2, INT4, INT8])
    batch = torch.randn(5, 8)
    calibrate(model, layers, [batch])
    return model, layers, batch


@pytest.fixture
def computed(monkeypatch):
    """Record the layers that ran."""
    calls = []
    original = QuantModule._forward
    monkeypatch.setattr(QuantModule, "_forward", lambda self, x: calls.append(self) or original(self, x))
    return calls


def assignment(first, shared, last):
    return {"first": (first, first), "shared": (shared, shared), "last": (last, last)}


def test_the_same_outputs_in_any_order_of_assignments(quantized):
    model, layers, batch = quantized
    formats = [INT2, INT4, INT8, FLOAT]
    order = torch.randperm(64, generator=torch.Generator().manual_seed(1)).tolist()
    choices = [assignment(formats[i // 16], formats[i // 4 % 4], formats[i % 4]) for i in order]
    with torch.no_grad():
        plain = []
        for choice in choices:
            set_formats(layers, choice)
            plain.append(model(batch))
        with prefix_cached(layers) as cache:
            for choice, wanted in zip(choices, plain, strict=True):
                set_formats(layers, choice)
                cache.restart()
                assert torch.equal(model(batch), wanted)


def test_layers_before_the_first_difference_do_not_run(quantized, computed):
    model, layers, batch = quantized
    first, shared, last = (layers[name] for name in ("first", "shared", "last"))
    ran = []
    with torch.no_grad(), prefix_cached(layers) as cache:
        for choice in [(INT4, INT4, INT4), (INT4, INT4, INT2), (INT4, INT8, INT2), (INT4, INT8, INT2)]:
            set_formats(layers, assignment(*choice))
            cache.restart()
            model(batch)
            ran.append(computed.copy())
            computed.clear()
    # The first layer's output was changed in place, so it is computed every time.
    assert ran == [[first, shared, shared, last], [first, last], [first, shared, shared, last], [first]]


def test_afterwards_and_in_inference_mode_every_layer_runs(quantized, computed):
    model, layers, batch = quantized
    with torch.inference_mode(), prefix_cached(layers) as cache:
        for _ in range(2):
            cache.restart()
            model(batch)
    with rounded_weights_cached(layers):
        model(batch)
    assert len(computed) == 3 * 4
    assert all(layer.prefix_cache is None for layer in layers.values())
