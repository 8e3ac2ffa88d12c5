"""Migration across norms and ReLUs: the float model's output stays the same, and the quantization error falls."""

import copy
import json
from dataclasses import asdict, replace

import pytest
import torch
import transformers
from timm.layers import LayerNorm2d, StdConv2d
from torch import nn

from quant.convert import calibrate, quantize_model, set_formats
from quant.errors import UserError
from quant.formats import IntFormat
from quant.quantizers.quantizer import QuantizerConfig
from quant.transforms.graph import find_groups
from quant.transforms.migration import (
    Migration,
    SmoothQuantConfig,
    added,
    alpha_loss,
    attach,
    fold,
    gamma_migration,
    migrate,
    smooth_quant,
    smoothing,
    watch_inputs,
    weight_maxima,
)

SMALL = {"vocab_size": 50, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
BART = {
    **{"vocab_size": 50, "d_model": 16, "encoder_layers": 2, "decoder_layers": 2},
    **{"encoder_attention_heads": 2, "decoder_attention_heads": 2, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32},
}
MODELS = {
    "bert": ("BertForSequenceClassification", "BertConfig", SMALL),
    "roberta": ("RobertaForSequenceClassification", "RobertaConfig", {**SMALL, "pad_token_id": 1}),
    "bart": ("BartForConditionalGeneration", "BartConfig", BART),
    "gpt2": ("GPT2LMHeadModel", "GPT2Config", {"vocab_size": 50, "n_embd": 16, "n_layer": 2, "n_head": 2}),
    "opt": ("OPTForCausalLM", "OPTConfig", {**SMALL, "ffn_dim": 32, "word_embed_proj_dim": 16}),
    "llama": ("LlamaForCausalLM", "LlamaConfig", SMALL),
    "vit": ("ViTForImageClassification", "ViTConfig", {**SMALL, "image_size": 8, "patch_size": 4}),
}
POST_NORM = ("bert", "roberta", "bart")


def build(name, seed=0):
    """A random model whose norms have random weights and biases, gamma 0 and below 0 among them; and a batch."""
    model_class, config_class, settings = MODELS[name]
    special = {} if name == "vit" else {"bos_token_id": 2, "eos_token_id": 3}
    settings = {key: value for key, value in settings.items() if name != "vit" or key != "vocab_size"}
    torch.manual_seed(seed)
    model = getattr(transformers, model_class)(getattr(transformers, config_class)(**settings, **special)).eval()
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            if "norm" in parameter_name.lower() or ".ln_" in parameter_name:
                parameter.normal_()
                parameter.view(-1)[3] = 0.0
            else:  # far from what models start with, whose logits hardly depend on anything
                parameter.normal_(std=0.3)
    if name == "vit":
        return model, {"pixel_values": torch.randn(3, 3, 8, 8)}
    return model, {"input_ids": torch.randint(5, 50, (3, 7))}


def logits(model, batch):
    with torch.no_grad():
        return model(**batch).logits


def assert_same(before, after):
    assert (after - before).abs().max() <= 1e-5 * before.abs().max()


@pytest.mark.parametrize("name", MODELS)
def test_gamma_migration_leaves_the_float_model_as_it_is(name):
    model, batch = build(name)
    before = logits(model, batch)
    groups = [group for group in find_groups(model, batch) if group.normalizes]
    assert all(bool(group.shortcuts) == (name in POST_NORM) for group in groups)
    gamma_migration(model, groups)
    assert_same(before, logits(model, batch))
    modules = dict(model.named_modules())
    for group in groups:
        gamma = modules[group.source].weight
        assert torch.equal(gamma, torch.where(torch.arange(16) == 3, 0.0, 1.0)), group
    assert set(added(model).shortcuts) == {target for group in groups for target in group.shortcuts}


@pytest.mark.parametrize("name", POST_NORM)
def test_without_its_shortcut_a_migration_changes_the_model(name):
    model, batch = build(name)
    before = logits(model, batch)
    modules = dict(model.named_modules())
    group = next(group for group in find_groups(model, batch) if group.shortcuts)
    source, consumers = modules[group.source], [modules[name] for name in group.consumers]
    migrate(source, consumers, [], torch.linspace(0.5, 2, 16))
    assert (logits(model, batch) - before).abs().max() > 1e-3 * before.abs().max()


def test_the_groups_of_the_paper_are_found():
    """Embedding LN -> q, k, v; attention LN -> intermediate; output LN -> the next layer's q, k, v, except the last."""
    bert = find_groups(*build("bert"))
    names = {g.source: ([c.rpartition(".")[2] for c in g.consumers], g.shortcuts) for g in bert if g.source}
    layer = "bert.encoder.layer."
    assert names == {
        "bert.embeddings.LayerNorm": (["query", "key", "value"], (f"{layer}0.attention.output.LayerNorm",)),
        f"{layer}0.attention.output.LayerNorm": (["dense"], (f"{layer}0.output.LayerNorm",)),
        f"{layer}0.output.LayerNorm": (["query", "key", "value"], (f"{layer}1.attention.output.LayerNorm",)),
        f"{layer}1.attention.output.LayerNorm": (["dense"], (f"{layer}1.output.LayerNorm",)),
    }
    bart = {g.source: g.consumers for g in find_groups(*build("bart"))}
    decoder = "model.decoder.layers.0"
    assert bart[f"{decoder}.self_attn_layer_norm"] == (f"{decoder}.encoder_attn.q_proj",)
    assert "model.encoder.layers.1.final_layer_norm" not in bart  # the encoder's last one is an output
    opt = {g.source: g for g in find_groups(*build("opt"))}
    assert opt["model.decoder.layers.0.fc1"].rectified and opt["model.decoder.layers.0.fc1"].consumers[0].endswith(
        "fc2"
    )


@pytest.mark.parametrize("name", POST_NORM)
def test_a_migrated_model_has_the_same_groups_and_can_be_migrated_again(name):
    model, batch = build(name)
    before, groups = logits(model, batch), find_groups(model, batch)
    modules = dict(model.named_modules())
    for group in groups:
        if group.source:
            sides = [modules[n] for n in group.consumers], [modules[n] for n in group.shortcuts]
            migrate(modules[group.source], *sides, torch.linspace(0.1, -4, 16))
    assert find_groups(model, batch) == groups
    gamma_migration(model, groups)
    assert_same(before, logits(model, batch))


def test_dropout_in_training_is_what_the_shortcut_adds_too():
    """The embeddings' dropout lies between the norm and both of its readers."""
    model, batch = build("bert")
    model.config.hidden_dropout_prob = 0.5
    migrated = copy.deepcopy(model)
    gamma_migration(migrated, find_groups(migrated, batch))
    outputs = []
    for each in (model, migrated):
        each.train()
        torch.manual_seed(3)
        outputs.append(each(**batch).logits)
    assert_same(*outputs)
    assert migrated.training


@pytest.mark.parametrize("name", ["bert", "gpt2"])
def test_gradients_pass_a_migrated_model(name):
    model, batch = build(name)
    gamma_migration(model, find_groups(model, batch))
    model(**batch).logits.square().sum().backward()
    assert all(
        p.grad is not None and p.grad.isfinite().all() for n, p in model.named_parameters() if "norm" in n.lower()
    )


def test_a_norm_that_does_not_scale_with_its_weight_is_no_source():
    class PlusOneRMSNorm(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(4))

        def forward(self, x):
            return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6) * (1 + self.weight)

    model = nn.Sequential(PlusOneRMSNorm(), nn.Linear(4, 2))
    assert [group.source for group in find_groups(model, torch.randn(3, 4))] == [None]


