"""Layers that share a weight: one format, one scale, charged once and stored once."""

import copy

import pytest
import torch
from torch import nn
from transformers import TrainingArguments

from cost.cost import MIB_BITS, memory_cost, overhead_memory, unsearched_memory
from cost.profile import profile_model, tied_in
from eval.saved_model import load_model
from policy.space import build_space
from quant.convert import calibrate, get_formats, quantize_model, set_formats
from quant.errors import UserError
from quant.export.packed import packed_sizes, read_packed, restore, write_packed
from quant.formats import FLOAT, parse_format
from trainer.reinforce_trainer import ReinforceConfig, ReinforceTrainer
from trainer.training.checkpoint import load_tensors, save_weights

INT2, INT4, INT8 = map(parse_format, ("int2", "int4", "int8"))


class Shared(nn.Module):
    """Two layers with one weight, and one with its own."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.c = nn.Linear(12, 12), nn.Linear(12, 12), nn.Linear(12, 3)
        self.b.weight = self.a.weight

    def forward(self, x, labels=None):
        logits = self.c(self.b(self.a(x).relu()).relu())
        loss = None if labels is None else nn.functional.cross_entropy(logits, labels)
        return {"loss": loss, "logits": logits}


class Words(nn.Module):
    """A head whose weight is tied to the embedding."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.table, self.body, self.head = nn.Embedding(20, 8), nn.Linear(8, 8), nn.Linear(8, 20, bias=False)
        self.head.weight = self.table.weight

    def forward(self, tokens):
        return self.head(self.body(self.table(tokens)).relu())


def quantized(model, x, formats=(INT2, INT8)):
    modules = quantize_model(model.eval(), formats=formats)
    calibrate(model, modules, [x])
    return modules


def test_one_quantizer_one_scale_and_all_gradients():
    model, x = Shared(), torch.randn(16, 12, generator=torch.Generator().manual_seed(1))
    modules = quantized(model, x)
    assert modules["a"].weight_quantizer is modules["b"].weight_quantizer is not modules["c"].weight_quantizer
    set_formats(modules, dict.fromkeys(modules, (INT8, FLOAT)))
    model(x)["logits"].sum().backward()
    scale = modules["a"].weight_quantizer.grids["int8"].scale
    both = scale.grad.clone()
    parts = []
    for frozen in "ab":
        twin = copy.deepcopy(model)
        assert twin.a.weight_quantizer is twin.b.weight_quantizer and twin.a.weight is twin.b.weight
        twin.zero_grad()
        own, layer = twin.a.weight_quantizer, getattr(twin, frozen)
        layer.weight_quantizer = copy.deepcopy(own).requires_grad_(False)
        layer.weight = nn.Parameter(layer.weight.detach(), requires_grad=False)
        twin(x)["logits"].sum().backward()
        parts.append(own.grids["int8"].scale.grad)
    torch.testing.assert_close(both, sum(parts))


def test_the_last_format_counts_and_says_so_everywhere():
    modules = quantized(Shared(), torch.randn(16, 12))
    set_formats(modules, {"a": (INT2, INT8), "b": (INT8, INT2)})
    assert get_formats(modules)["a"] == (INT8, INT8) and get_formats(modules)["b"] == (INT8, INT2)


def test_a_shared_weight_is_charged_once_and_decided_once():
    model = Shared()
    profiles = profile_model(model, torch.randn(1, 12))
    assert [(p.name, p.params, p.macs, p.tied_to) for p in profiles] == [
        ("a", 144, 144, None), ("b", 0, 144, "a"), ("c", 36, 36, None)
    ]  # fmt: skip
    formats = dict.fromkeys("abc", (INT8, FLOAT))
    assert memory_cost(profiles, formats) == 180 * 8 / MIB_BITS
    assert overhead_memory(profiles, formats) * 2**20 == 4 * (12 + 3), "and so are its scales"
    tied = tied_in(profiles)
    for partition, wanted in (
        ("layer", {"a+1": ("a", "b"), "c": ("c",)}),
        ("single", {"model": ("a", "b", "c")}),
        ({"first": ["a"], "rest": ["b", "c"]}, {"first+1": ("a", "b", "c")}),
    ):
        space = build_space("abc", [INT2, INT8], partition, tied=tied)
        assert {decision.name: decision.layers for decision in space.decisions} == wanted


