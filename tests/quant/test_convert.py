"""quantize_model on any module: which layers are found, what they compute, and that nothing else changes."""

import copy
import io
import pickle
import warnings

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, load_model, save_file, save_model
from torch import nn
from torch.nn.utils import parametrizations
from transformers import GPT2Config, GPT2LMHeadModel

from quant.convert import (
    calibrate,
    describe_quantizers,
    find_layers,
    from_float,
    get_formats,
    in_float,
    quantize_as_described,
    quantize_model,
    run_model,
    set_formats,
)
from quant.errors import NotFiniteError, UserError
from quant.formats import FLOAT, IntFormat, parse_format
from quant.quant_conv2d import QuantConv2d
from quant.quant_linear import QuantConv1D, QuantLinear
from quant.quant_module import QuantModule
from quant.quantizers.observers import OBSERVERS
from quant.quantizers.quantizer import QuantizerConfig
from quant.validation import WEIGHTS_ONLY

FORMATS = [parse_format(name) for name in ("int2", "int4", "e4m3")]
INT2 = (IntFormat(2), IntFormat(2))
DYNAMIC = {"activation": QuantizerConfig(range="dynamic", observer="minmax", symmetric=False)}


def small():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 10)
    )


def images(count=8):
    return torch.randn(count, 3, 6, 6, generator=torch.Generator().manual_seed(1))


def all_in(modules, weight, activation):
    set_formats(modules, dict.fromkeys(modules, (parse_format(weight), parse_format(activation))))


class SamePadding(nn.Conv2d):
    """A Conv2d that pads in a forward of its own, as timm's and EfficientNet's do."""

    def forward(self, input):
        return F.conv2d(F.pad(input, (1, 2, 1, 2)), self.weight, self.bias, self.stride, 0, self.dilation, self.groups)


# ------------------------------------------------------ finding


class Nested(nn.Module):
    def __init__(self):
        super().__init__()
        self.shared = nn.Linear(4, 4)
        self.blocks = nn.ModuleList([nn.ModuleDict({"a": nn.Linear(4, 4), "b": self.shared}) for _ in range(2)])
        self.head = nn.Sequential(nn.ReLU(), nn.Sequential(nn.Linear(4, 2)))
        self.norm = nn.LayerNorm(4)

    def forward(self, x):
        for block in self.blocks:
            x = block["b"](block["a"](x))
        return self.head(self.norm(self.shared(x)))


def test_layers_are_found_once_each_in_module_order_at_any_depth():
    assert list(find_layers(Nested())) == ["shared", "blocks.0.a", "blocks.1.a", "head.1.0"]


@pytest.mark.parametrize(
    ("include", "exclude", "names"),
    [
        (["blocks.*"], None, ["blocks.0.a", "blocks.1.a"]),
        (None, ["head*", "*.1.a"], ["shared", "blocks.0.a"]),
        (["*.a", "shared"], ["shared"], ["blocks.0.a", "blocks.1.a"]),
        (["blocks.[0]*"], None, ["blocks.0.a"]),
    ],
)
def test_include_and_exclude_are_globs_and_exclude_wins(include, exclude, names):
    assert list(find_layers(Nested(), include, exclude)) == names
    model = Nested()
    assert list(quantize_model(model, include, exclude)) == names
    assert [name for name, module in model.named_modules() if isinstance(module, QuantModule)] == names


@pytest.mark.parametrize("arguments", [{"include": ["layer.*"]}, {"exclude": ["shared", "classifier"]}])
def test_a_pattern_that_matches_nothing_is_an_error_that_shows_names(arguments):
    with pytest.raises(UserError, match=r"(layer\.\*|classifier).*shared"):
        find_layers(Nested(), **arguments)


@pytest.mark.parametrize(
    ("model", "arguments"),
    [
        (nn.Sequential(nn.ReLU(), nn.Embedding(3, 4)), {}),
        (nn.Sequential(nn.ReLU()), {"include": ["*"]}),
        (nn.Sequential(nn.Linear(2, 2)), {"exclude": ["*"]}),
    ],
)
def test_a_model_without_layers_is_refused(model, arguments):
    with pytest.raises(UserError, match="no layer"):
        quantize_model(model, **arguments)