def test_a_reader_that_cannot_make_up_for_it_keeps_the_scale_where_it_is():
    class Net(nn.Module):
        def __init__(self, extra):
            super().__init__()
            self.norm, self.linear, self.extra = nn.LayerNorm(4), nn.Linear(4, 4), extra

        def forward(self, x):
            x = self.norm(x)
            return self.linear(x) + self.extra(x)

    def source(extra):
        return find_groups(Net(extra), torch.randn(3, 4))[0].source

    assert source(lambda x: 0) == "norm"
    assert source(lambda x: x * 2) is None
    assert source(lambda x: x) is None  # the sum is an output, no norm that could add the shortcut
    assert source(lambda x: x.softmax(-1)) is None
    assert source(lambda x: x[:, :1]) is None


def test_a_weight_that_something_else_shares_takes_no_scale():
    model, batch = build("gpt2")
    assert model.lm_head.weight is model.transformer.wte.weight
    assert all("lm_head" not in group.consumers for group in find_groups(model, batch))


class Blocks(nn.Module):
    """Norms n1 to n3 and layers f, g, h with 8 channels, connected according to `way`."""

    def __init__(self, way):
        super().__init__()
        self.way = way
        for name in ("n1", "n2", "n3"):
            setattr(self, name, nn.LayerNorm(8))
            nn.init.normal_(getattr(self, name).weight)
        self.f, self.g, self.h = (nn.Linear(8, 8) for _ in range(3))

    def forward(self, x):
        return self.way(self, x)


