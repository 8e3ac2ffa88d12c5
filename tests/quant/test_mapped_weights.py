"""Weights in mapped files: the same values and results, no names left behind, ties kept."""

import errno
import os

import pytest
import torch
from torch import nn

from quant.convert import calibrate, quantize_model, rounded_weights_cached, set_formats
from quant.formats import FLOAT, parse_format
from quant.mapped_weights import clone, is_mapped, map_weights, mapped_copy
from quant.quantizers.quantizer import QuantizerConfig
from quant.reconstruction.rounding import round_weights


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(11, 8)
        self.layer = nn.Linear(8, 8)
        self.head = nn.Linear(8, 11, bias=False)
        self.head.weight = self.table.weight

    def forward(self, x):
        return self.head(self.layer(self.table(x)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64])
def test_a_copy_is_equal_and_its_file_has_no_name(tmp_path, dtype):
    tensor = torch.arange(12).to(dtype).view(3, 4).t()
    copy = mapped_copy(tensor, tmp_path)
    assert is_mapped(copy) and is_mapped(copy[1:]) and not is_mapped(tensor) and not is_mapped(copy.clone())
    assert torch.equal(copy, tensor) and copy.is_contiguous() and copy.dtype == dtype
    assert not list(tmp_path.iterdir())
    copy[0, 0] = 7
    assert copy[0, 0] == 7
    assert is_mapped(clone(copy)) and torch.equal(clone(copy), copy) and not list(tmp_path.iterdir())
    assert not is_mapped(clone(tensor)) and clone(tensor).data_ptr() != tensor.data_ptr()


def test_a_model_keeps_its_outputs_and_its_ties_in_float32(tmp_path):
    torch.manual_seed(0)
    model, x = Tied().bfloat16(), torch.randint(11, (2, 5))
    want = Tied()
    want.load_state_dict({name: value.float() for name, value in model.state_dict().items()})
    map_weights(model, tmp_path)
    assert all(is_mapped(p) and p.dtype == torch.float32 for p in model.parameters())
    assert model.head.weight is model.table.weight
    assert torch.equal(model(x), want(x))


def test_rounded_weights_stay_out_of_memory_and_reconstruction_goes_to_the_files(tmp_path):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 4))
    batches = [torch.randn(32, 16) for _ in range(2)]
    results = []
    for mapped in (False, True):
        own = nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 4))
        own.load_state_dict(model.state_dict())
        if mapped:
            map_weights(own, tmp_path)
        int4 = parse_format("int4")
        modules = quantize_model(own, formats=[int4], weight=QuantizerConfig(range="calibrated", granularity="channel"))
        calibrate(own, modules, batches)
        set_formats(modules, dict.fromkeys(modules, (int4, FLOAT)))
        round_weights(own, modules, batches)
        assert all(is_mapped(module.weight) == mapped for module in modules.values())
        with rounded_weights_cached(modules), torch.no_grad():
            results.append(own(batches[0]))
            assert all((module.rounded_weight_cache is None) == mapped for module in modules.values())
    assert torch.equal(*results)


def test_a_full_disk_is_an_error_before_a_write(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(OSError, match="No space"):
        mapped_copy(torch.ones(3), tmp_path)
    assert not list(tmp_path.iterdir())
