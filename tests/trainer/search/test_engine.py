"""Searches and allocators for an engine: what its exporter would write never costs more than the budget."""

import pytest
import torch
from torch import nn
from transformers import TrainingArguments

from quant.engines.table import ENGINES
from quant.errors import UserError
from quant.export.compressed_tensors import mismatches
from quant.export.core_aten import core_verdict
from quant.export.gguf_blocks import BITS, tensor_type
from quant.export.onnx.layers import OnnxLayer
from quant.export.torchao import mismatch
from trainer.reinforce_trainer import ReinforceTrainer
from trainer.search.config import ReinforceConfig

MIB_BITS = 8 * 2**20
METHODS = ("search", "measured", "random", "head_tail", "greedy", "uniform", "fisher", "exhaustive")


class Net(nn.Module):
    """A convolution, a depthwise one and two linear layers, of which engines run different ones."""

    def __init__(self):
        super().__init__()
        self.conv, self.deep = nn.Conv2d(1, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.body, self.head = nn.Linear(128, 64), nn.Linear(64, 4)

    def forward(self, x, labels=None):
        x = self.deep(self.conv(x).relu()).relu().flatten(1)
        logits = self.head(self.body(x).relu())
        return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}


def trained(folder, engine, space, **settings):
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(1)
    data = [{"x": torch.randn(1, 4, 4, generator=generator), "labels": n % 4} for n in range(64)]
    steps = 4 if settings.get("method", "search") == "search" else 1
    quiet = {"report_to": "none", "save_strategy": "no", "disable_tqdm": True, "use_cpu": True}
    arguments = TrainingArguments(str(folder), max_steps=steps, per_device_train_batch_size=8, **quiet)
    config = ReinforceConfig(engine=engine, cost_type="memory", **settings)
    trainer = ReinforceTrainer(Net(), arguments, search=config, search_space=space, train_dataset=data)
    trainer.train()
    return trainer


def bits_in_the_file(export, modules):
    """Bits of a weight of each layer, as the exporter of a format says; float's 16 for what it does not keep."""
    if export == "onnx":
        return {name: OnnxLayer.of(name, module).verdict.weight_bits for name, module in modules.items()}
    if export == "gguf":
        return {name: BITS[tensor_type(m.formats[0], m.weight.shape[-1])] for name, m in modules.items()}
    if export in ("torchao", "compressed-tensors"):
        reasons = mismatches(modules) if export != "torchao" else {name: mismatch(m) for name, m in modules.items()}
        return {name: modules[name].formats[0].bits if why is None else 16 for name, why in reasons.items()}
    return {name: core_verdict(module).weight_bits for name, module in modules.items()}


def check(trainer, engine):
    modules, assignment = trainer.modules, trainer.assignment
    bits = bits_in_the_file(ENGINES[engine].export, modules)
    written = sum(profile.params * bits[profile.name] for profile in trainer.searches.profiles) / MIB_BITS
    assert written <= trainer.cost_target * (1 + 1e-9), assignment
    assert written == pytest.approx(trainer.cost)


@pytest.mark.parametrize("engine", ENGINES)
def test_a_search_for_an_engine_ends_within_the_budget_of_its_file(engine, tmp_path):
    space = ENGINES[engine].default_space
    middle = {"int8,float": 12, "int4g128,int8": 6}.get(space, 7)
    trainer = trained(tmp_path, engine, space, target_bits=middle)
    check(trainer, engine)
    assert len({*trainer.assignment.values()} - {("float", "float")}) >= 1


@pytest.mark.parametrize("method", METHODS)
def test_every_method_ends_within_the_budget_of_the_file(method, tmp_path):
    """Over groups, whose scales count, and int3, which is stored as int4."""
    trainer = trained(tmp_path, "onnxruntime", "3,int4g32,8", target_bits=6, method=method)
    check(trainer, "onnxruntime")


def test_without_the_charge_a_budget_would_be_broken(tmp_path, monkeypatch):
    """Groups at the 4 bits of their codes: the file takes 4.5."""
    monkeypatch.setattr(type(ENGINES["onnxruntime"]), "weight_bits", lambda self, weight: int(weight.bits))
    trainer = trained(tmp_path, "onnxruntime", "int4g32,8", target_bits=4.6, method="random")
    with pytest.raises(AssertionError):
        check(trainer, "onnxruntime")


def test_layers_that_an_engine_does_not_run_stay_plain(tmp_path):
    trainer = trained(tmp_path, "vllm", "4,8", target_bits=6, method="random")
    assert set(trainer.modules) == {"body", "head"} and type(trainer.model.conv) is nn.Conv2d
    assert {"/".join(map(str, pair)) for pair in trainer.assignment.values()} <= {"int4/float", "int8/int8"}


def test_an_engine_that_runs_none_of_the_layers_or_leaves_no_choice_is_one_line(tmp_path):
    for engine, space, told in (
        (
            "vllm",
            "mxint8,mxfp6",
            "--engine vllm: runs none of the 4 layers (conv, depthwise, linear) in these formats; ",
        ),
        ("tensorrt", "5,6", "--engine tensorrt: stores each layer in one pair of formats of this search space"),
    ):
        with pytest.raises(UserError) as error:
            trained(tmp_path, engine, space, target_bits=6, method="random")
        assert str(error.value).startswith(told) and "choices: " in str(error.value)
    with pytest.raises(ValueError, match="engine must be one of onnxruntime, openvino"):
        ReinforceConfig(engine="nope", target_bits=4)
