"""What a search adds to a training step: no wait for the device, no new graphs, nothing written at every step."""

from collections import Counter

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from quant.convert import calibrate, quantize_model, set_formats
from quant.formats import parse_format, parse_search_space
from quant.quant_utils import use_compiled
from quant.quantizers.quantizer import QuantizerConfig
from tests.trainer.test_reinforce_trainer import Data, Net, make
from trainer.reinforce_trainer import ReinforceConfig
from trainer.training.step_logger import FLUSH_STEPS

WAITS = {"aten::_local_scalar_dense", "aten::is_nonzero", "aten::nonzero", "aten::equal", "aten::item"}
"""operations that read a value from the device"""


class Watch(TorchDispatchMode):
    """Counts the operations that would make a GPU and the process wait for each other."""

    def __init__(self):
        super().__init__()
        self.waits = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.name().partition(".")[0]
        if name in WAITS and not (args and args[0].dtype == torch.float64):  # the policy, which lives on the CPU
            self.waits[name] += 1
        return function(*args, **(kwargs or {}))


def batch():
    data = Data(8)
    return {"pixel_values": data.images, "labels": data.labels}


@pytest.mark.parametrize("compiled", ["off", "on"])
@pytest.mark.parametrize("names", ["2,4,8", "int4,e2m1,mxfp4", "e4m3,nvfp4"])
def test_no_part_of_a_training_step_reads_from_the_device(names, compiled):
    formats = parse_search_space(names)
    model = Net()
    layers = quantize_model(model, formats=formats)
    calibrate(model, layers, [batch()])
    use_compiled("auto" if compiled == "on" else "off")

    def steps():
        for format in formats:
            set_formats(layers, dict.fromkeys(layers, (format, format)))
            model(**batch())["loss"].backward()

    try:
        steps()  # kernels on CPUs try a layer's shape when they first meet it
        with Watch() as watch:
            steps()
    finally:
        use_compiled("off")
    assert not watch.waits


def test_the_watch_sees_what_reads():
    with Watch() as watch:
        torch.ones(1).item()
        assert torch.ones(1)
    assert sum(watch.waits.values()) >= 2


def test_the_trainers_step_waits_for_the_device_no_more_often_than_the_float_one(tmp_path):
    """Steps of the delay, between two writes of the history: there is no reward yet."""
    found = []
    for searching in (True, False):
        config = ReinforceConfig(target_bits=4.5, calibration_batches=2, sensitivity_examples=8, delay_steps=20)
        folder = tmp_path / str(searching)
        trainer = make(folder, config=config, max_steps=100, model=Net())
        if not searching:
            trainer.modules = {}
        trainer.create_optimizer_and_scheduler(100)
        if searching:
            trainer.searches.start(trainer.target)
        calibrate(trainer.model, trainer.modules, [batch()]) if searching else None
        with Watch() as watch:
            for step in range(FLUSH_STEPS - 1):
                trainer.state.global_step, trainer.current_gradient_accumulation_steps = step, 1
                trainer.training_step(trainer.model.train(), batch())
        assert not (folder / "history.jsonl").exists(), "written in batches"
        found.append(watch.waits)
    assert found[0] == found[1]


@pytest.mark.parametrize("granularity", ["tensor", "channel"])
def test_fifty_assignments_make_no_new_graphs(granularity):
    formats = parse_search_space("2,4,8,e4m3,e2m1")
    torch._dynamo.reset()
    if not use_compiled("auto", compiler="inductor"):
        pytest.skip("no compiler here")
    model, generator = Net(), torch.Generator().manual_seed(0)
    layers = quantize_model(model, formats=formats, weight=QuantizerConfig(granularity=granularity))
    calibrate(model, layers, [batch()])

    def step():
        drawn = torch.randint(len(formats), (2, len(layers)), generator=generator).tolist()
        set_formats(layers, {n: (formats[w], formats[a]) for n, w, a in zip(layers, *drawn, strict=True)})
        model(**batch())["loss"].backward()

    try:
        for _ in range(6):
            step()
        counters = torch._dynamo.utils.counters
        seen = counters["stats"]["unique_graphs"], sum(counters["frames"].values())
        assert seen[0] > 0
        for _ in range(50):
            step()
        assert (counters["stats"]["unique_graphs"], sum(counters["frames"].values())) == seen
        assert not counters["recompiles"] and not counters["graph_break"]
    finally:
        use_compiled("off")
        torch._dynamo.reset()


@pytest.mark.parametrize(("share", "examples"), [(0.25, 2), (0.3, 3), (1.0, 8)])
def test_draws_are_rewarded_on_a_share_of_a_training_batch(tmp_path, monkeypatch, share, examples):
    config = ReinforceConfig(target_bits=4.5, calibration_batches=2, sensitivity_examples=8, reward_share=share)
    trainer = make(tmp_path, config)
    trainer.prepare()
    seen = []
    monkeypatch.setattr(trainer.evaluator.reader, "read", lambda data, rows: seen.append(len(rows)) or batch())
    trainer.evaluator.rewarded_qualities(torch.zeros(2, trainer.space.num_decisions, dtype=torch.long), step=3)
    assert seen == [examples]


def test_rewards_are_those_of_a_pass_without_inference_mode_and_training_goes_on(tmp_path):
    trainer = make(tmp_path)
    trainer.prepare()
    choices = torch.tensor([[0] * trainer.space.num_decisions, [2] * trainer.space.num_decisions])
    evaluator = trainer.evaluator
    got = evaluator.rewarded_qualities(choices, step=3)
    inference = type(evaluator).rewarded_qualities
    plain = torch.no_grad()(inference.__wrapped__)(evaluator, choices, 3)
    assert got == plain and got[0] != got[1]
    set_formats(trainer.modules, dict.fromkeys(trainer.modules, (parse_format("int4"), parse_format("int4"))))
    trainer.model.train()(**batch())["loss"].backward()
