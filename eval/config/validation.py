"""Checks the values of the flags, one by one and against each other, without torch or network: it takes seconds."""

from __future__ import annotations

import os
import re
import tempfile
from collections.abc import Iterable
from dataclasses import fields
from pathlib import Path
from typing import NoReturn

from eval.config.architecture import check_architecture
from eval.config.channels import check_channel_groups
from eval.config.effects import check_effects
from eval.config.engine import check_engine
from eval.config.files import is_path
from eval.config.quant_yaml import TENSOR_FLAGS, alpha_settings
from eval.config.run_config import TUNE_FOLDER, RunConfig, name_of
from eval.config.suggestions import did_you_mean, local_folders
from eval.modeling.places import starting_model
from eval.run.tracking import check_tracking
from quant.cache_formats import parse_cache_formats
from quant.errors import UserError
from quant.formats import (
    FLOAT,
    BlockFormat,
    GroupFormat,
    MixedFormat,
    activation_format,
    parse_format,
    parse_search_space,
)
from quant.validation import HIGH_PRECISION_OPS

_POSITIVE = "(0, inf)"
_NOT_NEGATIVE = "[0, inf)"
_SHARE = "(0, 1)"
RANGES = {
    **dict.fromkeys(["num_train_epochs", "learning_rate", "rl_learning_rate", "cost_target"], _POSITIVE),
    **dict.fromkeys(["max_memory", "max_compute", "latency_target"], _POSITIVE),
    **dict.fromkeys(["train_batch_size", "eval_batch_size", "gradient_accumulation_steps", "eval_steps"], _POSITIVE),
    **dict.fromkeys(["log_steps", "max_train_samples", "max_eval_samples", "max_length", "image_size"], _POSITIVE),
    **dict.fromkeys(["max_target_length", "num_beams", "kv_cache_tokens"], _POSITIVE),
    **dict.fromkeys(["cost_seq_len", "reward_draws", "num_cpus", "cpus_per_trial", "hpo"], _POSITIVE),
    **dict.fromkeys(["cost_beta", "max_entropy_beta", "delay_steps", "num_gpus", "gpus_per_trial"], _NOT_NEGATIVE),
    "num_workers": _NOT_NEGATIVE,
    **dict.fromkeys(["act_range_percentile", "weight_range_percentile"], "[0, 100]"),
    "max_steps": "[-1, inf)",
    "seed": f"[0, {2**32})",
    "subset_ratio": "(0, 1]",
    "measure_share": "(0, 1]",
    "distill": "[0, 1]",
    "max_drop": _SHARE,
    "search_fraction": _SHARE,
    **dict.fromkeys(("calibration_samples", "rounding_samples", "sensitivity_examples"), _POSITIVE),
    "smooth_quant_samples": _POSITIVE,
    "settle_fraction": "[0, 1)",
}
"""flag -> the interval that its value must lie in"""
LISTS = (
    *("target_bits", "search_space", "include", "exclude", "high_precision_ops", "quantize_kv_cache"),
    *("width_choices", "kernel_choices", "depth_choices"),
)
"""flags that take a comma list; empty entries are refused"""


def validate(config: RunConfig) -> None:
    """Check a complete config.

    Raises:
        UserError: one line that names the flag, the value and the choices, for the first problem found.
    """
    _check_choices(config)
    _check_lists(config)
    _check_ranges(config)
    _check_names(config)
    _check_folders(config)
    _check_formats(config)
    _check_contradictions(config)
    check_effects(config)
    check_architecture(config)
    check_channel_groups(config)
    _check_offloading(config)
    _check_device(config)
    check_tracking(config)


