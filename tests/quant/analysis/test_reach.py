"""Layers that calibration does not reach: the formats they run in, the warnings, and when both change."""

import logging

import pytest
import torch
from torch import nn

from quant.analysis.reach import notes_on_reach, reach_of
from quant.convert import calibrate, get_formats, in_float, quantize_model, set_formats
from quant.formats import FLOAT, parse_format
from quant.quantizers.quantizer import QuantizerConfig

INT4, BF16, MXFP8 = map(parse_format, ("int4", "bf16", "mxfp8"))


class Experts(nn.Module):
    """Rows are routed by their first feature; a function reads one weight, and a list holds another."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.experts = nn.ModuleList(nn.Linear(6, 6) for _ in range(3))
        self.read, self.listed, self.shaped = (nn.Linear(6, 6) for _ in range(3))
        self.plain = [self.listed]
        self.table = nn.Embedding(6, 6)
        self.head = nn.Linear(6, 6)
        self.head.weight = self.table.weight

    def forward(self, x):
        route, out = x[:, 0].long().clamp(0, 2), x.to(self.shaped.weight.dtype).clone()
        for place, expert in enumerate(self.experts):
            out[route == place] = expert(x[route == place])  # of no rows, where none is routed there
        out = nn.functional.linear(out, self.read.weight) + self.table(route)
        return self.plain[0](out)


def rows(*routes):
    x = torch.randn(24, 6, generator=torch.Generator().manual_seed(len(routes)))
    x[:, 0] = torch.tensor(routes).repeat(24)[:24]
    return x


def quantized(seen=(0, 1), format=INT4, **configs):
    model = Experts().eval()
    modules = quantize_model(model, formats=[format], **configs)
    set_formats(modules, dict.fromkeys(modules, (format, format)))
    with in_float(modules):
        calibrate(model, modules, [rows(*seen)])
    return model, modules


def test_what_was_not_reached_runs_in_float_as_far_as_it_has_to(caplog):
    _, modules = quantized()
    whole, weight, nothing = (INT4, INT4), (INT4, FLOAT), (FLOAT, FLOAT)
    wanted = {"experts.0": whole, "experts.1": whole, "experts.2": weight, "shaped": weight}
    wanted |= {"read": nothing, "listed": nothing, "head": nothing}
    assert get_formats(modules) == wanted
    set_formats(modules, dict.fromkeys(modules, whole))
    assert get_formats(modules) == wanted, "whatever is asked for"
    assert reach_of(modules) == {
        "experts.2": "uncalled", "read": "read", "listed": "read", "shaped": "uncalled", "head": "read"
    }  # fmt: skip
    uncalled, read = notes_on_reach(modules)
    assert (
        uncalled == "2 of 7 layers were never called while calibrating, their inputs stay in float: experts.2, shaped"
    )
    assert read.startswith("3 of 7 layers are never called, what reads their weights past them reads these in float: ")
    assert [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING][-2:] == [
        uncalled, read
    ]  # fmt: skip


def test_an_expert_that_only_later_rows_reach_rounds_its_weight_alone():
    model, modules = quantized()
    expert, x = modules["experts.2"], rows(2)
    with torch.no_grad():
        expected = nn.functional.linear(x, expert.weight_quantizer(expert.weight), expert.bias)
        assert torch.equal(expert(x), expected)
        model(rows(0, 1, 2))
    assert not torch.equal(expert.weight_quantizer(expert.weight), expert.weight)


def test_results_do_not_depend_on_what_a_batch_holds_besides():
    model, _ = quantized()
    x = rows(0, 1, 2)
    with torch.no_grad():
        assert torch.allclose(model(x)[:3], torch.cat([model(x[i : i + 1]) for i in range(3)]), atol=1e-6)


@pytest.mark.parametrize("learned", [True, False])
def test_a_later_calibration_that_reaches_a_layer_gives_it_a_range(learned):
    model, modules = quantized()
    calibrate(model, modules, [rows(0, 1, 2)], learned=learned)
    set_formats(modules, dict.fromkeys(modules, (INT4, INT4)))
    assert modules["experts.2"].formats == (INT4, INT4) and "experts.2" not in reach_of(modules)
    model(rows(2))
    calibrate(model, modules, [rows(0, 1)], learned=False)  # and it keeps that
    assert modules["experts.2"].formats == (INT4, INT4)
    model(rows(2))


def test_inputs_that_need_no_range_are_rounded():
    for format in (BF16, MXFP8):
        assert quantized(format=format)[1]["experts.2"].formats == (format, format)
    dynamic = QuantizerConfig(range="dynamic", granularity="token", observer="minmax")
    modules = quantized(activation=dynamic)[1]
    assert modules["experts.2"].formats == (INT4, INT4) and modules["read"].formats == (FLOAT, FLOAT)


def test_a_model_that_was_never_calibrated_is_still_refused():
    model = Experts().eval()
    modules = quantize_model(model, formats=[INT4])
    set_formats(modules, dict.fromkeys(modules, (INT4, INT4)))
    with pytest.raises(RuntimeError, match="never calibrated"):
        model(rows(0))
