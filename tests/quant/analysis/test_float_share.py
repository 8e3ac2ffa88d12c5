"""The report of matrices that stay in float names each of them once, and nothing else."""

import logging

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations

from quant.analysis.float_share import float_share
from quant.convert import quantize_model
from quant.formats import parse_format


class Products(nn.Module):
    """Weights held as parameters instead of layers: 6 x 8 in a product, 4 x 8 x 8 in an einsum; a head of 3 x 8."""

    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(10, 8)
        self.places = nn.Parameter(torch.randn(1, 5, 8))
        self.into = nn.Parameter(torch.randn(6, 8))
        self.mixed = nn.Parameter(torch.randn(4, 8, 8))
        self.shift = nn.Parameter(torch.randn(8))
        self.head = nn.Linear(8, 3)

    def forward(self, ids):
        x = self.table(ids) + self.places + self.shift
        x = torch.einsum("bti,hio->bto", x, self.mixed)
        return self.head(torch.nn.functional.linear(x, self.into) @ self.into)


def test_every_matrix_outside_the_layers_counts_and_tables_are_told_apart():
    found = float_share(Products(), ["head"])
    assert found.left == {"into (Products)": 48, "mixed (Products)": 256}
    assert found.quantized == 24 and found.embeddings == 80 + 40
    assert found.share == pytest.approx(304 / 328)
    assert str(found) == "93 % of the weights in matrices stay in float: mixed (Products), into (Products)"
    nothing = float_share(nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4)), ["0"])
    assert not nothing.left and nothing.share == 0


def test_tied_matrices_count_once():
    model = nn.ModuleDict({"table": nn.Embedding(6, 4), "head": nn.Linear(4, 6, bias=False), "a": nn.Linear(4, 4)})
    model["head"].weight = model["table"].weight
    model["b"] = nn.Linear(4, 4)
    model["b"].weight = model["a"].weight
    assert float_share(model, ["head"]).embeddings == 0
    assert float_share(model, ["head"]).left == {"a.weight (Linear)": 16}
    assert float_share(model, ["a"]).embeddings == 24 and not float_share(model, ["a"]).left


def test_what_quantizers_learn_is_no_weight_and_what_a_weight_is_computed_from_is_its_layers():
    model = nn.Sequential(parametrizations.weight_norm(nn.Linear(6, 4)), nn.Conv2d(2, 3, 1))
    before = float_share(model, ["0"])
    assert before.left == {"1.weight (Conv2d)": 6}
    quantize_model(model, ["1"], formats=[parse_format("int4")])
    assert float_share(model, ["0", "1"]).left == {}


@pytest.mark.parametrize(
    ("model", "told"),
    [
        (
            nn.Sequential(nn.LSTM(8, 8), nn.Linear(8, 8)),
            "89 % of the weights in matrices stay in float: 0.weight_ih_l0",
        ),
        (nn.Sequential(nn.ConvTranspose2d(4, 4, 2), nn.Conv2d(4, 4, 1)), "0.weight (ConvTranspose2d)"),
        (Products(), "93 % of the weights in matrices stay in float: mixed (Products), into (Products)"),
    ],
    ids=["recurrent", "transposed", "parameters"],
)
def test_quantizing_says_what_stays_in_float(model, told, caplog):
    quantize_model(model)
    assert told in caplog.text


def test_quantizing_says_nothing_where_nothing_or_only_what_was_asked_for_stays(caplog):
    caplog.set_level(logging.WARNING)
    quantize_model(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)))
    quantize_model(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)), exclude=["1"])
    quantize_model(nn.Sequential(nn.Linear(4, 4), nn.ConvTranspose2d(4, 4, 2)), include=["0"])
    assert not caplog.records