def check_one_of(flag: str, value: str, choices: Iterable[str], besides: str = "", similar: Iterable[str] = ()) -> None:
    """Check that the value of a flag is one of its choices.

    Args:
        flag: the flag as the user types it.
        value: its value.
        choices: all valid values.
        besides: what else is valid; appended to the list of choices.
        similar: further names that may be suggested in place of `value`.

    Raises:
        UserError: lists the choices and suggests the closest name.
    """
    known = sorted(choices)
    if value not in known:
        hint = did_you_mean(value, [*known, *similar])
        raise UserError(f"unknown {flag} {value!r}; choices: {', '.join(known)}{besides}{hint}")


def check_can_be_made(flag: str, path: str | Path | None) -> None:
    """Raise UserError if an output folder can neither be created nor written to, before anything is trained."""
    if path is None:
        return
    standing = Path(path).expanduser().absolute()
    while not standing.exists() and standing != standing.parent:
        standing = standing.parent
    if not standing.is_dir():
        raise UserError(f"--{flag} {path}: {standing} is a file, no folder")
    try:
        tempfile.TemporaryFile(dir=standing).close()  # os.access misses read-only file systems
    except OSError as error:
        raise UserError(f"--{flag} {path}: cannot write in {standing}: {error.strerror}") from None


def check_inside(config: RunConfig) -> None:
    """Raise UserError if the run's folder, or one above it, is a symlink that leads out of --output_root_dir."""
    folder = config.experiment_folder
    for flag, path in (("--task", folder.parent), ("--exp_name", folder), ("--run_id", config.run_folder)):
        refuse_link(flag, path, config.output_root_dir)


def refuse_link(flag: str, folder: Path, root: str) -> None:
    """Raise UserError if `folder`, which `flag` names, resolves to a path outside of `root` (--output_root_dir)."""
    real = folder.resolve()
    if not real.is_relative_to(Path(root).resolve()):
        raise UserError(
            f"{flag} {folder.name}: {folder} is a link to {real}, out of --output_root_dir {root}: remove the link, "
            "or write there with --output_root_dir"
        )


def _refuse(first: str, second: str, why: str) -> NoReturn:
    raise UserError(f"{first} contradicts {second}: {why}")


def _check_choices(config: RunConfig) -> None:
    for entry in fields(RunConfig):
        value = getattr(config, entry.name)
        if value is not None and "choices" in entry.metadata:
            check_one_of(name_of(entry), value, entry.metadata["choices"])


def _check_lists(config: RunConfig) -> None:
    """Refuse empty entries: they are typing errors."""
    for name in LISTS:
        value = getattr(config, name)
        if value is not None and not all(item.strip() for item in value.split(",")):
            raise UserError(f"--{name} {value!r} has an empty entry")


def _check_ranges(config: RunConfig) -> None:
    for name, interval in RANGES.items():
        value = getattr(config, name)
        if value is None:
            continue
        low, high = (float(end) for end in interval[1:-1].split(","))
        above = value > low if interval[0] == "(" else value >= low
        below = value < high if interval[-1] == ")" else value <= high
        if not (above and below):  # also true for nan
            raise UserError(f"--{name} must lie in {interval}, got {value}")


def _check_names(config: RunConfig) -> None:
    # Imported late, so that a wrong number is refused before these modules load.
    from eval.models import MODELS, check_model
    from eval.tasks import TASKS

    if config.task is None:
        raise UserError(f"--task is missing; choices: {', '.join(sorted(TASKS))}, or a local folder")
    if config.task not in TASKS:
        if is_path(config.task):
            _check_exists("task", config.task, "folder")
        else:
            check_one_of("--task", config.task, TASKS, ", or a local folder", local_folders())
    if config.model is None:
        if starting_model(config) is not None:
            return  # a finished run names its model itself
        if config.load_model_path is not None:
            _refuse_start(config.load_model_path)
        if config.model_path is None:
            raise UserError(f"--model is missing; choices: {', '.join(sorted(MODELS))}, or --model_path FOLDER")
        if Path(config.model_path).is_file():
            raise UserError(f"--model_path {config.model_path} is one file: name its architecture with --model")
    elif config.model not in MODELS:
        if is_path(config.model):
            _check_exists("model", config.model, "folder")
        # Whether a Hub id (owner/name) or a model of a library exists is known only when it is loaded.
        elif not re.fullmatch(r"[\w.-]+/[\w.-]+|(timm|torchvision):[\w./-]+", config.model):
            besides = ", a Hub id (owner/name), a local folder, timm:NAME or torchvision:NAME"
            check_one_of("--model", config.model, MODELS, besides)
    elif config.task in TASKS:
        check_model(config.model, config.task)