def two_sources_of_one_shortcut(m, x):
    a = m.n1(x)
    b = m.n2(m.f(a))
    u = m.g(b)
    return m.h(m.n3(a + b)) + u


def a_sum_with_itself(m, x):
    a = m.n1(x)
    return m.g(m.n2(a + a)) + m.f(a)


def a_norm_read_as_a_function(m, x):
    return m.f(m.n1(x)) + nn.functional.layer_norm(x, (8,), m.n1.weight, m.n1.bias)


def a_layer_read_as_a_function(m, x):
    return m.f(x) + x.abs() @ m.f.weight.T


def a_norm_before_the_layer_it_would_ask(m, x):
    a = m.n1(x)
    t = m.n2(a + x)
    return m.f(a) + m.g(t)


def layers_called_by_name(m, x):
    a = m.n1(input=x)
    return m.h(input=m.n2(input=a + m.f(input=a)))


@pytest.mark.parametrize(
    ("way", "sources", "shortcuts"),
    [
        (two_sources_of_one_shortcut, {"f": "n1", "g": None, "h": "n3"}, ["n3"]),
        (a_sum_with_itself, {"f": None, "g": "n2"}, []),
        (a_norm_read_as_a_function, {"f": None}, []),
        (a_layer_read_as_a_function, {}, []),
        (a_norm_before_the_layer_it_would_ask, {"f": None, "g": "n2"}, []),
        (layers_called_by_name, {"f": "n1", "h": "n2"}, ["n2"]),
    ],
)
def test_whoever_reads_what_and_when_the_float_model_stays_as_it_is(way, sources, shortcuts):
    torch.manual_seed(0)
    model, x = Blocks(way).eval(), torch.randn(6, 8)
    before, groups = model(x), find_groups(model, x)
    assert {layer: group.source for group in groups for layer in group.consumers} == sources
    assert [norm for group in groups for norm in group.shortcuts] == shortcuts
    gamma_migration(model, groups)
    smooth_quant(model, groups, [x], SmoothQuantConfig(alpha="auto"))
    assert_same(before, model(x))


def test_a_shortcut_of_channels_that_are_not_last_is_none():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = LayerNorm2d(6), LayerNorm2d(6)
            self.conv, self.last = nn.Conv2d(6, 6, 1), nn.Conv2d(6, 3, 1)

        def forward(self, x):
            x = self.first(x)
            return self.last(self.second(x + self.conv(x)))

    assert [group.source for group in find_groups(Net(), torch.randn(2, 6, 6, 6))] == ["second"]


def test_a_layer_called_twice_absorbs_nothing_and_is_divided_once():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm, self.linear = nn.LayerNorm(4), nn.Linear(4, 4)

        def forward(self, x):
            return self.linear(self.linear(self.norm(x)).sigmoid())

    model, x = Twice(), torch.randn(5, 4) * torch.tensor([1.0, 1, 1, 50])
    groups = find_groups(model, x)
    assert [(group.source, group.consumers) for group in groups] == [(None, ("linear",))]
    before = model(x)
    smooth_quant(model, groups, [x])
    torch.testing.assert_close(model(x), before, rtol=1e-5, atol=1e-6)


class TiedSource(nn.Module):
    def __init__(self):
        super().__init__()
        self.table, self.up, self.down = nn.Embedding(16, 8), nn.Linear(8, 16), nn.Linear(16, 4)
        self.up.weight = self.table.weight

    def forward(self, x):
        return self.down(self.up(self.table(x)).relu())


