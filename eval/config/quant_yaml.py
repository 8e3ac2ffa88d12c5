"""Translates the `quant:` section of a YAML file to flags of a run.

The section uses the key names of the Outlier Suppression configurations (Wei et al. 2022). Torch is not imported.

quant:
  is_remove_padding: true
  calibrate: 256                # training examples
  ln: {delay: true}             # Gamma Migration
  a_qconfig: {quantizer: FixedFakeQuantize, observer: AvgPruneMinMaxObserver, bit: 6, symmetric: false, ch_axis: -1}
  w_qconfig: {quantizer: FixedFakeQuantize, observer: MinMaxObserver, bit: 6, symmetric: true, ch_axis: 0}
  high_precision_ops: [gelu, softmax, layernorm]  # in float, between quantized inputs and outputs
  quantize_residual_adds: true
  quantize_products: true       # queries, keys, attention probabilities, values
  quantize_embeddings: true
  smooth_quant: {alpha: auto, auto_alpha_args: {alpha_min: 0.3, alpha_max: 0.7, alpha_step: 0.05}}
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from eval.config.suggestions import did_you_mean
from quant.errors import UserError
from quant.formats import parse_format
from quant.validation import HIGH_PRECISION_OPS

OBSERVERS = {
    "MinMaxObserver": "minmax",
    "AvgMinMaxObserver": "avg_minmax",
    "AvgQuantileObserver": "avg_quantile",
    "MSEObserver": "mse_grid",
    "MSEFastObserver": "mse_fast",
    "AvgMSEFastObserver": "avg_mse_fast",
    "LSQPlusObserver": "lsq_plus",
    "AvgPruneMinMaxObserver": "avg_prune_minmax",
    "PercentileCalibrator": "percentile",
    "MSECalibrator": "mse_histogram",
    "EntropyCalibrator": "entropy",
}
"""name in the file -> --observer"""
QUANTIZERS = {"FixedFakeQuantize": "fixed", "LSQFakeQuantize": "lsq", "LSQPlusFakeQuantize": "lsq_plus"}
"""name in the file -> --quantizer"""
SIDES = {
    "a_qconfig": {
        "quantizer": "quantizer", "observer": "observer", "bit": "activation_bits", "symmetric": "act_symmetric",
    },
    "w_qconfig": {
        "quantizer": "weight_quantizer", "observer": "weight_observer", "bit": "weight_bits",
        "symmetric": "weight_symmetric",
    },
}  # fmt: skip
"""section -> key -> flag"""
DEFAULTS: dict[str, dict[str, Any]] = {
    "a_qconfig": {"quantizer": "FixedFakeQuantize", "observer": "AvgMinMaxObserver", "symmetric": False, "ch_axis": -1},
    "w_qconfig": {"quantizer": "FixedFakeQuantize", "observer": "MinMaxObserver", "symmetric": True, "ch_axis": 0},
}
REMOVE_PADDING, CALIBRATE = True, 256
"""defaults of is_remove_padding and calibrate"""
CHANNEL_FLAGS = {"a_qconfig": "act_per_channel", "w_qconfig": "per_channel"}
"""section -> flag that ch_axis 0 sets"""
TENSOR_FLAGS = ("quantize_residual_adds", "quantize_products", "quantize_embeddings")
"""flags that quantize further tensors; the keys of the section have the same names"""
AUTO_ALPHA = {"alpha_min": 0.3, "alpha_max": 0.7, "alpha_step": 0.05, "shared_criterion": "mean", "n_samples": 32}


def quant_flags(section: Any, source: str) -> dict[str, Any]:
    """Translate a `quant:` section to flags.

    Args:
        section: the content of the section, as read from YAML.
        source: the file, as errors name it.

    Raises:
        UserError: names the source, the key, the value and the choices.
    """
    return _Section(section, f"{source}: quant").flags()


class _Section:
    """One mapping of the file, with its path for error messages; reads and checks single values."""

    def __init__(self, values: Any, place: str) -> None:
        if not isinstance(values, Mapping):
            raise UserError(f"{place} must hold 'name: value' lines, got {values!r}")
        self.values, self.place = values, place

    def check_keys(self, known: Iterable[str]) -> None:
        known = list(known)
        for key in self.values:
            if key not in known:
                hint = did_you_mean(str(key), known)
                raise UserError(f"{self.place}: unknown key {key!r}; choices: {', '.join(known)}{hint}")

    def choice(self, key: str, choices: Iterable[Any], default: Any) -> Any:
        value = self.values.get(key, default)
        # In Python 1 == True; in a file they are different values.
        choices = list(choices)
        if not any(type(value) is type(choice) and value == choice for choice in choices):
            names = ", ".join(str(choice).lower() if isinstance(choice, bool) else str(choice) for choice in choices)
            raise UserError(f"{self.place}.{key}: unknown value {value!r}; choices: {names}")
        return value

    def number(self, key: str, kind: type, default: Any, interval: str) -> Any:
        value = self.values.get(key, default)
        low, high = (float(end) for end in interval[1:-1].split(","))
        fits = isinstance(value, kind | int) and not isinstance(value, bool)
        if not fits or not low <= value <= high or (interval[0] == "(" and value == low):
            raise UserError(f"{self.place}.{key} must be a number in {interval}, got {value!r}")
        return value

    def several(self, key: str, choices: Iterable[str]) -> list[str]:
        values = self.values[key]
        if not isinstance(values, list):
            raise UserError(f"{self.place}.{key} must be a list of {', '.join(choices)}, got {values!r}")
        for value in values:
            if value not in choices:
                raise UserError(f"{self.place}.{key}: unknown value {value!r}; choices: {', '.join(choices)}")
        return values

    def inner(self, key: str) -> _Section:
        value = self.values.get(key)
        return _Section({} if value is None else value, f"{self.place}.{key}")

    def flags(self) -> dict[str, Any]:
        known = ["is_remove_padding", "calibrate", "ln", "a_qconfig", "w_qconfig", "smooth_quant"]
        self.check_keys([*known, "high_precision_ops", *TENSOR_FLAGS])
        ln = self.inner("ln")
        ln.check_keys(["delay"])
        flags: dict[str, Any] = {
            "remove_padding": self.choice(
                "is_remove_padding", [True, False], REMOVE_PADDING and "a_qconfig" in self.values
            ),
            "gamma_migration": ln.choice("delay", [True, False], False),
            "calibration_samples": self.number("calibrate", int, CALIBRATE, "[1,inf)"),
        }
        if "high_precision_ops" in self.values:
            flags["high_precision_ops"] = ",".join(self.several("high_precision_ops", HIGH_PRECISION_OPS))
        flags |= {key: self.choice(key, [True, False], False) for key in TENSOR_FLAGS if key in self.values}
        for side in SIDES:
            flags |= self.inner(side).side(side)
        if self.values.get("smooth_quant") is False:
            flags["smooth_quant"] = False
        elif "smooth_quant" in self.values:
            flags |= {"smooth_quant": True, **self.inner("smooth_quant").smoothing()}
        return flags

    def side(self, side: str) -> dict[str, Any]:
        """Translate a_qconfig or w_qconfig, whichever `side` names."""
        names, default = SIDES[side], DEFAULTS[side]
        self.check_keys([*names, "ch_axis"])
        quantizer = self.choice("quantizer", QUANTIZERS, default["quantizer"])
        observer = self.choice("observer", OBSERVERS, default["observer"])
        axis = self.choice("ch_axis", [-1, 0], default["ch_axis"])
        symmetric = self.choice("symmetric", [True, False], default["symmetric"])
        if axis == 0 and observer.startswith("Avg"):
            given = "" if "observer" in self.values else ", the default,"
            raise UserError(
                f"{self.place}.ch_axis: 0 does not go with {observer}{given} which averages over batches; choices: -1, "
                "or an observer without Avg"
            )
        if quantizer == "LSQPlusFakeQuantize" and symmetric:
            given = "true" if "symmetric" in self.values else "true, the default,"
            raise UserError(
                f"{self.place}.symmetric: {given} leaves LSQPlusFakeQuantize no offset to learn; choices: false, or "
                "quantizer: LSQFakeQuantize"
            )
        flags = {
            names["quantizer"]: QUANTIZERS[quantizer],
            names["observer"]: OBSERVERS[observer],
            names["symmetric"]: symmetric,
            CHANNEL_FLAGS[side]: axis == 0,
        }
        if "bit" in self.values:
            try:
                flags[names["bit"]] = parse_format(_whole(self.values["bit"])).name
            except ValueError as error:
                raise UserError(f"{self.place}.bit: {error}") from None
        return flags

    def smoothing(self) -> dict[str, Any]:
        """Translate smooth_quant."""
        self.check_keys(["alpha", "auto_alpha_args"])
        alpha = self.values.get("alpha", 0.5)
        if alpha != "auto":
            if "auto_alpha_args" in self.values:
                raise UserError(f"{self.place}.auto_alpha_args needs alpha: auto, got alpha: {alpha!r}")
            if isinstance(alpha, str):
                raise UserError(f"{self.place}.alpha: unknown value {alpha!r}; choices: auto, a number in [0,1]")
            return {"smooth_quant_alpha": str(self.number("alpha", float, 0.5, "[0,1]"))}
        auto = self.inner("auto_alpha_args")
        auto.check_keys(AUTO_ALPHA)
        low, high = (auto.number(key, float, AUTO_ALPHA[key], "[0,1]") for key in ("alpha_min", "alpha_max"))
        if low > high:
            raise UserError(f"{auto.place}.alpha_min {low} is above alpha_max {high}")
        step = auto.number("alpha_step", float, AUTO_ALPHA["alpha_step"], "(0,1]")
        return {
            "smooth_quant_alpha": f"auto:{low}:{high}:{step}",
            "smooth_quant_criterion": auto.choice("shared_criterion", ["mean", "min", "max"], "mean"),
            "smooth_quant_samples": auto.number("n_samples", int, AUTO_ALPHA["n_samples"], "[1,inf)"),
        }


def _whole(bit: Any) -> Any:
    """Convert a whole float to int: some YAML writers put 6 as 6.0."""
    return int(bit) if isinstance(bit, float) and bit.is_integer() else bit


def alpha_settings(text: str) -> dict[str, Any]:
    """Parse `--smooth_quant_alpha` to fields of SmoothQuantConfig.

    Args:
        text: a number in [0, 1], auto, or auto:MIN:MAX:STEP.

    Raises:
        UserError: for anything else.
    """
    wrong = UserError(
        f"--smooth_quant_alpha {text!r}: choices: a number in [0, 1], auto, auto:MIN:MAX:STEP with 0 <= MIN <= MAX <= 1"
    )
    word, *numbers = text.split(":")
    try:
        values = [float(number) for number in (numbers if word == "auto" else [word])]
    except ValueError:
        raise wrong from None
    if word != "auto":
        if numbers or not 0 <= values[0] <= 1:
            raise wrong
        return {"alpha": values[0]}
    if not values:
        return {"alpha": "auto"}
    if len(values) != 3 or not 0 <= values[0] <= values[1] <= 1 or not values[2] > 0:
        raise wrong
    return {"alpha": "auto", **dict(zip(("alpha_min", "alpha_max", "alpha_step"), values, strict=True))}
