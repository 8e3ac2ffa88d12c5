"""Experts in one tensor: formats in groups against a plain loop, and experts that no calibration token was sent to."""

import numpy as np
import pytest
import torch
from torch import nn

from quant.analysis.reach import notes_on_reach
from quant.convert import from_float, observe_inputs
from quant.formats import FLOAT, parse_format
from quant.quant_experts import ExpertLinear
from quant.quantizers.quantizer import ACTIVATION, QuantizerConfig

WEIGHT = QuantizerConfig(range="calibrated", granularity="channel", observer="minmax")


def experts(transposed, rows=6, columns=20, count=3):
    """Three experts of different sizes, weight (experts, out, in) or, transposed, (experts, in, out)."""
    torch.manual_seed(0)
    weight = torch.randn(count, rows, columns) * torch.tensor([1.0, 8, 0.1]).view(3, 1, 1)[:count]
    return ExpertLinear(nn.Parameter(weight.transpose(1, 2).contiguous() if transposed else weight), None, transposed)


def rounded_in_groups(matrix, bits, size, zero_point):
    """Round each row of (out, in) in groups of `size`, with scales in float16, one by one."""
    made = np.empty_like(matrix)
    for row in range(matrix.shape[0]):
        for start in range(0, matrix.shape[1], size):
            group = matrix[row, start : start + size].astype(np.float64)
            if zero_point:
                low, high = min(group.min(), 0), max(group.max(), 0)
                scale = (high - low) / (2**bits - 1)
                zero, codes = np.round(-low / scale), (0, 2**bits - 1)
            else:
                scale, zero, codes = np.abs(group).max() / (2 ** (bits - 1) - 1), 0, (1 - 2 ** (bits - 1),) * 2
                codes = (codes[0], -codes[0])
            held = float(np.float16(scale))
            made[row, start : start + size] = (np.clip(np.round(group / held) + zero, *codes) - zero) * held
    return made


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("name, groups", [("int4g8", 3), ("int3g32", 1), ("uint4g8", 3)])
def test_each_expert_has_its_own_groups_along_its_inputs(name, groups, transposed):
    format, layer = parse_format(name), from_float(experts(transposed), WEIGHT, ACTIVATION)
    layer.weight_quantizer.prepare(format)
    layer.weight_quantizer.observe(layer.weight)
    layer.weight_quantizer.finish_calibration()
    layer.set_formats(format, FLOAT)
    scale = layer.weight_quantizer.grids[name].scale
    assert tuple(scale.shape) == ((3, groups, 6) if transposed else (3, 6, groups))
    made, weight = layer.weight_quantizer(layer.weight).detach(), layer.weight.detach()
    for number in range(3):
        matrix, own = (w[number].T if transposed else w[number] for w in (weight, made))
        expected = rounded_in_groups(matrix.numpy(), format.element.width, format.size, format.zero_point)
        torch.testing.assert_close(own, torch.from_numpy(expected).float(), rtol=1e-5, atol=1e-6)
    x, sent = torch.randn(7, 20), torch.tensor([0, 2, 1, 1, 0, 2, 2])
    rows = [row @ (made[e] if transposed else made[e].T) for row, e in zip(x, sent, strict=True)]
    torch.testing.assert_close(layer(x, sent).detach(), torch.stack(rows))


class Mixture(nn.Module):
    def __init__(self):
        super().__init__()
        self.experts = from_float(experts(False), WEIGHT, ACTIVATION)

    def forward(self, x, sent):
        return self.experts(x, sent)


def test_experts_without_calibration_tokens_are_told():
    model = Mixture()
    modules = {"experts": model.experts}

    def notes(*batches):
        observe_inputs(model, modules, [(torch.randn(len(sent), 20), torch.tensor(sent)) for sent in batches])
        return notes_on_reach(modules)

    assert notes([0, 1], [2, 2]) == []
    (note,) = notes([1, 1, 1], [1, 0])
    assert note == (
        "1 layers have experts that no calibration token was sent to, at most 1 of 3 (experts): "
        "the ranges of their weights are chosen without data"
    )
    assert model.experts.idle == {2}
    assert notes([0, 1, 2]) == []