class ReadByName(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.query, self.key = nn.LayerNorm(8), nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x):
        x = self.norm(x)
        return self.query(x) + self.key(input=x)


def normed(layer):
    return nn.utils.parametrizations.weight_norm(layer)


@pytest.mark.parametrize(
    ("model", "x", "sources"),
    [
        pytest.param(TiedSource, torch.arange(10).view(2, 5), [None], id="tied source"),
        pytest.param(ReadByName, torch.randn(4, 8), ["norm"], id="an input passed by name"),
        pytest.param(lambda: [normed(nn.Linear(8, 16)), nn.ReLU(), nn.Linear(16, 4)], torch.randn(4, 8), [None],
                     id="a weight that is computed"),
        pytest.param(lambda: [nn.Conv2d(3, 12, 3, padding=1), nn.ReLU(), nn.Linear(12, 5)],
                     torch.randn(2, 3, 12, 12), [None], id="a Linear along the width"),
        pytest.param(lambda: [nn.LayerNorm(12), nn.Conv2d(12, 5, 1)], torch.randn(2, 12, 12, 12), [],
                     id="a convolution over what is normed along the width"),
        pytest.param(lambda: [LayerNorm2d(12), nn.Conv2d(12, 5, 1)], torch.randn(2, 12, 12, 12), ["0"],
                     id="a norm of channels"),
        pytest.param(lambda: [nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 8, 3, groups=4)],
                     torch.randn(2, 3, 12, 12), [], id="depthwise with a multiplier"),
    ],
)  # fmt: skip
def test_only_what_reads_the_sources_own_channels_is_in_its_group(model, x, sources):
    torch.manual_seed(0)
    made = model()
    made = nn.Sequential(*made) if isinstance(made, list) else made
    before = made.eval()(x)
    groups = find_groups(made, x)
    assert [group.source for group in groups] == sources
    smooth_quant(made, groups, [x])
    torch.testing.assert_close(made(x), before, rtol=1e-5, atol=1e-5)


class ReadBesideTorch(nn.Module):
    """The norm's output is also read without a torch function."""

    def __init__(self):
        super().__init__()
        self.first, self.norm, self.linear = nn.Linear(8, 8), nn.LayerNorm(8), nn.Linear(8, 8)

    def forward(self, x):
        x = self.norm(self.first(x))
        return self.linear(x) + torch.from_numpy(x.detach().numpy())


def test_what_watching_does_not_see_is_tried_on_a_copy(caplog):
    torch.manual_seed(0)
    model, x = ReadBesideTorch().eval(), torch.randn(6, 8)
    nn.init.normal_(model.norm.weight)
    state, before = copy.deepcopy(model.state_dict()), model(x)
    with pytest.raises(UserError, match="--gamma_migration: ReadBesideTorch has no norm"):
        fold(model, x, lambda: [x], ["first", "linear"], gamma=True)
    assert not added(model).divided and all(torch.equal(t, state[name]) for name, t in model.state_dict().items())
    fold(model, x, lambda: [x], ["first", "linear"], smooth=SmoothQuantConfig())
    assert added(model).divided == ["first"] and "no scale is moved into linear: the model's output" in caplog.text
    assert_same(before, model(x))


def test_a_convolution_that_standardizes_its_weight_takes_no_scale():
    torch.manual_seed(0)
    layers = nn.Conv2d(3, 8, 3), nn.ReLU(), StdConv2d(8, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 1), nn.ReLU()
    model, x = nn.Sequential(*layers, nn.Conv2d(4, 4, 1)).eval(), torch.randn(2, 3, 8, 8)
    before, weight = model(x), model[2].weight.clone()
    fold(model, x, lambda: [x], ["0", "2", "4", "6"], smooth=SmoothQuantConfig())
    assert torch.equal(model[2].weight, weight)
    assert_same(before, model(x))


@pytest.mark.filterwarnings("ignore:.*weight_norm. is deprecated")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_trying_takes_computed_weights_and_any_precision(dtype, caplog):
    model, batch = build("bert")
    model.classifier = nn.utils.weight_norm(model.classifier)
    model.to(dtype)
    fold(model, batch, lambda: [batch], ["bert.encoder.layer.1.intermediate.dense"], gamma=True)
    assert len(added(model).shortcuts) == 1 and "no scale" not in caplog.text