def test_a_bare_layer_and_a_lazy_layer_are_refused():
    with pytest.raises(UserError, match="Sequential"):
        quantize_model(nn.Linear(2, 2))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(UserError, match="lazy"):
            quantize_model(nn.Sequential(nn.LazyLinear(2)))


# ------------------------------------------------------ replacing


def test_a_shared_layer_stays_one_layer_and_computes_rounded_at_every_use():
    model = Nested()
    modules = quantize_model(model)
    assert model.shared is model.blocks[0]["b"] is model.blocks[1]["b"] is modules["shared"]
    calls = []
    modules["shared"].register_forward_hook(lambda *_: calls.append(1))
    model(torch.randn(3, 4))
    assert len(calls) == 3


@pytest.mark.parametrize("make", [small, Nested], ids=lambda make: make.__name__)
def test_until_formats_are_set_the_model_is_unchanged(make):
    model = make()
    x = images() if make is small else torch.randn(3, 4)
    before, parameters = model(x), list(model.parameters())
    modules = quantize_model(model)
    assert torch.equal(model(x), before)
    assert [id(p) for p in model.parameters()] == [id(p) for p in parameters]
    assert all(formats == (FLOAT, FLOAT) for formats in get_formats(modules).values())
    assert isinstance(modules["0" if make is small else "shared"], nn.Conv2d if make is small else nn.Linear)


def test_layers_of_known_types_become_their_quantized_types():
    modules = quantize_model(small())
    assert [type(module) for module in modules.values()] == [QuantConv2d, QuantLinear]


def test_hooks_training_mode_and_frozen_parameters_are_kept():
    model = small()
    seen = []
    model[0].register_forward_hook(lambda *_: seen.append("forward"))
    model[0].eval()
    model[4].weight.requires_grad_(False)
    modules = quantize_model(model)
    model(images())
    assert seen == ["forward"] and not modules["0"].training and not modules["0"].input_quantizer.training
    assert modules["4"].training and not modules["4"].weight.requires_grad


def test_quantizing_twice_keeps_the_layers():
    model = small()
    assert quantize_model(model) == quantize_model(model)


@pytest.mark.parametrize("padding_mode", ["zeros", "reflect", "replicate", "circular"])
@pytest.mark.parametrize("groups", [1, 2, 4])
def test_every_convolution_computes_on_rounded_tensors(padding_mode, groups):
    torch.manual_seed(0)
    conv = nn.Conv2d(4, 8, 3, stride=2, padding=2, dilation=2, groups=groups, padding_mode=padding_mode)
    twin, x = copy.deepcopy(conv), torch.randn(2, 4, 9, 9)
    modules = quantize_model(model := nn.Sequential(conv), **DYNAMIC)
    all_in(modules, "int4", "int4")
    twin.weight.data = modules["0"].weight_quantizer(conv.weight.data).detach()
    assert torch.equal(model(x), twin(modules["0"].input_quantizer(x)))
    assert not torch.equal(model(x), conv(x))


# ------------------------------------------------------ subclasses


def test_a_subclass_with_its_own_forward_keeps_it_on_rounded_tensors():
    torch.manual_seed(0)
    twin = SamePadding(3, 8, 4, stride=2)
    x, conv = images(), copy.deepcopy(twin)
    modules = quantize_model(model := nn.Sequential(conv), **DYNAMIC)
    assert isinstance(model[0], SamePadding) and isinstance(model[0], QuantConv2d)
    assert torch.equal(model(x), twin(x))
    all_in(modules, "int2", "int4")
    twin.weight.data = model[0].weight_quantizer(conv.weight.data).detach()
    assert torch.equal(model(x), twin(model[0].input_quantizer(x)))
    model(x).sum().backward()
    assert model[0].weight.grad is not None and model[0].weight is conv.weight