def _refuse_start(path: str) -> NoReturn:
    """Raise UserError for a --load_model_path that is no finished run, given without --model."""
    _check_exists("load_model_path", path, "file or folder")
    folder = Path(path).expanduser()
    if folder.is_file():
        raise UserError(f"--load_model_path {path} is one file: name its architecture with --model")
    runs = sorted(record.parent.name for record in folder.glob("*/result.json"))
    inside = f"; runs in it: {', '.join(runs[:5])}{', ...' if len(runs) > 5 else ''}" if runs else ""
    raise UserError(
        f"--load_model_path {path}: is no finished run{inside}; beside bare weights, --model names the model"
    )


def _check_exists(flag: str, path: str | None, kind: str) -> None:
    if path is None:
        return
    found = Path(path).expanduser()
    if not (found.is_dir() if kind == "folder" else found.exists()):
        raise UserError(f"--{flag} {path}: no such {kind}")


def _check_folders(config: RunConfig) -> None:
    _check_exists("data_dir", config.data_dir, "folder")
    _check_exists("model_path", config.model_path, "file or folder")
    _check_exists("load_model_path", config.load_model_path, "file or folder")
    _check_exists("resume", config.resume, "folder")
    if config.resolve is not None:
        raise UserError(f"--resolve {config.resolve}: is for eval_run.py (mpq-run), with --target_bits")
    _check_exists("max_latency", config.max_latency, "file")
    check_can_be_made("output_root_dir", config.output_root_dir)
    check_can_be_made("save_model_path", config.save_model_path)
    check_can_be_made("log_dir", config.log_dir)
    for flag in ("exp_name", "run_id"):
        name = getattr(config, flag)
        if name is not None and (not re.fullmatch(r"[\w.+=@ -]{1,120}", name) or set(name) <= {".", " "}):
            raise UserError(f"--{flag} {name!r} must be the name of one folder: letters, digits and . _ - + = @")
    if config.run_id == TUNE_FOLDER:
        raise UserError(f"--run_id {config.run_id}: a launch keeps its own files there; choose another name")


def _check_formats(config: RunConfig) -> None:
    for flag in ("bits", "weight_bits", "activation_bits"):
        value = getattr(config, flag)
        if value is not None:
            try:
                format = parse_format(value)
            except ValueError as error:
                raise UserError(f"--{flag}: {error}") from None
            if isinstance(format, MixedFormat):
                raise UserError(f"--{flag} {value}: groups of output channels are for a search with --channel_groups")
    activation = parse_format(config.activation_bits or "float")
    if activation_format(activation) != activation:
        raise UserError(f"--activation_bits {activation}: groups are for weights; choose int8, e4m3, mxfp4 or float")
    try:
        formats = parse_search_space(config.search_space)
    except ValueError as error:
        raise UserError(f"--search_space: {error}") from None
    used = formats if config.chooses else config.uniform_formats[:1]
    groups = [format for format in used if isinstance(format, GroupFormat) and not format.zero_point]
    if groups and not config.weight_symmetric:
        raise UserError(f"--no_weight_symmetric: {groups[0]} is symmetric; u{groups[0]} has zero points")
    check_engine(config)
    if config.target_bits is not None:
        _check_target_bits(config)