def test_alpha_is_judged_on_what_hooks_have_made_of_the_input():
    torch.manual_seed(0)
    plain, x, s = nn.Linear(16, 4), torch.randn(20, 16), torch.linspace(0.5, 2, 16)
    divides = copy.deepcopy(plain)
    migrate(None, [divides], [], torch.logspace(-2, 2, 16))
    divides.load_state_dict(plain.state_dict(), strict=False)
    one, two = (alpha_loss(layer, [x], s, (IntFormat(4),) * 2) for layer in (plain, divides))
    assert one == two


# ------------------------------------------------------ what it is for


def quantized_error(model, batch, bits, output):
    """Mean squared error of `output(model)` with every layer at `bits`, calibrated on the batch."""
    reference = output(model, batch)
    model = copy.deepcopy(model)
    weight = QuantizerConfig(range="dynamic", granularity="channel", observer="minmax")
    activation = QuantizerConfig(range="calibrated", observer="minmax", symmetric=False)
    modules = quantize_model(model, formats=[IntFormat(bits)], weight=weight, activation=activation)
    calibrate(model, modules, [batch])
    set_formats(modules, dict.fromkeys(modules, (IntFormat(bits), IntFormat(bits))))
    return float((output(model, batch) - reference).square().mean())


@pytest.mark.parametrize("bits", [6, 8])
def test_planted_gamma_outliers_are_migrated_away(bits):
    """Gamma is 15, -20 and 25 in 3 of 256 channels, whose weights are small, as in trained models."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.LayerNorm(256), nn.Linear(256, 64)).eval()
    planted = torch.tensor([15.0, -20.0, 25.0])
    with torch.no_grad():
        model[0].weight[:3] = planted
        model[1].weight[:, :3] /= planted
    x = torch.randn(512, 256)

    def output(model, batch):
        with torch.no_grad():
            return model(batch)

    before = quantized_error(model, x, bits, output)
    gamma_migration(model, find_groups(model, x))
    assert before >= 20 * quantized_error(model, x, bits, output)


@pytest.mark.parametrize(("bits", "gain"), [(8, 10), (6, 4)])
def test_smooth_quant_takes_activation_outliers(bits, gain):
    """Three of 256 channels are 60 times as large as the others."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.LayerNorm(256), nn.Linear(256, 256)).eval()
    with torch.no_grad():
        model[0].weight[:3] *= 60
    x = torch.randn(512, 256)

    def output(model, batch):
        with torch.no_grad():
            return model(batch)

    reference, before = output(model, x), quantized_error(model, x, bits, output)
    smooth_quant(model, find_groups(model, x), [x])
    assert_same(reference, output(model, x))
    assert before >= gain * quantized_error(model, x, bits, output)


@pytest.mark.parametrize("alpha", [0.3, 0.5, "auto"])
@pytest.mark.parametrize("name", MODELS)
def test_smooth_quant_leaves_the_float_model_as_it_is(name, alpha):
    model, batch = build(name)
    before = logits(model, batch)
    groups = find_groups(model, batch)
    alphas = smooth_quant(model, groups, [batch, batch], SmoothQuantConfig(alpha=alpha, n_samples=2))
    assert_same(before, logits(model, batch))
    assert added(model).divided and len(alphas) == len(groups)
    assert all(0.3 <= chosen <= 0.7 for chosen in alphas.values())


@pytest.mark.parametrize("name", ["bert", "gpt2"])
def test_both_together_leave_the_float_model_as_it_is_and_come_back_from_a_file(name):
    model, batch = build(name)
    fresh, before = copy.deepcopy(model), logits(model, batch)
    layers = [n for n, m in model.named_modules() if isinstance(m, nn.Linear | transformers.pytorch_utils.Conv1D)]
    fold(model, batch, lambda: [batch], layers, gamma=True, smooth=SmoothQuantConfig())
    assert_same(before, logits(model, batch))
    done = json.loads(json.dumps(asdict(added(model))))
    attach(fresh, Migration(**done))
    assert added(fresh) == added(model)
    assert_same(before, logits(fresh, batch))
    fresh.load_state_dict(model.state_dict())
    torch.testing.assert_close(logits(fresh, batch), logits(model, batch), rtol=0, atol=0)