def test_an_embedding_that_is_also_a_heads_weight_is_charged_beside_it():
    """The head rounds its copy, the embedding is read in float: a file holds both."""
    model = Words()
    profiles = profile_model(model, torch.zeros(1, 4, dtype=torch.long))
    assert {p.name: p.params for p in profiles} == {"body": 64, "head": 160}
    assert unsearched_memory(model, ["body", "head"]) == (160 + 8) * 16 / MIB_BITS
    assert unsearched_memory(Shared(), "abc") == (12 + 12 + 3) * 16 / MIB_BITS
    assert unsearched_memory(Shared(), "ac") == (144 + 12 + 12 + 3) * 16 / MIB_BITS, "b reads it in float"


@pytest.mark.parametrize("kind", [Shared, Words])
def test_a_packed_file_holds_a_shared_weight_once(kind, tmp_path):
    model = kind()
    x = torch.randn(16, 12) if kind is Shared else torch.arange(20).view(2, 10)
    modules = quantized(model, x, [INT4, INT8])
    set_formats(modules, dict.fromkeys(modules, (INT4, INT8)))
    write_packed(tmp_path / "m", model, modules)
    assert packed_sizes(tmp_path / "m")["codes"] == ((144 + 36) if kind is Shared else (64 + 160)) / 2
    fresh = kind().eval()
    again = restore(fresh, *read_packed(tmp_path / "m"))
    assert get_formats(again) == get_formats(modules)
    if kind is Shared:
        assert fresh.a.weight is fresh.b.weight
    else:
        assert torch.equal(fresh.table.weight, model.table.weight)
    with torch.no_grad():
        outputs = [net(x) for net in (model, fresh)]
    torch.testing.assert_close(*outputs, rtol=0, atol=0)


def test_a_state_dict_is_stored_once_and_read_by_every_name(tmp_path):
    for model in (Shared(), Words()):
        state = model.state_dict()
        save_weights(state, tmp_path)
        size = sum(p.numel() * 4 for p in model.parameters())
        assert size <= (tmp_path / "model.safetensors").stat().st_size < size + 1200
        read = load_tensors(tmp_path / "model.safetensors")
        assert read.keys() == state.keys() and all(torch.equal(read[name], state[name]) for name in state)


def rows(count=40):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(count, 12, generator=generator)
    return [{"x": row, "labels": int(row[0] > 0)} for row in x]


def trainer(folder, **settings):
    arguments = TrainingArguments(
        str(folder), max_steps=8, per_device_train_batch_size=8, report_to="none", use_cpu=True, disable_tqdm=True,
        save_strategy="no", logging_strategy="no",
    )  # fmt: skip
    return ReinforceTrainer(Shared(), arguments, train_dataset=rows(), **settings)


def test_a_search_gives_layers_that_share_a_weight_one_format(tmp_path):
    search = ReinforceConfig(target_bits=4.5, cost_type="memory", calibration_batches=2, sensitivity_examples=16)
    searched = trainer(tmp_path, search=search, search_space="2,8", separate_activations=True)
    searched.train()
    assert searched.assignment["a"][0] == searched.assignment["b"][0]
    assert [decision.layers for decision in searched.space.decisions] == [("a", "b"), ("c",)]
    assert searched.cost <= searched.cost_target == (144 + 36) * 4.5 / MIB_BITS
    searched.save_model(str(tmp_path / "saved"))
    again, x = load_model(tmp_path / "saved", Shared()), torch.stack([row["x"] for row in rows()])
    with torch.no_grad():
        assert torch.equal(again(x)["logits"], searched.model.eval()(x)["logits"])


def test_an_assignment_that_divides_a_weight_is_refused(tmp_path):
    model = Shared()
    modules = quantize_model(model, formats=[INT2, INT8])
    with pytest.raises(UserError, match=r"layers b \(int8\) and a \(int2\) share one weight, which has one format"):
        given = {"a": (INT2, INT8), "b": (INT8, INT8), "c": (INT8, INT8)}
        trainer(tmp_path, modules=modules, assignment=given)