@pytest.mark.parametrize("layer_class", [nn.Conv2d, SamePadding])
@pytest.mark.parametrize("norm", [parametrizations.weight_norm, nn.utils.weight_norm], ids=["parametrized", "by hook"])
def test_a_normalised_weight_is_rounded_and_its_parameters_train(layer_class, norm):
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        conv = norm(layer_class(3, 8, 4))
    x, float_output = images(), conv(images())
    plain = layer_class(3, 8, 4)
    plain.bias.data = conv.bias.data
    modules = quantize_model(model := nn.Sequential(conv), **DYNAMIC)
    assert torch.equal(model(x), float_output)
    calibrate(model, modules, [x])
    all_in(modules, "int2", "int4")
    output = model(x)
    plain.weight.data = model[0].weight_quantizer(model[0].weight).detach()
    assert torch.equal(output, plain(model[0].input_quantizer(x)))
    assert len(plain.weight[0].unique()) <= 3
    output.sum().backward()
    trained = [name for name, parameter in model.named_parameters() if parameter.grad is not None]
    assert sum("weight" in name for name in trained) >= 2  # magnitude and direction, and the learned scale
    assert torch.isfinite(model[0].weight).all()


def test_a_quantized_layer_may_be_parametrized_later():
    model = nn.Sequential(nn.Linear(6, 4))
    modules = quantize_model(model, **DYNAMIC)
    all_in(modules, "int2", "int8")
    parametrizations.weight_norm(model[0])
    model(torch.randn(3, 6)).sum().backward()
    assert model[0].parametrizations.weight.original0.grad is not None


# ------------------------------------------------------ attention


@pytest.fixture
def fast_path():
    """PyTorch's default: attention may bypass its submodules in eval mode."""
    torch.backends.mha.set_fastpath_enabled(True)


@pytest.mark.parametrize("masked", [True, False])
def test_transformer_encoder_layers_do_not_bypass_quantization_in_evaluation(masked, fast_path):
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, dropout=0)
    model = nn.TransformerEncoder(layer, 2).eval()
    x = torch.randn(3, 5, 8)
    mask = torch.zeros(3, 5, dtype=torch.bool)
    mask[:, 4:] = True
    modules = quantize_model(model, **DYNAMIC)
    attention = [f"self_attn.{name}" for name in ("out_proj", "q_proj", "k_proj", "v_proj")]
    assert list(modules) == [f"layers.{i}.{name}" for i in (0, 1) for name in (*attention, "linear1", "linear2")]
    with torch.no_grad():
        before = model(x, src_key_padding_mask=mask if masked else None)
        all_in(modules, "int2", "int2")
        # No hooks to count calls: hooks disable the fast path.
        assert not torch.allclose(before, model(x, src_key_padding_mask=mask if masked else None), atol=1e-2)


