"""Tricks of training: oscillations by hand, schedules, gradients of scales, and the part of the data held out."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from benchmarks import training_tricks as tricks
from quant.convert import calibrate, quantize_model, set_formats
from quant.formats import parse_format
from trainer.training.distillation import Teacher

INT2, INT3, FLOAT = (parse_format(name) for name in ("int2", "int3", "float"))


def quantized(weight):
    model = nn.Sequential(nn.Linear(*reversed(weight.shape), bias=False))
    model[0].weight.data = weight.clone()
    modules = quantize_model(model, formats=[INT3])
    calibrate(model, modules, [torch.ones(4, weight.shape[1])])
    set_formats(modules, {"0": (INT3, FLOAT)})
    return model, modules


def test_a_code_that_goes_back_and_forth_is_frozen_at_its_average():
    state = tricks.Oscillations(torch.tensor([0.0, 0.0, 5.0]))
    for step, rate in enumerate((0.0, 0.01, 0.0199), start=1):  # 0.01, then 0.99 x 0.01 + 0.01
        state.see(torch.tensor([step % 2, step, 5.0]), threshold=0.015)
        assert state.rate[0] == pytest.approx(rate)
    assert state.frozen.tolist() == [True, False, False], "one that moves one way does not oscillate"
    assert state.held[0] == 0 and state.average[0] == pytest.approx(0.01 * 0.99**2 + 0.01)
    state.see(torch.tensor([3.0, 4.0, 5.0]), threshold=0.0)
    assert state.codes.tolist() == [0, 4, 5]


def test_freezing_keeps_the_rounded_weight_whatever_the_optimizer_does():
    _, modules = quantized(torch.tensor([[0.9, -0.2, 0.1, 0.6]]))
    layer, trainer = modules["0"], SimpleNamespace(modules=modules, _fine_tuning=True)
    scale = layer.weight_quantizer.rounding(layer.weight).scale.detach()
    acts = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tricks, "at_each_step", lambda action: acts.append(action) or tricks.nullcontext())
        with tricks.frozen_oscillations(0.005, 0.005):
            for code in (0, 1, 0, 1):  # of the last weight; the others stay
                layer.weight.data[0, 3] = code * scale.item() * 1.1
                acts[0](trainer, 0.5)
    assert layer.weight[0, 3] == 0, "frozen at the second turn, at the average that is nearer to 0"
    assert torch.equal(layer.weight[0, :3], torch.tensor([0.9, -0.2, 0.1]))


def test_thresholds_fall_along_half_a_wave():
    assert [tricks.cosine(0.1, 0.02, done) for done in (0, 0.5, 1)] == pytest.approx([0.1, 0.06, 0.02])


@pytest.mark.parametrize("side", ["weights", "inputs"])
def test_rates_multiply_the_gradients_of_one_side_s_scales_alone(side):
    model, modules = quantized(torch.randn(3, 4, generator=torch.Generator().manual_seed(0)))
    set_formats(modules, {"0": (INT3, INT3)})
    layer = modules["0"]
    of = {"weights": layer.weight_quantizer, "inputs": layer.input_quantizer}

    def gradients():
        model.zero_grad()
        model(torch.linspace(-1, 2, 8).view(2, 4)).square().sum().backward()
        return {name: quantizer.grids["int3"].scale.grad.clone() for name, quantizer in of.items()}

    before = gradients()
    with tricks.scale_rates(**{side: 10.0}):
        within = gradients()
    for name, gradient in before.items():
        assert torch.allclose(within[name], gradient * (10 if name == side else 1)), name
    assert all(torch.equal(own, before[name]) for name, own in gradients().items()), "the trick leaves nothing behind"


def test_constant_schedules_are_the_teacher_as_it_is():
    torch.manual_seed(0)
    teacher, logits = Teacher(nn.Linear(4, 3), 0.9), torch.randn(5, 3)
    batch = {"input": torch.randn(5, 4), "labels": torch.tensor([0, 1, 2, 0, 1])}
    loss = nn.functional.cross_entropy(logits, batch["labels"])
    expected = teacher.loss(loss, logits, batch, None)
    with tricks.taught(lambda done: 0.9):
        assert torch.equal(teacher.loss(loss, logits, batch, None), expected)
    with tricks.taught(lambda done: 0.0):
        assert torch.equal(teacher.loss(loss, logits, batch, None), loss)


def test_dampening_pulls_weights_within_the_grid_towards_their_rounded_values():
    _, modules = quantized(torch.tensor([[1.0, 0.4, -5.0]]))
    layer = modules["0"]
    layer.weight_quantizer.grids["int3"].scale.data.fill_(0.5)
    rounder = layer.weight_quantizer.rounding(layer.weight)
    tricks.distance(layer, rounder).backward()
    assert torch.allclose(layer.weight.grad, torch.tensor([[0.0, 2 * (0.4 - 0.5), 0.0]])), "-5 is beyond the grid"


def test_what_is_held_out_is_not_trained_on(tmp_path):
    pq, pa = pytest.importorskip("pyarrow.parquet"), pytest.importorskip("pyarrow")
    pq.write_table(pa.table({"row": list(range(10))}), tmp_path / "train-00000-of-00001.parquet")
    folder = tricks.held_out_data(tmp_path, tmp_path / "cut", 3)
    train, test = (
        pq.read_table(folder / f"{split}-00000-of-00001.parquet")["row"].to_pylist() for split in ("train", "test")
    )
    assert len(test) == 3 and sorted(train + test) == list(range(10))


@pytest.mark.parametrize("mixed", [False, True])
def test_the_first_steps_train_in_the_widest_formats(mixed):
    _, modules = quantized(torch.randn(3, 4, generator=torch.Generator().manual_seed(0)))
    narrow, wide = (INT3, INT3), (FLOAT, FLOAT)
    decision = SimpleNamespace(layers=("0",), choices=(narrow, wide))
    trainer = SimpleNamespace(
        modules=modules, assignment={"0": narrow}, space=SimpleNamespace(decisions=(decision,)), _fine_tuning=True
    )
    acts = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tricks, "at_each_step", lambda action: acts.append(action) or tricks.nullcontext())
        with tricks.wide_first(0.5, mixed):
            seen = []
            for step in range(40):
                acts[0](trainer, step / 40)
                seen.append(modules["0"].weight_quantizer.format)
    assert set(seen[20:]) == {INT3}
    assert set(seen[:20]) == ({INT3, FLOAT} if mixed else {FLOAT})
