"""Weights and inputs as matrices: their products are the outputs of the layer itself, whatever it is."""

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from quant.convert import quantize_model
from quant.quant_experts import ExpertLinear
from quant.reconstruction.matrices import from_matrices, input_matrices, to_matrices, why_nearest

LAYERS = {
    "linear": (nn.Linear(6, 4, bias=False), (3, 5, 6)),
    "conv1d of transformers": (Conv1D(4, 6), (3, 5, 6)),
    "conv2d": (nn.Conv2d(6, 4, (3, 2), stride=2, padding=(1, 0), dilation=(1, 2), bias=False), (3, 6, 9, 8)),
    "grouped": (nn.Conv2d(6, 4, 3, groups=2, padding="same", bias=False), (3, 6, 5, 5)),
    "depthwise": (nn.Conv2d(6, 12, 3, groups=6, padding=1, padding_mode="reflect", bias=False), (3, 6, 5, 5)),
    "conv1d": (nn.Conv1d(6, 4, 3, groups=2, stride=2, bias=False), (3, 6, 9)),
    "conv3d": (nn.Conv3d(2, 4, 2, padding=1, bias=False), (2, 2, 4, 3, 3)),
    "conv2d of one image": (nn.Conv2d(6, 4, 3, bias=False), (6, 5, 5)),
}


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("at_once", [1, 2**24])
def test_products_of_the_matrices_are_the_outputs(kind, at_once, monkeypatch):
    monkeypatch.setattr("quant.reconstruction.matrices.WINDOW_ELEMENTS", at_once)
    torch.manual_seed(0)
    layer, shape = LAYERS[kind]
    module = quantize_model(nn.Sequential(layer))["0"]
    x = torch.randn(shape)
    parts = list(input_matrices(module, x))
    weight = to_matrices(module, module.weight.detach())
    rows = torch.cat([part for _, part in parts], dim=1)
    outputs = rows @ weight.transpose(1, 2)  # (G, positions, R)
    expected = module(x).detach()
    if "linear" in kind or "transformers" in kind:
        expected = expected.reshape(1, -1, 4)
    else:
        batched = expected if expected.dim() == module.weight.dim() else expected.unsqueeze(0)
        flat = batched.flatten(2).reshape(len(batched), len(weight), weight.shape[1], -1)
        expected = flat.permute(1, 0, 3, 2).reshape(len(weight), -1, weight.shape[1])
    torch.testing.assert_close(outputs, expected)
    assert torch.equal(from_matrices(module, weight), module.weight)


@pytest.mark.parametrize("transposed", [False, True])
def test_each_expert_gets_its_own_rows(transposed):
    torch.manual_seed(0)
    weight = nn.Parameter(torch.randn(3, 6, 4) if transposed else torch.randn(3, 4, 6))
    module = quantize_model(nn.ModuleDict({"experts": ExpertLinear(weight, None, transposed)}))["experts"]
    x, experts = torch.randn(7, 6), torch.tensor([2, 0, 3, 2, 0, 0, 2])  # 3: no expert; expert 1 gets nothing
    expected = module(x, experts).detach()
    matrices = to_matrices(module, module.weight.detach())
    seen = set()
    for part, rows in input_matrices(module, x, experts):
        seen.add(part.start)
        torch.testing.assert_close((rows @ matrices[part].transpose(1, 2))[0], expected[experts == part.start])
    assert seen == {0, 2}
    assert torch.equal(from_matrices(module, matrices), module.weight)


def test_layers_that_cannot_be_reconstructed_are_named():
    class Scaled(nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    model = nn.Sequential(Scaled(4, 4), nn.utils.parametrizations.weight_norm(nn.Linear(4, 4)), nn.Linear(4, 4))
    reasons = [why_nearest(module) for module in quantize_model(model).values()]
    assert reasons[0] == "they compute in a way of their own"
    assert "every use" in reasons[1] and reasons[2] is None