def _check_target_bits(config: RunConfig) -> None:
    try:
        targets = config.target_list
    except (ValueError, TypeError):
        raise UserError(
            f"--target_bits {config.target_bits}: must be a number, several with commas, or a range LOW:HIGH:STEP"
        ) from None
    if len(set(targets)) < len(targets):
        raise UserError(f"--target_bits {config.target_bits} names one twice")
    low, high = min(config.charged_bits), max(config.charged_bits)
    where = "" if config.engine is None else f" in {config.engine}"
    reach = config.cost_scope == "searched" and config.architecture_space is None
    for target in targets if reach else ():  # a file has more in it than weights, a smaller model fewer
        if not low <= target <= high:
            raise UserError(
                f"--target_bits {target:g} is out of reach: "
                f"--search_space {config.search_space} costs {low:g} to {high:g} bits{where}"
            )


def _check_trained_scales(config: RunConfig) -> None:
    """Check that --train scales has scales to train."""
    if not config.chooses and config.uniform_formats == (FLOAT, FLOAT):
        return  # refused as a flag without effect
    if config.max_steps == 0:
        _refuse("--train scales", "--max_steps 0", "there is no step to train in")
    weights, activations = (config.weight_quantizer or config.quantizer), config.quantizer
    used = config.search_formats if config.chooses else config.uniform_formats
    weight_formats = used if config.chooses else used[:1]
    learned = weights != "fixed" and any(f.scaled for f in weight_formats)
    if not config.weight_only_search:
        inputs = [activation_format(f) for f in used] if config.chooses else used[1:]
        learned |= activations != "fixed" and not config.per_token and any(f.scaled for f in inputs)
    if not learned:
        names = ", ".join(f.name for f in used)
        raise UserError(f"--train scales: no scale is learned of {names} with --quantizer {config.quantizer}")


def _search_flag(config: RunConfig) -> str:
    """Return the flag that turned on the search."""
    return next((f"--{flag}" for flag in ("block_search", "single_decision") if getattr(config, flag)), "--search")


