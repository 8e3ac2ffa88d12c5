"""The `quant:` section of a YAML file: every shipped file loads, and wrong keys and values are refused in one line."""

from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from eval.config.parser import parse, read_yaml, to_yaml
from eval.config.quant_yaml import OBSERVERS, alpha_settings, quant_flags
from eval.run.ptq import quantizer_configs
from quant.errors import UserError
from quant.quantizers.quantizer import QuantizerConfig

CONFIGS = sorted((Path(__file__).parents[3] / "configs").glob("*.yaml"))
EXAMPLE = """
is_remove_padding: true
calibrate: 256
ln: {delay: true}
a_qconfig: {quantizer: LSQPlusFakeQuantize, observer: AvgPruneMinMaxObserver, bit: 6, symmetric: false, ch_axis: -1}
w_qconfig: {quantizer: FixedFakeQuantize, observer: MSEObserver, bit: 4, symmetric: true, ch_axis: 0}
high_precision_ops: [gelu, softmax]
quantize_residual_adds: true
smooth_quant: {alpha: auto, auto_alpha_args: {alpha_min: 0.2, alpha_step: 0.1, shared_criterion: max, n_samples: 8}}
"""


def with_changes(**changes):
    """The example with keys changed: 'a_qconfig__bit=4'."""
    section = yaml.safe_load(EXAMPLE)
    for path, value in changes.items():
        *parents, key = path.split("__")
        place = section
        for parent in parents:
            place = place[parent]
        place[key] = value
    return section


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_shipped_file_is_a_run(path):
    config = parse(["--config", str(path)])
    assert config.method == "uniform" and path.stem.endswith(config.task) and config.calibration_samples == 256
    assert (config.max_steps == 0) == path.stem.startswith("ptq_")
    for side in quantizer_configs(config):
        assert side.observer in QuantizerConfig(observer=side.observer).observer


def test_the_shipped_files_cover_what_users_compare():
    stems = {path.stem.removesuffix("_mrpc") for path in CONFIGS}
    calibrators = {f"ptq_{name}_{bits}bit" for name in ("minmax", "percentile", "mse", "entropy") for bits in (6, 8)}
    methods = {"ptq_token_clipping", "ptq_gamma_migration", "ptq_outlier_suppression", "ptq_smooth_quant"}
    assert stems >= calibrators | methods | {"ptq_outlier_suppression_fine", "qat_outlier_suppression"}


def test_the_section_becomes_flags():
    assert quant_flags(yaml.safe_load(EXAMPLE), "file") == {
        "remove_padding": True,
        "calibration_samples": 256,
        "gamma_migration": True,
        "high_precision_ops": "gelu,softmax",
        "quantize_residual_adds": True,
        "quantizer": "lsq_plus",
        "observer": "avg_prune_minmax",
        "activation_bits": "int6",
        "act_symmetric": False,
        "act_per_channel": False,
        "weight_quantizer": "fixed",
        "weight_observer": "mse_grid",
        "weight_bits": "int4",
        "weight_symmetric": True,
        "per_channel": True,
        "smooth_quant": True,
        "smooth_quant_alpha": "auto:0.2:0.7:0.1",
        "smooth_quant_criterion": "max",
        "smooth_quant_samples": 8,
    }


PUBLISHED = """
    is_remove_padding: True
    ln:
        delay: {delay}
    a_qconfig:
        quantizer: {quantizer}
        observer: {observer}
        bit: 6
        symmetric: False
        ch_axis: -1
    w_qconfig:
        quantizer: FixedFakeQuantize
        observer: MinMaxObserver
        bit: 6
        symmetric: True
        ch_axis: 0
    calibrate: 256
"""


@pytest.mark.parametrize(
    "task, delay, quantizer, observer, flags",
    [
        ("cola", False, "FixedFakeQuantize", "AvgMinMaxObserver", ("fixed", "avg_minmax")),
        ("cola", False, "FixedFakeQuantize", "AvgQuantileObserver", ("fixed", "avg_quantile")),
        ("cola", False, "FixedFakeQuantize", "AvgMSEFastObserver", ("fixed", "avg_mse_fast")),
        *(
            (task, True, "LSQPlusFakeQuantize", "AvgPruneMinMaxObserver", ("lsq_plus", "avg_prune_minmax"))
            for task in ("mrpc", "stsb", "squad", "xsum")
        ),
    ],
)
def test_published_sections_run_as_they_are_written(task, delay, quantizer, observer, flags, tmp_path):
    """The `quant:` sections of Outlier Suppression's own experiments (github.com/wimh966/outlier_suppression, exp/)."""
    section = yaml.safe_load(PUBLISHED.format(delay=delay, quantizer=quantizer, observer=observer))
    path = tmp_path / "config.yaml"
    model = "bart" if task == "xsum" else "bert"
    path.write_text(yaml.safe_dump({"task": task, "model": model, "max_steps": 0, "quant": section}))
    config = parse(["--config", str(path)])
    assert (config.quantizer, config.observer) == flags and config.weight_quantizer == "fixed"
    assert config.gamma_migration is delay and config.remove_padding and config.calibration_samples == 256
    weight, activation = quantizer_configs(config)
    assert (weight.granularity, weight.symmetric, weight.observer) == ("channel", True, "minmax")
    assert (activation.granularity, activation.symmetric, activation.ignore_padding) == ("tensor", False, True)
    assert [format.name for format in config.uniform_formats] == ["int6", "int6"]


