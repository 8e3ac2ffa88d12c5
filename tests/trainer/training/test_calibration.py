"""Ranges, batch norms and rounded weights of a run, on a model without a Trainer."""

import pytest
import torch
from torch import nn

from quant.convert import calibrate, get_formats, quantize_model
from quant.errors import NotFiniteError
from quant.formats import FLOAT, parse_format
from quant.quantizers.quantizer import QuantizerConfig
from trainer.training.calibration import RunCalibration, WeightRounding
from trainer.training.progress import unheard

INT2, INT8 = parse_format("int2"), parse_format("int8")


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.norm, self.idle = nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Linear(8, 8)

    def forward(self, x):
        return {"logits": self.norm(self.first(x))}


def sample(examples, phase=None):
    x = torch.randn(examples, 4, generator=torch.Generator().manual_seed(1)) + 2
    yield from ({"x": part} for part in x.split(16))


def calibration(rounding=None):
    model = Net()
    modules = quantize_model(model, formats=[INT2, INT8])
    return RunCalibration(model, modules, sample, 32, rounding, unheard)


def test_a_new_norm_is_calibrated_and_an_idle_layer_stays_in_float():
    own = calibration()
    notes = own.find_ranges()
    assert own.reach == {"idle": "uncalled"} and len(notes) == 1 and "idle" in notes[0]
    assert own.model.norm.running_mean.any()
    own.set_formats(dict.fromkeys(own.modules, (INT8, INT8)))
    assert get_formats(own.modules)["first"] == (INT8, INT8) and get_formats(own.modules)["idle"][1] == FLOAT


def test_the_reach_of_an_earlier_process_holds_in_a_new_one():
    own = calibration()
    own.set_reach({"idle": "uncalled"})
    assert own.modules["idle"].reach == own.reach["idle"] == "uncalled"


def test_weights_are_rounded_for_each_budget_from_the_float_ones():
    own = calibration(WeightRounding("gptq", samples=32))
    own.find_ranges()
    before = own.modules["first"].weight.detach().clone()
    own.set_formats({"first": (INT2, INT8)})
    own.round_weights(again=True)
    assert not torch.equal(own.modules["first"].weight, before)
    own.restore_weights()
    assert torch.equal(own.modules["first"].weight, before)


def test_without_rounding_weights_stay_as_they_are():
    own = calibration()
    before = own.modules["first"].weight.detach().clone()
    assert own.round_weights(again=True) == []
    own.restore_weights()
    assert torch.equal(own.modules["first"].weight, before)


def test_spoiled_weights_are_named():
    own = calibration()
    own.find_ranges()
    own.modules["first"].weight.data.fill_(torch.nan)
    with pytest.raises(NotFiniteError, match="layer first: its weight holds NaN"):
        own.set_formats({"first": (INT8, INT8)})


@pytest.mark.parametrize("ranges", ["learned", "calibrated"])
def test_formats_are_calibrated_again_only_where_a_pass_could_set_a_range(ranges):
    model, phases = nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 8)), []
    modules = quantize_model(
        model,
        formats=[INT2, INT8],
        weight=QuantizerConfig(range=ranges, granularity="channel"),
        activation=QuantizerConfig(range=ranges),
    )

    def batches(examples, phase=None):
        phases.append(phase)
        return (batch["x"] for batch in sample(examples))

    own = RunCalibration(model, modules, batches, 32, None, unheard)
    own.find_ranges()
    model[0].weight.data.mul_(2)  # as training does
    own.set_formats(dict.fromkeys(modules, (INT2, INT8)))
    assert ("calibrating the chosen formats" in phases) == (ranges == "calibrated")
    kept = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    calibrate(model, modules, batches(32), learned=False)
    changed = any(not torch.equal(tensor, kept[name]) for name, tensor in model.state_dict().items())
    assert changed == (ranges == "calibrated")
