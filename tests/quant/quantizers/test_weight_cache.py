import pytest
import torch
from torch import nn

from quant.convert import calibrate, quantize_model, rounded_weights_cached, set_formats
from quant.formats import FLOAT, parse_format
from quant.quantizers.quantizer import Quantizer, QuantizerConfig

INT4, INT8, MX = parse_format("int4"), parse_format("int8"), parse_format("mxfp4")


@pytest.fixture
def model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 8)).eval()


def batch(seed=1):
    return torch.randn(4, 32, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def counted(monkeypatch):
    """Count how often a weight was rounded."""
    calls = []
    original = Quantizer.forward
    monkeypatch.setattr(Quantizer, "forward", lambda self, x: calls.append(self) or original(self, x))
    return calls


@pytest.mark.parametrize("kind", ["dynamic", "calibrated", "learned"])
@pytest.mark.parametrize("format", [INT4, MX], ids=str)
def test_the_same_values_from_one_rounding(model, counted, kind, format):
    layers = quantize_model(model, formats=[format], weight=QuantizerConfig(range=kind, granularity="channel"))
    calibrate(model, layers, [batch()])
    set_formats(layers, dict.fromkeys(layers, (format, FLOAT)))
    with torch.no_grad():
        wanted = [model(batch(seed)) for seed in range(3)]
        counted.clear()
        with rounded_weights_cached(layers):
            got = [model(batch(seed)) for seed in range(3)]
    assert all(torch.equal(a, b) for a, b in zip(wanted, got, strict=True))
    assert len(counted) == len(layers), "once a layer, for three batches"
    assert all(layer.rounded_weight_cache is None for layer in layers.values())


def changes():
    def step(model, layers):
        parameters = [p for p in model.parameters() if p.requires_grad]
        with torch.enable_grad():
            model(batch()).square().sum().backward()
        torch.optim.SGD(parameters, lr=0.1).step()

    def load(model, layers):
        state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        state["0.weight"] += 1.0
        model.load_state_dict(state)

    def scale(model, layers):
        layers["0"].weight_quantizer.grids["int4"].scale.mul_(1.5)

    def reset(model, layers):
        layers["0"].weight_quantizer.grids["int4"].set(torch.full((32, 1), 0.1), None)

    def formats(model, layers):
        set_formats(layers, dict.fromkeys(layers, (INT8, FLOAT)))

    def tensor(model, layers):
        layers["2"].weight = nn.Parameter(torch.ones(8, 32))

    return [step, load, scale, reset, formats, tensor]


@pytest.mark.parametrize("change", changes(), ids=lambda change: change.__name__)
def test_every_change_is_seen(model, change):
    layers = quantize_model(model, formats=[INT4, INT8])
    calibrate(model, layers, [batch()])
    set_formats(layers, dict.fromkeys(layers, (INT4, FLOAT)))
    with torch.no_grad(), rounded_weights_cached(layers):
        before = model(batch())
        change(model, layers)
        kept = model(batch())
    with torch.no_grad():
        assert torch.equal(kept, model(batch()))
    assert not torch.equal(before, kept)


def test_gradients_flow_as_ever(model):
    layers = quantize_model(model, formats=[INT4])
    calibrate(model, layers, [batch()])
    set_formats(layers, dict.fromkeys(layers, (INT4, INT4)))
    model(batch()).sum().backward()
    wanted = [parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None]
    model.zero_grad()
    with rounded_weights_cached(layers):
        model(batch()).sum().backward()
    got = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    assert all(torch.equal(a, b) for a, b in zip(wanted, got, strict=True))