def test_gpt2_stores_weights_transposed_and_ties_them():
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=40, n_positions=16, n_embd=8, n_layer=1, n_head=2)
    model = GPT2LMHeadModel(config).eval()
    ids = torch.arange(12).view(2, 6)
    before = model(input_ids=ids).logits
    modules = quantize_model(model, formats=FORMATS)
    assert list(modules) == [
        *(f"transformer.h.0.{name}" for name in ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")),
        "lm_head",
    ]
    assert torch.equal(model(input_ids=ids).logits, before)
    attention = modules["transformer.h.0.attn.c_attn"]
    assert isinstance(attention, QuantConv1D) and attention.weight_quantizer.shape == (1, 24)
    assert model.lm_head.weight is model.transformer.wte.weight
    calibrate(model, modules, [{"input_ids": ids}])
    all_in(modules, "int2", "e4m3")
    model(input_ids=ids, labels=ids).loss.backward()
    assert model.transformer.wte.weight.grad.isfinite().all()
    rounded = attention.weight_quantizer(attention.weight)
    assert all(len(column.unique()) <= 3 for column in rounded.unbind(1))


# ------------------------------------------------------ calibration


def test_calibration_restores_every_mode_and_sees_every_batch():
    model = small()
    model[1].eval()
    modules = quantize_model(model, formats=FORMATS, activation=QuantizerConfig(observer="minmax", symmetric=False))
    statistics = model[1].running_mean.clone()
    calibrate(model, modules, iter([images(), 3 * images()]))
    assert model.training and not model[1].training and model[0].training
    assert torch.equal(model[1].running_mean, statistics)
    seen = 3 * images()
    grid = modules["0"].input_quantizer.grids["int4"]
    assert torch.allclose(grid.scale, (seen.max() - seen.min()) / 15)
    assert all(quantizer.observation is None for module in modules.values() for quantizer in module.children())
    assert all(grid.is_ready for module in modules.values() for q in module.children() for grid in q.grids.values())


def test_calibration_may_start_under_formats_that_were_never_calibrated():
    model, twin = small(), small()
    modules, others = quantize_model(model, formats=FORMATS), quantize_model(twin, formats=FORMATS)
    all_in(modules, "int4", "int4")
    calibrate(model, modules, [images()])
    calibrate(twin, others, [images()])
    # The first layer's input was the same; the second one's was computed with the first one's rounded weight.
    assert torch.equal(
        modules["0"].input_quantizer.grids["int4"].scale, others["0"].input_quantizer.grids["int4"].scale
    )
    model.eval()(images())


def test_layers_that_calibration_does_not_reach_are_told_of_once(caplog):
    model = small()
    model.heads = nn.ModuleList(nn.Linear(4, 4) for _ in range(4))
    model.forward = lambda x: model[4](model[3](model[0](x)))
    modules = quantize_model(model, formats=FORMATS)
    for _ in range(2):
        calibrate(model, modules, [images()])
    told = "4 of 6 layers were never called while calibrating, their inputs stay in float: heads.0, "
    assert caplog.text.count(told + "heads.1, heads.2, ...") == 1


OBSERVERS_OF_ACTIVATIONS = [name for name in OBSERVERS if name not in WEIGHTS_ONLY]


def test_an_empty_calibration_set_is_refused():
    model = small()
    modules = quantize_model(model, formats=FORMATS)
    with pytest.raises(UserError, match="calibration set is empty"):
        calibrate(model, modules, [])
    assert model.training and not any(module.observing for module in modules.values())


@pytest.mark.parametrize("observer", OBSERVERS_OF_ACTIVATIONS)
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_leaves_no_trace_in_the_ranges_where_it_is_ignored(observer, side):
    generator = torch.Generator().manual_seed(0)
    real = torch.randn(4, 6, 5, generator=generator)
    lengths = torch.tensor([6, 3, 1, 5]).unsqueeze(1)
    mask = (torch.arange(6) < lengths).long()
    mask = mask.flip(1) if side == "left" else mask

    class Tokens(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.flat, self.pooler = nn.Linear(5, 5), nn.Linear(5, 5), nn.Linear(5, 2)

        def forward(self, x, attention_mask):
            x = self.flat(self.first(x).flatten(0, 1)).view_as(x)
            return self.pooler((x * attention_mask.unsqueeze(2)).sum(dim=1))

    torch.manual_seed(0)
    float_model = Tokens()

    def scales(padding, ignore):
        model = copy.deepcopy(float_model)
        config = QuantizerConfig(range="calibrated", symmetric=False, observer=observer, ignore_padding=ignore)
        modules = quantize_model(model, formats=FORMATS, activation=config)
        x = torch.where(mask.bool().unsqueeze(2), real, padding)
        calibrate(model, modules, [{"x": x, "attention_mask": mask}, {"x": 2 * x, "attention_mask": mask}])
        return torch.stack([g.scale for m in modules.values() for g in m.input_quantizer.grids.values()])

    assert torch.equal(scales(0.0, True), scales(1000.0, True))
    assert not torch.equal(scales(0.0, False), scales(1000.0, False))


def test_recalibrating_leaves_learned_scales_as_trained_if_asked():
    weight = QuantizerConfig(range="calibrated", granularity="channel")
    model = small()
    modules = quantize_model(model, formats=FORMATS, weight=weight)
    calibrate(model, modules, [images()])
    learned = modules["0"].input_quantizer.grids["int4"].scale.clone()
    fixed = modules["0"].weight_quantizer.grids["int4"].scale.clone()
    with torch.no_grad():
        modules["0"].weight.mul_(2)
    calibrate(model, modules, [5 * images()], learned=False)
    assert torch.equal(modules["0"].input_quantizer.grids["int4"].scale, learned)
    torch.testing.assert_close(modules["0"].weight_quantizer.grids["int4"].scale, fixed * 2)
    calibrate(model, modules, [5 * images()])
    assert not torch.equal(modules["0"].input_quantizer.grids["int4"].scale, learned)


def test_a_failed_calibration_leaves_the_model_as_it_was():
    model = small()
    modules = quantize_model(model, formats=FORMATS)
    with pytest.raises(RuntimeError):
        calibrate(model, modules, [torch.randn(2, 5, 6, 6)])
    assert model.training and not any(module.observing for module in modules.values())


@pytest.mark.parametrize("observer", OBSERVERS_OF_ACTIVATIONS)
@pytest.mark.parametrize("spoiled", [torch.nan, torch.inf, -torch.inf])
def test_one_value_that_is_not_finite_ends_the_calibration_and_names_the_layer(observer, spoiled):
    model = small()
    activation = QuantizerConfig(range="calibrated", observer=observer, symmetric=False)
    modules = quantize_model(model, formats=FORMATS, activation=activation)
    batches = [images(), images()]
    batches[0][0, 0, 0, 0] = spoiled
    with pytest.raises(NotFiniteError, match="layer 0: its input holds NaN or infinity"):
        calibrate(model, modules, batches)
    assert all(module.input_quantizer.observation is None for module in modules.values())
    calibrate(model, modules, [images()])  # what was seen before is forgotten
    with torch.no_grad():
        model[4].weight[0, 0] = spoiled
    with pytest.raises(NotFiniteError, match="layer 4: its weight holds NaN or infinity"):
        calibrate(model, modules, [images()])


@pytest.mark.parametrize(
    "batch", [{"input": images()}, (images(),), [images()], images()], ids=lambda batch: type(batch).__name__
)
def test_batches_come_packed_in_several_ways(batch):
    model = small().eval()
    assert torch.equal(run_model(model, batch), model(images()))


# ------------------------------------------------------ evaluating


@pytest.mark.parametrize("range", ["calibrated", "learned"])
def test_one_example_gives_the_same_alone_and_in_any_batch(range):
    model = small()
    config = QuantizerConfig(range=range, symmetric=False)
    modules = quantize_model(model, formats=FORMATS, activation=config)
    calibrate(model, modules, [images()])
    all_in(modules, "int4", "int4")
    model.eval()
    inputs = {}
    for name, module in modules.items():
        module.register_forward_pre_hook(lambda module, args, name=name: inputs.setdefault(name, []).append(args[0]))
    outliers = torch.cat([images(), 100 * torch.ones(1, 3, 6, 6)])
    together, alone = model(outliers), model(outliers[:1])
    torch.testing.assert_close(together[:1], alone)
    rounded = [modules["0"].input_quantizer(x) for x in inputs["0"]]
    assert torch.equal(rounded[0][:1], rounded[1])


def test_formats_come_back_after_running_in_float():
    model = small().eval()
    x, before = images(), model(images())
    modules = quantize_model(model, **DYNAMIC)
    all_in(modules, "int2", "e4m3")
    rounded = model(x)
    with pytest.raises(KeyboardInterrupt), in_float(modules):
        assert torch.equal(model(x), before)
        raise KeyboardInterrupt
    assert torch.equal(model(x), rounded) and not torch.equal(rounded, before)


def test_an_assignment_sets_what_it_names_and_refuses_unknown_layers():
    modules = quantize_model(small())
    set_formats(modules, {"4": INT2})
    assert get_formats(modules) == {"0": (FLOAT, FLOAT), "4": INT2}
    with pytest.raises(UserError, match=r"unknown layer .5.; similar names: 0, 4"):
        set_formats(modules, {"5": INT2})


# ------------------------------------------------------ saving, copying, moving


def trained():
    """A model after two training steps with changing formats."""
    model = small()
    modules = quantize_model(model, formats=FORMATS)
    calibrate(model, modules, [images()])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    for weight, activation in (("int2", "e4m3"), ("int4", "int2")):
        all_in(modules, weight, activation)
        optimizer.zero_grad()
        model(images()).square().mean().backward()
        optimizer.step()
    return model.eval(), modules


def outputs(model, modules):
    """The model's outputs in each format."""
    results = []
    for format in FORMATS:
        set_formats(modules, dict.fromkeys(modules, (format, format)))
        results.append(model(images()))
    return torch.stack(results)


@pytest.mark.parametrize("formats", [FORMATS, ()], ids=["same formats", "none yet"])
def test_a_freshly_quantized_model_loads_what_was_trained_and_gives_the_same(formats, tmp_path):
    model, modules = trained()
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    fresh = small()
    fresh_modules = quantize_model(fresh, formats=formats)
    fresh.load_state_dict(load_file(tmp_path / "model.safetensors"))
    assert torch.equal(outputs(fresh.eval(), fresh_modules), outputs(model, modules))


def test_tied_weights_survive_saving_and_loading(tmp_path):
    def tied():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Embedding(9, 6), nn.Linear(6, 9, bias=False))
        model[1].weight = model[0].weight
        return model, quantize_model(model, formats=FORMATS)

    (model, modules), (fresh, fresh_modules) = tied(), tied()
    ids = torch.arange(9).view(3, 3)
    calibrate(model, modules, [ids])
    all_in(modules, "int2", "int4")
    model(ids).square().sum().backward()
    torch.optim.SGD(model.parameters(), lr=0.01).step()
    save_model(model, str(tmp_path / "model.safetensors"))
    load_model(fresh, str(tmp_path / "model.safetensors"))
    all_in(fresh_modules, "int2", "int4")
    assert fresh[1].weight is fresh[0].weight
    assert torch.equal(fresh.eval()(ids), model.eval()(ids))


def test_state_holds_the_same_names_before_and_after_use():
    model = small()
    modules = quantize_model(model, formats=FORMATS)
    names = set(model.state_dict())
    calibrate(model, modules, [images()])
    outputs(model, modules).sum().backward()
    assert set(model.state_dict()) == names


@pytest.mark.parametrize("make", [small, lambda: nn.Sequential(SamePadding(3, 4, 4))], ids=["small", "own forward"])
def test_a_deep_copy_is_equal_and_independent(make):
    model = make()
    modules = quantize_model(model, formats=FORMATS)
    calibrate(model, modules, [images()])
    twin = copy.deepcopy(model)
    twins = {name: twin.get_submodule(name) for name in modules}
    model.eval(), twin.eval()
    before = outputs(model, modules)
    assert torch.equal(outputs(twin, twins), before)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.mul_(1.5)
    assert torch.equal(outputs(model, modules), before)


def test_torch_exports_a_model_for_any_number_of_rows():
    model = small().eval()
    modules = quantize_model(model, formats=FORMATS)
    calibrate(model, modules, [images()])
    all_in(modules, "int4", "int4")
    exported = torch.export.export(model, (images(),), dynamic_shapes=({0: torch.export.Dim("rows")},)).module()
    assert torch.equal(exported(images(3)), model(images(3)))


def through_torch(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def through_pickle(model):
    return pickle.loads(pickle.dumps(model))


def test_a_model_may_be_written_whole_by_torch():
    model = small().eval()
    modules = quantize_model(model, formats=FORMATS)
    calibrate(model, modules, [images()])
    all_in(modules, "int4", "int4")
    again = through_torch(model)
    assert torch.equal(again(images()), model(images()))
    grid = again[0].input_quantizer.grids["int4"]
    grid.is_ready = False
    again.load_state_dict(model.state_dict())
    assert grid.is_ready


class MyLinear(nn.Linear):
    """A subclass that keeps its base's forward."""


@pytest.mark.parametrize("copied", [copy.deepcopy, through_pickle, through_torch], ids=lambda way: way.__name__)
def test_subclasses_of_layers_may_be_written_whole(copied):
    torch.manual_seed(0)
    model = nn.Sequential(SamePadding(3, 4, 4), nn.Flatten(), MyLinear(4 * 36, 8)).eval()
    modules = quantize_model(model, formats=FORMATS)
    calibrate(model, modules, [images()])
    all_in(modules, "int4", "int4")
    again = copied(model)
    assert [type(layer) for layer in again] == [type(layer) for layer in model]
    assert torch.equal(again(images()), model(images()))
    with torch.no_grad():
        again[2].weight.zero_()
    assert model[2].weight.any()


def test_layers_named_like_globs_are_quantized_as_described():
    def made():
        return nn.ModuleDict({name: nn.Linear(4, 4) for name in ("a[0]", "b*", "bc")})

    modules = quantize_model(made(), formats=FORMATS)
    described = describe_quantizers(modules)
    assert list(quantize_as_described(made(), modules, described)) == ["a[0]", "b*", "bc"]
    assert list(quantize_as_described(made(), ["b*"], described)) == ["b*"]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
def test_changing_the_models_dtype_keeps_every_scale(dtype):
    model, modules = trained()
    scales = {name: value.clone() for name, value in model.state_dict().items() if "_quantizer." in name}
    reference = outputs(model, modules)
    model.to(dtype)
    assert model[4].weight.dtype == dtype
    for name, value in scales.items():
        assert torch.equal(model.state_dict()[name], value) and model.state_dict()[name].dtype == value.dtype
    for module in modules.values():
        module.set_formats(parse_format("e4m3"), parse_format("e4m3"))
    output = model(images().to(dtype))
    assert output.dtype == dtype
    torch.testing.assert_close(output.float(), reference[2], rtol=0.1, atol=0.1)


def test_on_the_meta_device_shapes_flow_in_float():
    with torch.device("meta"):
        model = small()
        modules = quantize_model(model, formats=FORMATS)
        assert model(torch.empty(2, 3, 6, 6)).shape == (2, 10)
    assert all(p.is_meta for module in modules.values() for p in module.parameters())


def test_training_under_changing_formats_reaches_weights_and_only_the_scales_in_use():
    model = small()
    modules = quantize_model(model, formats=FORMATS)
    calibrate(model, modules, [images()])
    all_in(modules, "int4", "e4m3")
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(images()).square().mean()
    loss.backward()
    for name, parameter in model.named_parameters():
        used = "grids" not in name or ("weight_quantizer.grids.int4" in name or "input_quantizer.grids.e4m3" in name)
        assert (parameter.grad is not None) == used, name
        assert parameter.grad is None or parameter.grad.isfinite().all()


def test_from_float_shares_parameters_and_leaves_the_layer_alone():
    layer = nn.Linear(4, 3)
    module = from_float(layer)
    assert module.weight is layer.weight and module.bias is layer.bias
    assert set(layer._modules) == set() and set(module._modules) == {"weight_quantizer", "input_quantizer"}
    assert type(layer) is nn.Linear


# ------------------------------------------------------ adapters


class Adapted(nn.Module):
    """A frozen layer with a LoRA adapter, structured as in libraries."""

    def __init__(self, base):
        super().__init__()
        self.base_layer = base.requires_grad_(False)
        self.lora_A = nn.ModuleDict({"default": nn.Linear(base.in_features, 2, bias=False)})
        self.lora_B = nn.ModuleDict({"default": nn.Linear(2, base.out_features, bias=False)})

    def forward(self, x):
        return self.base_layer(x) + self.lora_B["default"](self.lora_A["default"](x))


def test_adapters_stay_in_float_unless_asked_for_and_scales_of_a_frozen_layer_train(caplog):
    model = nn.Sequential(Adapted(nn.Linear(6, 6)), nn.ReLU(), nn.Linear(6, 4))
    modules = quantize_model(model, formats=FORMATS)
    assert list(modules) == ["0.base_layer", "2"] == list(find_layers(model))
    told = "2 layers of LoRA adapters stay in float: 0.lora_A.default, 0.lora_B.default; name them in `include`"
    assert told in caplog.text and "weights in matrices" not in caplog.text
    x = torch.randn(3, 6)
    calibrate(model, modules, [x])
    all_in(modules, "int4", "int4")
    model(x).sum().backward()
    layer = modules["0.base_layer"]
    assert layer.weight.grad is None and layer.weight_quantizer.grids["int4"].scale.grad.abs().sum() > 0
    assert layer.input_quantizer.grids["int4"].scale.grad is not None
    assert model[0].lora_A["default"].weight.grad.abs().sum() > 0
    assert list(find_layers(model, include=["*lora_A*"])) == ["0.lora_A.default"]
    assert list(find_layers(nn.ModuleDict({"lora_A": nn.Linear(2, 2)}))) == ["lora_A"]  # alone it is a name like any


def test_the_choice_of_ranges_can_be_watched_layer_by_layer():
    """Ranges of large weights take most of a calibration, after the last batch has been seen."""
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    int4 = parse_format("int4")
    modules = quantize_model(model, formats=[int4])
    ready = []

    def watch(layers):
        for layer in layers:
            ready.append(sum(bool(m.weight_quantizer.grids["int4"].is_ready) for m in modules.values()))
            yield layer

    calibrate(model, modules, [torch.randn(8, 4)], watch=watch)
    assert ready == [0, 1]