def test_defaults_are_those_of_the_framework():
    """Defaults: no padding, 256 examples, averaged extrema for activations; symmetric weights per channel."""
    flags = quant_flags({"a_qconfig": {"bit": 8}, "w_qconfig": {"bit": 8}}, "file")
    assert (flags["weight_symmetric"], flags["per_channel"], flags["act_symmetric"]) == (True, True, False)
    assert (flags["observer"], flags["weight_observer"]) == ("avg_minmax", "minmax")
    assert (flags["quantizer"], flags["weight_quantizer"], flags["gamma_migration"]) == ("fixed", "fixed", False)
    assert (flags["remove_padding"], flags["calibration_samples"], flags["act_per_channel"]) == (True, 256, False)
    assert "smooth_quant" not in flags


def test_a_bit_may_be_written_as_a_float():
    flags = quant_flags({"a_qconfig": {"bit": 6.0}, "w_qconfig": {"bit": 4.0}}, "file")
    assert (flags["activation_bits"], flags["weight_bits"]) == ("int6", "int4")
    with pytest.raises(UserError, match=r"a_qconfig\.bit: unknown format '6.5'"):
        quant_flags({"a_qconfig": {"bit": 6.5}}, "file")


def test_lsq_plus_learns_its_offset_or_is_refused(tmp_path):
    """LSQPlusFakeQuantize learns an offset, which symmetric quantization does not have."""
    for section, message in (
        (
            {"a_qconfig": {"quantizer": "LSQPlusFakeQuantize", "symmetric": True}},
            "a_qconfig.symmetric: true leaves LSQ",
        ),
        ({"w_qconfig": {"quantizer": "LSQPlusFakeQuantize"}}, "w_qconfig.symmetric: true, the default, leaves LSQPlus"),
    ):
        with pytest.raises(UserError, match=message):
            quant_flags(section, "file")
    side = {"quantizer": "LSQPlusFakeQuantize", "observer": "LSQPlusObserver", "bit": 4, "symmetric": False}
    path = tmp_path / "run.yaml"
    quant = {"a_qconfig": {**side, "ch_axis": 0}, "w_qconfig": {**side, "ch_axis": 0}}
    path.write_text(yaml.safe_dump({"task": "mrpc", "model": "bert", "quant": quant}))
    weight, activation = quantizer_configs(parse(["--config", str(path)]))
    for config in (weight, activation):
        assert config.learned_offset and not config.symmetric and config.range == "learned"
        assert (config.observer, config.granularity) == ("lsq_plus", "channel")


def test_a_file_with_the_section_comes_back_from_what_the_run_writes(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump({"task": "mrpc", "model": "bert", "max_steps": 0, "quant": yaml.safe_load(EXAMPLE)}))
    config = parse(["--config", str(path)])
    weight, activation = quantizer_configs(config)
    assert (weight.range, weight.observer, weight.granularity) == ("calibrated", "mse_grid", "channel")
    assert (activation.range, activation.observer) == ("learned", "avg_prune_minmax")
    assert activation.learned_offset and activation.ignore_padding and not activation.symmetric
    again = tmp_path / "again.yaml"
    again.write_text(to_yaml(config))
    assert parse(["--config", str(again)]).updated(config=None) == config.updated(config=None)
    assert parse(["--config", str(path), "--activation_bits", "4"]).activation_bits == "4"  # flags win


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"calib": 3},
            r"quant: unknown key 'calib'; choices: is_remove_padding, calibrate, .*did you mean calibrate\?",
        ),
        (
            {"a_qconfig__observer": "MinMax"},
            "quant.a_qconfig.observer: unknown value 'MinMax'; choices: MinMaxObserver,",
        ),
        (
            {"a_qconfig__quantizer": "LSQ"},
            "quant.a_qconfig.quantizer: unknown value 'LSQ'; choices: FixedFakeQuantize,",
        ),
        ({"w_qconfig__bits": 4}, r"quant.w_qconfig: unknown key 'bits'; choices: quantizer, .*did you mean bit\?"),
        ({"w_qconfig__bit": 1}, "quant.w_qconfig.bit: unknown format '1'.*; choices: int2..int8"),
        ({"a_qconfig__ch_axis": 1}, "quant.a_qconfig.ch_axis: unknown value 1; choices: -1, 0"),
        ({"a_qconfig": {"ch_axis": 0}}, "a_qconfig.ch_axis: 0 does not go with AvgMinMaxObserver, the default,"),
        ({"a_qconfig__symmetric": 1}, "quant.a_qconfig.symmetric: unknown value 1; choices: true, false"),
        ({"w_qconfig__observer": "AvgMinMaxObserver"}, "w_qconfig.ch_axis: 0 does not go with AvgMinMaxObserver"),
        ({"ln": {"delay": "yes"}}, "quant.ln.delay: unknown value 'yes'; choices: true, false"),
        ({"ln": {"delays": True}}, r"quant.ln: unknown key 'delays'; choices: delay; did you mean delay\?"),
        ({"ln": True}, "quant.ln must hold 'name: value' lines, got True"),
        ({"a_qconfig": False}, "quant.a_qconfig must hold 'name: value' lines, got False"),
        ({"calibrate": 0}, r"quant.calibrate must be a number in \[1,inf\), got 0"),
        ({"calibrate": "all"}, r"quant.calibrate must be a number in \[1,inf\), got 'all'"),
        ({"smooth_quant__alpha": "best"}, "quant.smooth_quant.auto_alpha_args needs alpha: auto, got alpha: 'best'"),
        (
            {"smooth_quant": {"alpha": "best"}},
            r"quant.smooth_quant.alpha: unknown value 'best'; choices: auto, a number",
        ),
        ({"smooth_quant": {"alpha": 2}}, r"quant.smooth_quant.alpha must be a number in \[0,1\], got 2"),
        ({"high_precision_ops": ["relu"]}, "high_precision_ops: unknown value 'relu'; choices: gelu, softmax, layer"),
        ({"high_precision_ops": "gelu"}, "high_precision_ops must be a list of gelu, softmax, layernorm, got 'gelu'"),
        ({"quantize_products": 1}, "quant.quantize_products: unknown value 1; choices: true, false"),
        ({"smooth_quant__auto_alpha_args__alpha_min": 0.9}, "auto_alpha_args.alpha_min 0.9 is above alpha_max 0.7"),
        ({"smooth_quant__auto_alpha_args__shared_criterion": "sum"}, "unknown value 'sum'; choices: mean, min, max"),
    ],
)
def test_what_is_wrong_is_said_in_one_line(changes, message, tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump({"task": "mrpc", "model": "bert", "quant": with_changes(**changes)}))
    with pytest.raises(UserError, match=message) as caught:
        read_yaml(path, "--config")
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_smooth_quant_can_be_switched_off(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump({"task": "mrpc", "model": "bert", "quant": with_changes(smooth_quant=False)}))
    assert not parse(["--config", str(path)]).smooth_quant