def _check_contradictions(config: RunConfig) -> None:
    given_bits = [f for f in ("bits", "weight_bits", "activation_bits") if getattr(config, f) is not None]
    if config.method == "search" or config.searches:
        if given_bits:
            _refuse(f"--{given_bits[0]} {getattr(config, given_bits[0])}", _search_flag(config), "drop one of them")
        if config.method in ("uniform", "float"):
            _refuse(f"--method {config.method}", _search_flag(config), "drop one of them")
        if config.block_search and config.single_decision:
            _refuse("--block_search", "--single_decision", "choose one")
        for flag in ("fuse_groups", "fuse_experts"):
            if getattr(config, flag) and config.single_decision:
                _refuse(f"--{flag}", "--single_decision", "all layers share one format already")
        if config.weight_only_search and config.separate_activations:
            _refuse("--weight_only_search", "--separate_activations", "there are no activation formats to separate")
        if config.max_steps == 0:
            _refuse("--max_steps 0", _search_flag(config), "there is no step to search in")
        if config.delay_steps is not None and 0 < config.max_steps <= config.delay_steps:
            raise UserError(f"--delay_steps {config.delay_steps} must be below --max_steps {config.max_steps}")
    if config.cost_target is not None and config.target_bits is not None:
        _refuse(f"--cost_target {config.cost_target:g}", f"--target_bits {config.target_bits}", "give one budget")
    if config.verify_retrain and (not config.chooses or config.max_steps == 0):
        raise UserError("--verify_retrain needs a run that chooses formats and trains them")
    if config.max_drop is not None:
        for flag in ("cost_target", "target_bits"):
            if getattr(config, flag) is not None:
                _refuse(
                    f"--max_drop {config.max_drop:g}", f"--{flag} {getattr(config, flag)}", "the drop sets the budget"
                )
        if config.method != "search":
            raise UserError(f"--max_drop {config.max_drop:g} needs --search")
        for flag, value in (("policy_prior", "none"), ("recipe", "fliqs")):
            if getattr(config, flag) == value:
                _refuse(f"--max_drop {config.max_drop:g}", f"--{flag} {value}", "it starts from a prior")
    if (config.max_latency is None) != (config.latency_target is None):
        lacking = "--latency_target" if config.latency_target is None else "--max_latency"
        raise UserError(
            f"{lacking} is missing: a latency limit is a table (--max_latency) and a sum (--latency_target)"
        )
    budgets = ("cost_target", "target_bits", "max_memory", "max_compute", "latency_target")
    if config.method == "uniform" and not given_bits and all(getattr(config, flag) is None for flag in budgets):
        raise UserError("--method uniform needs --bits or a budget (--target_bits, --cost_target)")
    if config.save_strategy == "best" and config.eval_steps is None:
        raise UserError("--save_strategy best needs --eval_steps: the best is known by evaluating")
    if config.method not in ("search", "uniform", "float", None) and given_bits:
        _refuse(f"--{given_bits[0]} {getattr(config, given_bits[0])}", f"--method {config.method}", "drop one of them")
    if config.method == "float" and given_bits:
        _refuse(f"--{given_bits[0]} {getattr(config, given_bits[0])}", "--method float", "drop one of them")
    if len(given_bits) > 1 and config.bits is not None:
        _refuse(f"--bits {config.bits}", f"--{given_bits[1]}", "--bits sets weights and activations")
    if config.method == "float" or given_bits:
        for flag in budgets:
            if getattr(config, flag) is not None:
                _refuse(f"--{flag} {getattr(config, flag)}", f"--method {config.method}", "nothing is searched")
        for flag in ("fuse_groups", "fuse_experts"):
            if getattr(config, flag):
                _refuse(f"--{flag}", f"--method {config.method}", "nothing is searched")
    if config.from_scratch and config.model_path is not None:
        _refuse("--from_scratch", f"--model_path {config.model_path}", "its weights would not be used")
    if config.act_range_percentile > 0 and config.observer not in (None, "minmax", "percentile"):
        given = f"--act_range_percentile {config.act_range_percentile:g}"
        _refuse(given, f"--observer {config.observer}", "choose one range")
    if config.train == "scales":
        _check_trained_scales(config)
    if config.distill and config.method == "float":
        _refuse(f"--distill {config.distill:g}", "--method float", "the float model would teach itself")
    if config.distill and config.from_scratch and config.load_model_path is None:
        _refuse(f"--distill {config.distill:g}", "--from_scratch", "an untrained model has nothing to teach")
    if config.cost_scope == "file" and config.quantize_embeddings:
        _refuse("--quantize_embeddings", "--cost_scope file", "embeddings are layers there, in formats of their own")
    _check_ptq(config)
    if config.fp16 and config.bf16:
        _refuse("--fp16", "--bf16", "choose one")