def test_convolutions_through_a_relu():
    torch.manual_seed(0)
    model = nn.Sequential(
        *(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(inplace=True), nn.Conv2d(8, 8, 3, groups=8)),
        *(nn.LeakyReLU(), nn.Conv2d(8, 6, 1), nn.ReLU6(), nn.Conv2d(6, 4, 1), nn.Flatten(), nn.Linear(4 * 36, 5)),
    ).eval()
    with torch.no_grad():
        model[1].weight[:2] *= 30
        model[1].running_var.uniform_(0.5, 2)
    x = torch.randn(2, 3, 8, 8)
    before = model(x)
    groups = find_groups(model, x)
    assert [(g.source, g.consumers) for g in groups] == [("1", ("3",)), ("3", ("5",)), (None, ("9",))]  # no clamp
    smooth_quant(model, groups, [x], SmoothQuantConfig(alpha="auto"))
    assert_same(before, model(x))
    assert model[1].weight.abs().max() < 20


# ------------------------------------------------------ SmoothQuant's scales and alphas


def test_scales_follow_the_formula_over_all_layers_that_share_the_input():
    torch.manual_seed(0)
    linears = [nn.Linear(6, 3), nn.Linear(6, 5)]
    wmax = weight_maxima(linears)
    assert torch.equal(wmax, torch.cat([linear.weight for linear in linears]).abs().amax(dim=0))
    amax = torch.tensor([0.0, 1e-9, 0.5, 1, 2, 60])
    wmax[2] = 0
    for alpha in (0.0, 0.3, 1.0):
        expected = [1.0] + [
            max(float(a) ** alpha / max(float(w), 1e-5) ** (1 - alpha), 1e-5)
            for a, w in zip(amax[1:], wmax[1:], strict=True)
        ]
        torch.testing.assert_close(smoothing(amax, wmax, alpha), torch.tensor(expected), rtol=1e-5, atol=0)


def test_amax_is_over_every_token_of_every_batch():
    model = nn.Sequential(nn.Linear(3, 2))
    batches = [torch.randn(4, 5, 3), torch.randn(2, 7, 3) * 3]
    seen = watch_inputs(model, {"0": model[0]}, batches, 1)["0"]
    every = torch.cat([batch.flatten(0, 1) for batch in batches]).abs().amax(dim=0)
    assert torch.equal(seen.amax, every) and [len(kept) for kept in seen.kept] == [5]


def brute_force_loss(linears, x, parts, alpha):
    """The loss of each layer with their common scale: the sum of |error / max|y||^0.5 over parts of the input."""
    amax, wmax = x.abs().amax(dim=0), torch.cat([linear.weight for linear in linears]).abs().amax(dim=0)
    s = amax**alpha / wmax ** (1 - alpha)
    losses = []
    for linear in linears:
        w, a = linear.weight * s, x / s
        step = w.abs().amax(dim=1, keepdim=True) / 127
        low, high = a.min().clamp(max=0), a.max().clamp(min=0)
        width = (high - low) / 255
        zero = (-128 - (low / width).round()).clamp(-128, 127)
        rounded = (((a / width).round() + zero).clamp(-128, 127) - zero) * width
        error, wanted = rounded @ ((w / step).round() * step).T - x @ linear.weight.T, x @ linear.weight.T
        losses.append(
            sum(
                float((e / y.abs().max()).abs().sqrt().sum())
                for e, y in zip(error.split(parts), wanted.split(parts), strict=True)
            )
        )
    return losses


