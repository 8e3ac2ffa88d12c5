"""benchmarks.peer_accuracy and .noise: peers have the bits that they are charged for; tables say what records hold."""

import json

import pytest
import torch
from torch import nn

from benchmarks.noise import line
from benchmarks.peer_accuracy import table
from benchmarks.peer_models import PEERS, Start
from benchmarks.quality import rows
from eval.modeling.vision_nets import image_output

SIZE = 6


class Net(nn.Module):
    """A signed input, one after a ReLU, and a mean before the last layer."""

    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 4, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(4)
        self.conv2 = nn.Conv2d(4, 6, 3, padding=1, bias=False)
        self.linear = nn.Linear(6, 5)

    def forward(self, pixel_values, labels=None):
        x = self.conv2(torch.relu(self.bn1(self.conv1(pixel_values))))
        return image_output(self.linear(torch.relu(x).mean((2, 3))), labels)


MACS = {"conv1": 3 * 4 * 9 * SIZE**2, "conv2": 4 * 6 * 9 * SIZE**2, "linear": 30}


def cost(bits):
    return sum(MACS[name] * weight * activation for name, (weight, activation) in bits.items())


def start(bits, choices=(2, 3, 8), budget=None):
    torch.manual_seed(0)
    batches = [{"pixel_values": torch.randn(8, 3, SIZE, SIZE), "labels": torch.randint(5, (8,))} for _ in range(2)]
    budget = cost(dict.fromkeys(MACS, (bits, bits))) if budget is None else budget
    return Start(Net(), batches, list(MACS), bits, choices, cost, budget)


def run(peer, given):
    package = PEERS[peer].package
    pytest.importorskip({"nvidia-modelopt": "modelopt"}.get(package, package), reason=f"needs {package}")
    return PEERS[peer].quantize(given)


def levels(model, layer, batch):
    """Most values that a channel of the weight has, and that the input has, where the layer multiplies them."""
    seen = []

    def note(module, inputs, kwargs):
        weight = module.weight_quantizer(module.weight) if hasattr(module, "weight_quantizer") else None
        inside = module.input_quantizer if weight is not None else module.input_quant
        weight = module.quant_weight().value if weight is None else weight
        x = inside(inputs[0])
        seen.append((weight, getattr(x, "value", x)))

    handle = model.get_submodule(layer).register_forward_pre_hook(note, with_kwargs=True)
    with torch.no_grad():
        model.eval()(**batch)
    handle.remove()
    weight, x = seen[0]
    return max(len(torch.unique(channel)) for channel in weight.flatten(1)), len(torch.unique(x))


@pytest.mark.parametrize("peer", [name for name in PEERS if name.startswith(("Brevitas", "Model Optimizer"))])
def test_layers_have_the_bits_that_are_charged_and_train(peer):
    given = start(3)
    model, bits = run(peer, given)
    assert list(bits) == list(MACS)
    for layer, (weight, activation) in bits.items():
        found = levels(model, layer, given.batches[0])
        assert found[0] <= 2**weight, layer
        assert 2 < found[1] <= 2**activation or activation == 2, layer
    model.train()(**given.batches[0]).loss.backward()
    assert all(model.get_submodule(layer).weight.grad.abs().sum() > 0 for layer in MACS)


def test_uniform_peers_are_uniform_but_for_the_ends():
    assert set(run("Brevitas, uniform", start(3))[1].values()) == {(3, 3)}
    ends = run("Brevitas, ends in 8 bits", start(3))[1]
    assert ends == {"conv1": (8, 8), "conv2": (3, 3), "linear": (8, 8)}


def test_auto_quantize_uses_the_budget_and_stays_within():
    given = start(3, budget=cost({"conv1": (3, 3), "conv2": (3, 3), "linear": (8, 8)}))
    bits = run("Model Optimizer, auto_quantize", given)[1]
    assert 0.8 * given.budget < cost(bits) <= given.budget
    assert all(weight == activation and weight in given.choices for weight, activation in bits.values())


def test_nncf_quantizes_the_layers_and_nothing_else():
    _, bits = run("NNCF, uniform", start(4))
    assert bits == dict.fromkeys(MACS, (4, 4))


def test_inputs_after_a_relu_are_unsigned():
    assert start(3).unsigned() == {"conv2", "linear"}


def record(accuracy, cost, memory, **more):
    return {
        "metric": "accuracy",
        "metrics": {"validation": {"accuracy": accuracy, "loss": 1.0, "n": 4}},
        "cost": cost,
        "cost_unit": "GBOPs",
        "costs": {"memory": memory, "total": 2 * memory},
        "layers": [{"params": 2**20}, {"params": 2**20}],
        **more,
    }


def folder_with(tmp_path, name, predicted):
    folder = tmp_path / name
    folder.mkdir()
    answers = {"validation": {"predicted": predicted, "label": [0, 1, 2, 3], "classes": list("abcd")}}
    (folder / "predictions.json").write_text(json.dumps(answers))
    return folder


def test_the_table_has_exact_bits_and_paired_differences(tmp_path):
    found = {
        "search": [(record(1.0, 0.5, 1.0), folder_with(tmp_path, "ours", [0, 1, 2, 3]))],
        "Peer": [(record(0.75, 0.4, 0.5, package="peer 1.0"), folder_with(tmp_path, "theirs", [0, 1, 2, 0]))],
    }
    lines = table("resnet20-3", rows()["resnet20-3"], found, [0])
    assert lines[1].startswith("| method | cost [GBOPs] |")
    peer, search = (row.split(" | ") for row in lines[3:])
    assert peer[:6] == ["| Peer (peer 1.0)", "0.4", "2.00", "1.0000", "75.00", "75.00"]
    assert peer[6].startswith("+25.00 [-24.00, +74.00]")
    assert search[:6] == ["| search", "0.5", "4.00", "2.0000", "100.00", "100.00"]


def test_noise_is_the_standard_deviation_of_the_seeds():
    told = line("row", [record(accuracy, 0.5, 1.0) for accuracy in (0.88, 0.90, 0.92)]).split(" | ")
    assert told[2:6] == ["88.00 / 90.00 / 92.00", "90.00", "2.00", "88.00 to 92.00"]
    assert told[6] == "3.20"
    assert told[7] == "15.00 |"