def _check_ptq(config: RunConfig) -> None:
    for flag in ("act_range_percentile", "weight_range_percentile"):
        if 0 < (value := getattr(config, flag)) <= 1:
            raise UserError(
                f"--{flag} {value:g} would clip all but the smallest values: percentiles lie in (1, 100]; did you mean "
                f"{100 * value:g}?"
            )
    for flag, symmetric in (("quantizer", "act_symmetric"), ("weight_quantizer", "weight_symmetric")):
        if getattr(config, flag) == "lsq_plus" and getattr(config, symmetric):
            way_out = "drop it" if symmetric == "act_symmetric" else "give --no_weight_symmetric"
            _refuse(f"--{flag} lsq_plus", f"--{symmetric}", f"it learns an offset; {way_out}, or take lsq")
    weights = config.search_formats if config.chooses else config.uniform_formats[:1]
    if config.rounding == "adaround" and (blocks := [f.name for f in weights if isinstance(f, BlockFormat)]):
        _refuse(
            "--rounding adaround", blocks[0], "its block scales follow from the rounded values; take gptq or nearest"
        )
    if config.act_per_channel:
        if config.per_token:
            _refuse("--act_per_channel", "--per_token", "choose one")
        if config.observer is not None and config.observer.startswith("avg_"):
            _refuse("--act_per_channel", f"--observer {config.observer}", "it averages over batches")
    own = config.weight_observer
    if own is not None and config.weight_range_percentile > 0:
        given = f"--weight_range_percentile {config.weight_range_percentile:g}"
        _refuse(given, f"--weight_observer {own}", "choose one range")
    if own is not None and own.startswith("avg_") and config.per_channel:
        _refuse(f"--weight_observer {own}", "--per_channel", "it averages over batches; choose one without avg_")
    if config.smooth_quant_alpha != "0.5" and not config.smooth_quant:
        _refuse(f"--smooth_quant_alpha {config.smooth_quant_alpha}", "no --smooth_quant", "give both or none")
    alpha_settings(config.smooth_quant_alpha)
    if config.quantize_kv_cache is not None:
        _check_caches(config, config.quantize_kv_cache)
    for op in filter(None, (config.high_precision_ops or "").split(",")):
        check_one_of("--high_precision_ops", op.strip(), HIGH_PRECISION_OPS)
    for flag in ("high_precision_ops", *TENSOR_FLAGS):
        if getattr(config, flag) and config.method == "float":
            _refuse(f"--{flag}", "--method float", "nothing is quantized")
    for flag in ("gamma_migration", "smooth_quant", "rotate"):
        if getattr(config, flag) and config.method == "float":
            _refuse(f"--{flag}", "--method float", "nothing is quantized")
        if flag != "rotate" and getattr(config, flag) and config.gradient_checkpointing:
            _refuse(f"--{flag}", "--gradient_checkpointing", "shortcuts cannot be computed again")


def _check_offloading(config: RunConfig) -> None:
    if config.offload_weights and config.max_steps != 0:
        _refuse("--offload_weights", f"--max_steps {config.max_steps}", "training needs its weights in memory")
    if config.offload_weights and config.device == "cuda":
        _refuse("--offload_weights", "--device cuda", "mapped files are read by the CPU")


def _check_caches(config: RunConfig, given: str) -> None:
    several = len(parse_cache_formats(given)) > 1
    if several and not config.chooses:
        raise UserError(f"--quantize_kv_cache {given}: several formats are a choice of a search; give one, or --search")
    for flag, value in (("method", config.method), ("policy_prior", config.policy_prior)):
        if several and value in ("hawq_v2", "qbert"):
            _refuse(f"--quantize_kv_cache {given}", f"--{flag} {value}", "it sees weights alone; give one format")


def _check_device(config: RunConfig) -> None:
    # The machines of a Ray cluster may have GPUs even if this one has none.
    gpu = gpu_count(config.cuda_visible_devices) > 0 or config.ray_address is not None
    if config.device == "cuda" and not gpu:
        raise UserError("--device cuda: no GPU found here; choices: auto, cpu")
    if config.fp16 and (config.device == "cpu" or not gpu):
        raise UserError("--fp16 needs a GPU; on a CPU use --bf16")


def gpu_count(visible: str | None = None) -> int:
    """Count the usable GPUs of this machine without importing torch.

    All AMD GPUs, or all GPUs under WSL, count as one.

    Args:
        visible: value of CUDA_VISIBLE_DEVICES; None reads the environment.
    """
    found = len(list(Path("/dev").glob("nvidia[0-9]*"))) or int(any(Path(d).exists() for d in ("/dev/kfd", "/dev/dxg")))
    visible = os.environ.get("CUDA_VISIBLE_DEVICES") if visible is None else visible
    if visible is None:
        return found
    return min(found, len([name for name in visible.split(",") if name.strip() not in ("", "-1")]))
