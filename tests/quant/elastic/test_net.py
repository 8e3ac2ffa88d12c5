"""Which channels and blocks can shrink, and the extraction of plain smaller models."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from cost.profile import profile_model
from quant.convert import calibrate, quantize_model, set_formats
from quant.elastic import ElasticNet
from quant.elastic.blocks import find_stages
from quant.elastic.channels import find_channels
from quant.elastic.importance import order_by_importance
from quant.elastic.kernels import grow_kernels
from quant.elastic.saved import described_sizes, shrink
from quant.errors import UserError
from quant.formats import parse_format


class Block(nn.Module):
    """Inverted residual: expansion, depthwise convolution, projection, sum."""

    def __init__(self, channels):
        super().__init__()
        self.expand, self.bn1 = nn.Conv2d(channels, 2 * channels, 1, bias=False), nn.BatchNorm2d(2 * channels)
        self.depthwise = nn.Conv2d(2 * channels, 2 * channels, 5, padding=2, groups=2 * channels, bias=False)
        self.bn2 = nn.BatchNorm2d(2 * channels)
        self.project, self.bn3 = nn.Conv2d(2 * channels, channels, 1, bias=False), nn.BatchNorm2d(channels)

    def forward(self, x):
        y = F.relu6(self.bn1(self.expand(x)))
        y = F.hardswish(self.bn2(self.depthwise(y)))
        return x + self.bn3(self.project(y))


class Net(nn.Module):
    def __init__(self, classes=3):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU())
        self.blocks = nn.Sequential(Block(8), Block(8), Block(8))
        self.head = nn.Linear(8, classes)

    def forward(self, x):
        return self.head(F.adaptive_avg_pool2d(self.blocks(self.stem(x)), 1).flatten(1))


@pytest.fixture
def net():
    torch.manual_seed(0)
    model = Net().eval()
    for norm in (m for m in model.modules() if isinstance(m, nn.BatchNorm2d)):
        for tensor in (norm.weight, norm.bias, norm.running_mean):
            nn.init.normal_(tensor)
        nn.init.uniform_(norm.running_var, 0.5, 2)
    return model


X = torch.randn(4, 3, 10, 10, generator=torch.Generator().manual_seed(1))


def test_sums_and_depthwise_convolutions_join_channels(net):
    found = {channels.writers[0]: channels for channels in find_channels(net, X)}
    assert set(found) == {"stem.0", *(f"blocks.{n}.expand" for n in range(3))}
    stream = found["stem.0"]
    assert set(stream.writers) == {"stem.0", *(f"blocks.{n}.project" for n in range(3))}
    assert set(stream.readers) == {*(f"blocks.{n}.expand" for n in range(3)), "head"}
    assert set(found["blocks.1.expand"].followers) == {"blocks.1.bn1", "blocks.1.depthwise", "blocks.1.bn2"}


def test_channels_that_something_else_reads_stay():
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c, self.d = (nn.Conv2d(3, 3, 1) for _ in range(4))

        def forward(self, x):
            y = self.b(F.pad(self.a(x), (0, 0, 0, 0, 0, 0)))  # padded channels
            return self.d(self.c(y).softmax(1)), y  # all channels of c together; y is a result

    assert find_channels(Odd(), X) == []


def test_blocks_without_a_sum_cannot_be_left_out(net):
    (stage,) = find_stages(net, X)
    assert stage.blocks == ("blocks.0", "blocks.1", "blocks.2") and stage.least == 0
    plain = nn.Sequential(*(nn.Sequential(nn.Conv2d(3, 3, 3, padding=1), nn.ReLU()) for _ in range(3)))
    assert find_stages(plain, X) == []


def test_ordering_by_importance_changes_no_output(net):
    before, channels = net(X), find_channels(net, X)
    order_by_importance(net, channels, X)
    torch.testing.assert_close(net(X), before, rtol=1e-4, atol=1e-4)
    with torch.no_grad():  # the first channel of the stream now reads nothing of the head and the blocks
        for name in channels[0].readers:
            net.get_submodule(name).weight[:, 0] = 0
    after = net(X)
    order_by_importance(net, find_channels(net, X), X)
    assert all(net.get_submodule(name).weight[:, -1].eq(0).all() for name in channels[0].readers)
    torch.testing.assert_close(net(X), after, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("quantized", [False, True], ids=["float", "quantized"])
def test_an_extracted_model_is_plain_and_computes_the_same(net, quantized):
    before = net(X)
    elastic = ElasticNet(net, X, widths=(0.25, 0.5, 1), kernels=(1, 3, 5), depths=(1, 2, 3))
    torch.testing.assert_close(net(X), before, rtol=1e-4, atol=1e-4)
    assert len(elastic.decisions) == 4 + 3 + 1
    modules = quantize_model(net, formats=[parse_format("int4")]) if quantized else {}
    if quantized:
        calibrate(net, modules, [X])
        set_formats(modules, dict.fromkeys(modules, (parse_format("int4"),) * 2))
    generator = torch.Generator().manual_seed(0)
    for _ in range(4):
        choice = [int(torch.randint(len(d.choices), (), generator=generator)) for d in elastic.decisions]
        elastic.set(choice)
        expected = net(X)
        small = copy.deepcopy(elastic)
        plain = small.extract(choice)
        torch.testing.assert_close(plain(X), expected, rtol=0, atol=0)
        assert not [m for m in plain.modules() if "Elastic" in type(m).__name__ or "Skippable" in type(m).__name__]
        if not quantized:
            again = Net().eval()
            shrink(again, described_sizes(plain))
            again.load_state_dict(plain.state_dict())
            torch.testing.assert_close(again(X), expected, rtol=0, atol=0)
            macs = {p.name: p.macs for p in profile_model(plain, X)}
            for name, own in macs.items():
                size = elastic.size_of(name, choice) if name in elastic.parts else None
                assert size is None or own == 100 * elastic.weights_of(name, size) // (100 if name == "head" else 1)
    elastic.set(elastic.largest)
    assert sum(p.numel() for p in net.parameters() if p.dim() > 1) > sum(
        p.numel() for p in plain.parameters() if p.dim() > 1
    )


def test_choices_that_a_model_does_not_have_are_refused(net):
    for wrong, message in [
        ({"widths": (0.5, 1.5)}, "widths are shares"),
        ({"kernels": (3, 4)}, "odd"),
        ({"kernels": (3, 7)}, "kernel 7 is larger than the largest of Net, 5"),
        ({"depths": (1, 4)}, "depth 4 is more than the blocks of any stage of Net, 3"),
        ({"depths": (0,)}, "at least 1"),
        ({}, "leaves no choice of architecture"),
    ]:
        with pytest.raises(UserError, match=message):
            ElasticNet(copy.deepcopy(net), X, **wrong)


def test_code_that_counts_on_a_size_is_told():
    class Fixed(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 3, 1)

        def forward(self, x):
            return self.b(self.a(x).view(-1, 8, 10, 10)).mean((2, 3))

    with pytest.raises(UserError, match="Fixed does not run at its smallest size"):
        ElasticNet(Fixed(), X, widths=(0.5, 1))


def test_larger_depthwise_kernels_keep_the_sizes_of_outputs(net):
    shape = net.blocks(net.stem(X)).shape
    assert grow_kernels(net, 7) == 3 and grow_kernels(net, 7) == 0
    assert net.blocks[0].depthwise.weight.shape == (16, 1, 7, 7)
    assert net.blocks(net.stem(X)).shape == shape
    elastic = ElasticNet(net, X, kernels=(3, 7))
    expected = [elastic.set([0, 1, 0]), net(X)][1]
    plain = elastic.extract([0, 1, 0])
    assert plain.blocks[1].depthwise.kernel_size == (7, 7)
    again = Net().eval()
    shrink(again, described_sizes(plain))  # from the model with kernels of 5
    again.load_state_dict(plain.state_dict())
    torch.testing.assert_close(again(X), expected, rtol=0, atol=0)


def test_layers_of_other_libraries_keep_their_own_forward():
    """As timm's batch norms, which hold the activation, and its convolutions that pad by themselves."""

    class NormAct(nn.BatchNorm2d):
        def forward(self, x):
            args = self.running_mean, self.running_var, self.weight, self.bias, self.training, 0.1, self.eps
            return F.relu(F.batch_norm(x, *args))

    class Same(nn.Conv2d):
        def forward(self, x):
            return F.conv2d(F.pad(x, (0, 1, 0, 1)), self.weight, self.bias, 2, 0, 1, self.groups)

    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 1), NormAct(8), Same(8, 6, 3), nn.ReLU(), nn.Conv2d(6, 2, 1)).eval()
    before = model(X)
    elastic = ElasticNet(model, X, widths=(0.5, 1))
    torch.testing.assert_close(model(X), before)
    modules = quantize_model(model, formats=[parse_format("int8")])
    calibrate(model, modules, [X])
    set_formats(modules, dict.fromkeys(modules, (parse_format("int8"),) * 2))
    elastic.set([0, 0])
    expected = model(X)
    plain = elastic.extract([0, 0])
    torch.testing.assert_close(plain(X), expected, rtol=0, atol=0)
    assert plain[2].weight.shape == (3, 4, 3, 3) and type(plain[1]) is NormAct and isinstance(plain[2], Same)
