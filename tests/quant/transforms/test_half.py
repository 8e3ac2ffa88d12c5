"""16 bits for what stays in float: which type, what is touched, what a file may store narrower."""

import torch
from torch import nn

from quant.convert import calibrate, quantize_model, set_formats
from quant.formats import FLOAT, parse_format
from quant.transforms.half import halve_rest, halved, holds_exactly


def test_the_type_is_that_which_changes_values_least():
    assert halved(torch.tensor([1 / 3])).dtype == torch.float16
    assert halved(torch.tensor([1e6])).dtype == torch.bfloat16  # beyond fp16's range
    assert halved(torch.tensor([], dtype=torch.float32)).numel() == 0
    assert holds_exactly(torch.tensor([1.0, 0.5])).dtype == torch.float16
    assert holds_exactly(torch.tensor([1.0, 1 / 3])).dtype == torch.float32
    assert holds_exactly(torch.tensor([3e38]).bfloat16().float()).dtype == torch.bfloat16
    assert holds_exactly(torch.tensor([1, 2])).dtype == torch.int64


def test_weights_in_a_format_and_scales_stay_as_they_are():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Linear(8, 8)).eval()
    model[1].running_var += torch.rand(8)
    int4 = parse_format("int4")
    modules = quantize_model(model, formats=[int4])
    calibrate(model, modules, [torch.randn(16, 8)])
    set_formats(modules, {"0": (int4, int4), "2": (FLOAT, FLOAT)})
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    halve_rest(model, modules)
    changed = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    assert changed == {"0.bias", "1.running_var", "2.weight", "2.bias"}
    for name in changed:
        assert torch.equal(model.state_dict()[name], before[name].half().float())