def sharing():
    """Two layers that share a norm's output, and an input; the best alphas of the two differ."""
    torch.manual_seed(0)

    class Shared(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm, self.one, self.two = nn.LayerNorm(32), nn.Linear(32, 16), nn.Linear(32, 8)

        def forward(self, x):
            x = self.norm(x)
            return torch.cat([self.one(x), self.two(x)], dim=-1)

    model = Shared().requires_grad_(False).eval()
    model.one.bias.zero_()
    model.two.bias.zero_()
    model.norm.weight[:2] *= 40
    model.two.weight[:, 5] *= 6
    return model, torch.randn(64, 32)


@pytest.mark.parametrize("criterion", ["mean", "min", "max"])
def test_layers_that_share_an_input_take_what_their_own_best_alphas_say(criterion):
    """neural-compressor's shared_criterion: mean, min or max of alphas, not of losses."""
    model, x = sharing()
    seen, linears = model.norm(x), [model.one, model.two]
    config = SmoothQuantConfig(alpha="auto", n_samples=64, shared_criterion=criterion)
    assert config.grid == [0.3, 0.35, 0.4, 0.45, 0.5, 0.55, 0.6, 0.65, 0.7]
    losses = {alpha: brute_force_loss(linears, seen, [40, 24], alpha) for alpha in config.grid}
    amax, wmax = seen.abs().amax(dim=0), weight_maxima(linears)
    for alpha, wanted in losses.items():
        s = smoothing(amax, wmax, alpha)
        found = [alpha_loss(linear, [seen[:40], seen[40:]], s, (IntFormat(8),) * 2) for linear in linears]
        assert found == pytest.approx(wanted, rel=1e-4)
    best = [min(losses, key=lambda alpha: losses[alpha][layer]) for layer in range(2)]
    assert best[0] != best[1]
    alphas = smooth_quant(copy.deepcopy(model), find_groups(model, x), [x[:40], x[40:]], config)
    assert alphas == {"one": pytest.approx({"mean": sum(best) / 2, "min": min(best), "max": max(best)}[criterion])}


def test_a_layer_alone_never_loses_to_a_half():
    model, x = sharing()
    group = [replace(group, consumers=("two",)) for group in find_groups(model, x)]
    seen = model.norm(x)
    amax, wmax = seen.abs().amax(dim=0), weight_maxima([model.two])
    alpha = smooth_quant(copy.deepcopy(model), group, [x], SmoothQuantConfig(alpha="auto", n_samples=64))["two"]
    chosen, half = (alpha_loss(model.two, [seen], smoothing(amax, wmax, a), (IntFormat(8),) * 2) for a in (alpha, 0.5))
    assert chosen <= half


def test_no_layer_rules_by_the_size_of_its_output():
    torch.manual_seed(0)
    layer, x, s = nn.Linear(32, 8, bias=False).requires_grad_(False), torch.randn(64, 32), torch.linspace(0.5, 2, 32)
    before = alpha_loss(layer, [x], s, (IntFormat(8),) * 2)
    layer.weight *= 1024
    assert alpha_loss(layer, [x], s, (IntFormat(8),) * 2) == pytest.approx(before, rel=1e-5)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"alpha": 1.5}, r"smooth_quant.alpha must be auto or lie in \[0, 1\], got 1.5"),
        ({"alpha": "best"}, "smooth_quant.alpha must be auto .* got 'best'"),
        ({"alpha_min": 0.8}, "alpha_min and alpha_max must be ordered"),
        ({"alpha_step": 0}, "alpha_step must be positive, got 0"),
        ({"shared_criterion": "median"}, "shared_criterion must be one of mean, min, max, got 'median'"),
        ({"n_samples": 0}, "n_samples must be at least 1, got 0"),
    ],
)
def test_settings_that_make_no_sense_are_refused(fields, message):
    with pytest.raises(UserError, match=message):
        SmoothQuantConfig(**fields)


def test_what_cannot_be_done_is_said():
    model, batch = build("bert")
    with pytest.raises(UserError, match="calibration set is empty"):
        smooth_quant(model, find_groups(model, batch), [])
    plain = nn.Sequential(nn.Linear(4, 4))
    with pytest.raises(UserError, match="--gamma_migration: Sequential has no norm"):
        fold(plain, torch.randn(2, 4), lambda: [], ["0"], gamma=True)


def test_a_layer_traced_for_onnx_reads_what_its_hooks_make_of_its_input():
    from quant.export.onnx.export import _Traced

    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4)).eval()
    migrate(None, [model[0]], [], torch.tensor([1.0, 2.0, 4.0, 8.0]))
    modules = quantize_model(model)
    seen = []
    modules["0"].register_forward_pre_hook(lambda layer, args: seen.append(args[0]))
    _Traced("0", modules["0"])(torch.ones(2, 4))
    assert torch.equal(seen[0], torch.tensor([1, 0.5, 0.25, 0.125]).expand(2, 4))