def test_a_setting_said_twice_is_refused(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump({"observer": "mse", "quant": yaml.safe_load(EXAMPLE)}))
    with pytest.raises(UserError, match="'observer' is said by the quant section too"):
        read_yaml(path, "--config")


def test_observers_are_those_of_the_flag():
    from quant.quantizers.observers import OBSERVERS as KNOWN

    assert set(OBSERVERS.values()) == set(KNOWN) - {"mse", "weighted_mse"}


@pytest.mark.parametrize(
    ("text", "settings"),
    [
        ("0.5", {"alpha": 0.5}),
        ("auto", {"alpha": "auto"}),
        ("auto:0.2:0.8:0.1", {"alpha": "auto", "alpha_min": 0.2, "alpha_max": 0.8, "alpha_step": 0.1}),
    ],
)
def test_alpha_as_a_flag(text, settings):
    assert alpha_settings(text) == settings


@given(
    st.sampled_from(["1.5", "-0.1", "best", "auto:1", "auto:0.8:0.2:0.1", "auto:0:1:0", "0.5:1", "nan", "auto:a:b:c"])
)
def test_alphas_that_make_no_sense_are_refused(text):
    with pytest.raises(UserError, match=r"--smooth_quant_alpha .*choices: a number in"):
        alpha_settings(text)


RUN = ["--task", "mrpc", "--model", "bert"]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--bits 8 --smooth_quant_alpha auto", "--smooth_quant_alpha auto contradicts no --smooth_quant"),
        ("--gamma_migration", "--gamma_migration contradicts --method float: nothing is quantized"),
        ("--smooth_quant --bits 8 --gradient_checkpointing", "--smooth_quant contradicts --gradient_checkpointing"),
        ("--bits 8 --weight_observer avg_minmax", "--weight_observer avg_minmax contradicts --per_channel"),
        ("--bits 8 --weight_observer mse --weight_range_percentile 99", "contradicts --weight_observer mse"),
        ("--bits 8 --observer entropy --act_range_percentile 99", "contradicts --observer entropy"),
        ("--bits 8 --calibration_samples 0", "--calibration_samples must lie in"),
    ],
)
def test_flags_that_contradict_each_other(flags, message):
    with pytest.raises(UserError, match=message):
        parse([*RUN, *flags.split()])


def test_padding_is_a_matter_of_texts(tmp_path):
    """The section's default removes padding; image tasks ignore it, since they have none."""
    for task, model, removes in (("mrpc", "bert", True), ("cifar10", "resnet20", False)):
        path = tmp_path / f"{task}.yaml"
        quant = {"a_qconfig": {"bit": 8}, "w_qconfig": {"bit": 8}}
        path.write_text(yaml.safe_dump({"task": task, "model": model, "quant": quant}))
        assert read_yaml(path, "--config")["remove_padding"] is removes
        parse(["--config", str(path)])
    assert quant_flags({"w_qconfig": {"bit": 8}}, "file")["remove_padding"] is False
