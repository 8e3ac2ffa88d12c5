"""One run, from flags to a result record: `python eval/eval_run.py --task digits --model convnet --search ...`.

load data and model -> quantize its layers -> cost and budget -> train (and search) -> evaluate once -> record
"""

from __future__ import annotations

import sys
from pathlib import Path

if __name__ == "__main__":  # started as a script, its own folder is on the path instead of the repository
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

import copy
import json
import logging
import math
import os
import platform
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from functools import partial
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

import yaml

from eval.flags import entry, parse, to_yaml
from eval.folder_lock import alone_in
from eval.limits import LIMIT_FLAGS, limits_of
from eval.run_config import GRID_FLAGS, RUN_FILE, RunConfig
from eval.tracking import tracked
from quant.errors import UserError
from quant.formats import FLOAT, Format

if TYPE_CHECKING:  # torch and the Trainer take seconds to import: wrong flags must not wait for them
    from cost.profile import LayerProfile
    from eval.eval_partitions import Blocks
    from eval.model_bundle import ModelBundle
    from eval.tasks import PreparedData, TaskData
    from policy.space import Partition, SearchSpace
    from quant.quant_module import QuantModule
    from trainer.reinforce_trainer import ReinforceTrainer
    from trainer.search import ReinforceConfig
    from trainer.teacher import Teacher

logger = logging.getLogger(__name__)

SCHEMA_VERSION = 1
PACKAGES = ("torch", "transformers", "datasets", "numpy")
COMPILE_ABOVE = 1e8
"""activation elements rounded over a whole CPU run, from which compiling the kernels (three seconds, once) pays"""
DYING = 5.0
"""seconds that the process of a run may still hold its folder when it is started again"""
MAY_DIFFER = {
    *GRID_FLAGS,
    *("task", "model_path", "data_dir", "load_model_path", "output_root_dir", "exp_name", "run_id", "config", "resume"),
    *("save_model_path", "save_strategy", "log_dir", "log_steps", "report_to", "quiet", "verify_retrain", "eval_steps"),
    *("eval_batch_size", "num_beams", "max_eval_samples", "num_workers", "device", "compile", "cuda_visible_devices"),
    *("num_cpus", "num_gpus", "cpus_per_trial", "gpus_per_trial", "ray_address", "dry_run", "asha", "hpo"),
}
"""flags that a run may be resumed with other values of: folders, which move, the machine, and what is told of it"""


@dataclass
class Plan:
    """What a run works on, after everything that can be wrong with it was checked and before anything is trained."""

    config: RunConfig
    data: TaskData
    bundle: ModelBundle
    prepared: PreparedData
    layers: list[str]
    profiles: list[LayerProfile]
    fused: Blocks = field(default_factory=dict)
    """with --fuse_groups: the finest partition that divides no fused group"""

    @property
    def compute_metrics(self) -> Any:
        """The Trainer's own metrics; None, the loss alone, where metrics need a split's texts: see `evaluate`."""
        own = self.prepared.judges or self.prepared.writer
        return None if own else self.data.compute_metrics

    @property
    def formats(self) -> tuple[Format, ...]:
        """The formats that layers may take, float left out."""
        config = self.config
        wanted = config.search_formats if config.chooses else config.uniform_formats
        return tuple(dict.fromkeys(format for format in wanted if format != FLOAT))


def make_plan(config: RunConfig) -> Plan:
    """Load data and model, find and profile the layers, check the budget. Raises UserError for anything wrong."""
    from cost.profile import profile_model
    from eval.coverage import searched_layers
    from eval.fused_groups import fused_groups
    from eval.models import build_model, recompute_activations
    from eval.tasks import load_task, prepare

    check_phases(config)
    data = load_task(config)
    corpus = data.corpus() if config.from_scratch and data.kind != "image" else None
    bundle = build_model(config, data.num_labels, corpus)
    if config.gradient_checkpointing:
        recompute_activations(bundle.model)
    if config.channels_last:
        import torch

        if data.kind != "image":
            raise UserError(f"--channels_last is for images, and --task {config.task} is {data.kind}")
        bundle.model.to(memory_format=torch.channels_last)  # convolutions pass it on to what they compute
    if config.load_model_path is not None:
        start_from(bundle, Path(config.load_model_path))
    if not bundle.trained:
        _refuse_untrained(config)
    prepared = prepare(data, bundle, config)
    layers = searched_layers(bundle.model, data.kind, config)
    profiles = profile_model(bundle.model, prepared.example_inputs, layers, charge_attention=config.charge_attention)
    plan = Plan(config, data, bundle, prepared, layers, profiles)
    if config.fuse_groups:
        plan.fused = fused_groups(bundle.model, layers, prepared.example_inputs)
    budget(plan)
    return plan


def check_phases(config: RunConfig) -> None:
    """UserError for a search that has no step to learn in."""
    from trainer.search import Phases

    if config.method == "search" and config.max_steps > 0:
        Phases.of(search_settings(config), config.max_steps)


def _refuse_untrained(config: RunConfig) -> None:
    """UserError for what only makes sense with a trained model: all of its weights, the head's included."""
    reasons = {"max_drop": "counts from what the float model scores", "distill": "has the float model teach"}
    for flag, why in reasons.items():
        if value := getattr(config, flag):
            raise UserError(
                f"--{flag} {value:g}: {why}, and this one's weights are not all trained: train it with --method float, "
                "then start from it with --load_model_path RUN"
            )


def start_from(bundle: ModelBundle, path: Path) -> None:
    """Copy the weights of --load_model_path: a safetensors file, or a folder with one (a run's, or its `model`).

    Ranges that a quantized run learned stay behind: they belong to its formats, this run finds its own.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    from eval.model_bundle import copy_tensors

    places = [path] if path.is_file() else [path / "model.safetensors", path / "model" / "model.safetensors"]
    file = next((place for place in places if place.is_file()), None)
    if file is None:
        raise UserError(f"--load_model_path {path}: holds no model.safetensors")
    try:
        tensors = {name: tensor for name, tensor in load_file(file).items() if "_quantizer." not in name}
    except SafetensorError as error:
        raise UserError(f"--load_model_path {file}: not readable as safetensors: {error}") from None
    # Weights now come from the file; what the builder had to say of its own is no longer true.
    bundle.notes = copy_tensors(bundle.model, tensors, str(file))
    bundle.trained = not bundle.notes


def budget(plan: Plan) -> float | None:
    """The run's target (its largest) in its cost's unit; None without one. UserError, with the range, if none fits it.

    So it does if no assignment meets the target and every limit together.
    """
    from cost.cost import UNITS
    from policy.allocators import MAX_EXHAUSTIVE
    from policy.budget import Budget
    from policy.solve import InfeasibleError
    from trainer.search import resolve_target

    config = plan.config
    if config.cost_target is None and config.target_bits is None:
        return None
    cost_type: Any = config.cost_type
    space, limits, own = search_space(plan), limits_of(config, plan.profiles), (cost_type, config.cost_target)
    # Without a target, a limit on the run's own cost has become it.
    flag = next((LIMIT_FLAGS[one.name] for one in limits if (one.name, one.value) == own), "--cost_target")
    targets = [
        resolve_target(space, plan.profiles, cost_type, config.cost_target, bits, flag)
        for bits in config.target_list or (None,)
    ]
    if config.method == "exhaustive" and (size := space.num_choices**space.num_decisions) > MAX_EXHAUSTIVE:
        raise UserError(f"--method exhaustive: {size:.3g} assignments are too many to try, at most {MAX_EXHAUSTIVE}")
    if limits:
        table = space.cost_table(plan.profiles, cost_type)
        try:
            Budget.of(space, table, targets[0], limits).solve(-table)
        except InfeasibleError as error:
            asked = [(flag if config.target_bits is None else "--target_bits", targets[0], UNITS[cost_type])]
            asked += [(LIMIT_FLAGS[limit.name], limit.value, limit.unit) for limit in limits]
            told = [
                f"{flag} {value:.4g} {unit} (reachable: {low:.4g} to {high:.4g}{', not even alone' * (value < low)})"
                for (flag, value, unit), (low, high) in zip(asked, error.ranges, strict=True)
            ]
            raise UserError(f"no assignment meets all limits: {', '.join(dict.fromkeys(told))}") from None
    return targets[-1]


def search_space(plan: Plan) -> SearchSpace:
    """What the flags let a search decide."""
    from policy.space import build_space

    config = plan.config
    return build_space(
        plan.layers, config.search_formats, partition(plan), config.weight_only_search, config.separate_activations
    )


def partition(plan: Plan) -> Partition:
    """Which layers share a decision, as the flags say."""
    from eval.eval_partitions import block_partition
    from eval.fused_groups import merge

    if plan.config.partition in ("role", "depth"):
        blocks = block_partition(plan.bundle.model, plan.layers, plan.config.partition)
        return merge(blocks, plan.fused.values())
    return plan.fused or plan.config.partition  # type: ignore[return-value]


def run(config: RunConfig, on_step: Callable[[dict[str, Any]], None] | None = None) -> dict[str, Any]:
    """Train, search and evaluate as `config` says; returns the record that stands in result.json.

    A run with checkpoints in its folder goes on from the last complete one. A diverged run ends in a record with
    status 'failed'. Raises UserError for wrong input, before anything is written.
    """
    started = time.monotonic()
    refuse_other_flags(config)
    plan = make_plan(config)
    with ExitStack() as held:
        if first_process():
            held.enter_context(alone_in(config.run_folder, "run", "--run_id", DYING))
            held.enter_context(tracked(config))
        return carry_out(plan, on_step, started)


def refuse_other_flags(config: RunConfig) -> None:
    """UserError where the run's folder holds checkpoints of other settings: its budget and schedule are in them."""
    written = config.run_folder / RUN_FILE
    if not written.exists() or last_checkpoint(config.run_folder / "checkpoints") is None:
        return
    before, now = (yaml.safe_load(text) for text in (written.read_text(), to_yaml(config)))
    for values in (before, now):  # of these the product counts: a batch that was too large has been halved
        values["train_batch_size"] *= values.pop("gradient_accumulation_steps")
    for name in sorted((before.keys() | now.keys()) - MAY_DIFFER):
        if before.get(name) != now.get(name):
            raise UserError(
                f"--{name} {now.get(name)}: {config.run_folder} holds checkpoints of a run with {before.get(name)}; "
                "give what it was started with to go on from there, or choose another --run_id"
            )


def carry_out(plan: Plan, on_step: Callable[[dict[str, Any]], None] | None, started: float) -> dict[str, Any]:
    """`run` of a plan, as it was `started` on the monotonic clock."""
    from trainer.checkpoint import write_atomically, write_json
    from trainer.reinforce_trainer import TrainingDiverged

    config, folder = plan.config, plan.config.run_folder
    if first_process():
        write_atomically(folder / RUN_FILE, lambda temporary: Path(temporary).write_text(to_yaml(config)))
    trainer, modules, float_metrics = make_trainer(plan, on_step)
    record = describe(plan)
    try:
        if config.max_steps == 0:
            trainer.prepare()
            trainer.finish()
        else:
            trainer.train(resume_from_checkpoint=last_checkpoint(folder / "checkpoints"))
        for turn, (bits, own_folder) in enumerate(config.smaller_targets.items()):
            own = config.updated(target_bits=f"{bits:g}", save_model_path=None)
            trainer.use(turn)
            complete = record | {"run_id": f"{config.run_name}-{own_folder.name}", "float_metrics": float_metrics}
            write_result(replace(plan, config=own), trainer, modules, complete, own_folder, started)
        if config.smaller_targets:
            trainer.use(len(config.smaller_targets))
        return write_result(plan, trainer, modules, record | {"float_metrics": float_metrics}, folder, started)
    except TrainingDiverged as error:
        record |= {"status": "failed", "reason": str(error), "wall_seconds": round(time.monotonic() - started, 1)}
        if first_process():
            write_json(folder / "result.json", record)
        return record


def write_result(
    plan: Plan,
    trainer: ReinforceTrainer,
    modules: dict[str, QuantModule],
    record: dict[str, Any],
    folder: Path,
    started: float,
) -> dict[str, Any]:
    """Evaluate the assignment that the model is in, and write all that `folder` keeps of it, the record last."""
    from cost.cost import assignment_to_json
    from trainer.checkpoint import write_atomically, write_json
    from trainer.reinforce_trainer import TrainingDiverged

    answers: dict[str, dict[str, list[int]]] = {}
    assignment = final_assignment(plan, trainer)
    metrics = evaluate(trainer, plan, answers)
    for split, values in metrics.items():
        for name, value in values.items():
            if not math.isfinite(value):
                raise TrainingDiverged(f"{name} on {split} is {value} after {trainer.state.global_step} steps")
    record = record | costs_of(plan, assignment)
    if plan.config.chooses:
        record["cost_target"] = trainer.cost_target
    if trainer.contest is not None:
        record["contest"] = trainer.contest
    record |= {
        "metrics": metrics,
        "assignment": assignment_to_json(assignment),
        "steps": trainer.state.global_step,
        "wall_seconds": round(time.monotonic() - started, 1),
    }
    if first_process():
        if folder != plan.config.run_folder:
            write_atomically(folder / RUN_FILE, lambda temporary: Path(temporary).write_text(to_yaml(plan.config)))
        write_json(folder / "assignment.json", record["assignment"])
        if answers:
            write_json(folder / "predictions.json", answers)
        save_result(plan, modules, assignment, folder / "model")
    if plan.config.verify_retrain:
        record["retrained"] = retrain(plan.config, assignment, folder)
    if first_process():
        write_json(folder / "result.json", record)
    return record


def retrain(
    config: RunConfig, assignment: dict[str, tuple[Format, Format]], folder: Path
) -> dict[str, dict[str, float]]:
    """Metrics of the assignment trained alone, from the float weights that the run started from, for as many steps.

    What the one-shot search is worth: near these, its weights need no retraining. Beside the record, in `retrained`.
    """
    alone = config.updated(run_id=f"{folder.relative_to(config.experiment_folder)}/retrained", save_model_path=None)
    plan = make_plan(alone)
    trainer, _, _ = make_trainer(plan, assignment=assignment)
    trainer.train(resume_from_checkpoint=last_checkpoint(alone.run_folder / "checkpoints"))
    return evaluate(trainer, plan)


def first_process() -> bool:
    """Whether this process writes: with torchrun, several work on one run, and all of them return its record."""
    return os.environ.get("RANK", "0") == "0"


def make_trainer(
    plan: Plan,
    on_step: Callable[[dict[str, Any]], None] | None = None,
    assignment: dict[str, tuple[Format, Format]] | None = None,
) -> tuple[ReinforceTrainer, dict[str, QuantModule], dict[str, Any] | None]:
    """The trainer of the run, its quantized layers, and what the float model scores where it comes trained.

    With an `assignment`, that is trained and nothing is chosen.
    """
    from transformers import PrinterCallback
    from transformers.trainer_utils import set_seed

    from eval.ptq import (
        clip_outlier_tokens,
        clips_tokens,
        migrate_outliers,
        place_around_layers,
        quantizer_configs,
    )
    from eval.tasks import hold_out, not_augmented
    from quant.convert import quantize_model
    from quant.quant_utils import use_compiled
    from trainer.reinforce_trainer import ReinforceTrainer

    config, prepared = plan.config, plan.prepared
    set_seed(config.seed)
    chooses = config.chooses and assignment is None
    train = prepared.train
    held_rows: list[int] = []
    if chooses and config.method == "search":
        held_rows = hold_out(train, config.search_fraction, config.seed)
    judged_on = not_augmented(train.select(held_rows) if held_rows else train) if chooses else None
    modules: dict[str, QuantModule] = {}
    teacher = float_teacher(plan)
    if plan.formats:
        weight, activation = quantizer_configs(config)
        modules = quantize_model(
            plan.bundle.model, include=plan.layers, formats=plan.formats, weight=weight, activation=activation
        )
    if plan.formats and not config.chooses:
        assignment = dict.fromkeys(plan.layers, config.uniform_formats)
    arguments = training_arguments(config)
    if config.save_strategy == "best":
        arguments.metric_for_best_model, arguments.greater_is_better = f"{next(iter(prepared.validation))}_loss", False
    use_compiled(compile_mode(plan, len(train) - len(held_rows)), arguments.device)
    trainer = ReinforceTrainer(
        plan.bundle.model,
        arguments,
        search=search_settings(config) if chooses else None,
        search_space=config.search_formats,
        partition=partition(plan) if chooses else "layer",
        weight_only_search=config.weight_only_search,
        separate_activations=config.separate_activations,
        assignment=assignment,
        modules=modules,
        profiles=plan.profiles,
        train_dataset=train,
        search_dataset=judged_on,
        search_rows=held_rows,
        limits=limits_of(config, plan.profiles) if chooses else (),
        teacher=teacher,
        eval_dataset=prepared.validation,
        data_collator=prepared.data_collator,
        compute_metrics=plan.compute_metrics,
        preprocess_logits_for_metrics=prepared.preprocess_logits,
        history=config.run_folder / "history.jsonl",
        on_step=on_step,
        calibration_samples=config.calibration_samples,
        after_calibration=partial(clip_outlier_tokens, plan) if plan.formats and clips_tokens(config) else None,
    )
    if config.quiet:
        trainer.remove_callback(PrinterCallback)
    migrate_outliers(plan, trainer)
    place_around_layers(plan, trainer)
    known = plan.bundle.trained and config.method != "float"
    return trainer, modules, evaluate(trainer, plan) if known else None


def float_teacher(plan: Plan) -> Teacher | None:
    """The float model as it comes, before its layers are replaced, where it teaches or a search judges by it."""
    from trainer.teacher import Teacher

    share, data = teacher_share(plan), plan.data
    knows = plan.bundle.trained and data.kind in ("image", "text") and not data.task.regression
    judges = knows and plan.config.method in ("search", "exhaustive") and search_settings(plan.config).contest
    return Teacher(copy.deepcopy(plan.bundle.model), share) if share or judges else None


def teacher_share(plan: Plan) -> float:
    """The share of the loss that the float model's answers have, in [0, 1]; 0: it does not teach.

    Where the flag leaves it open, it teaches where it helps: images that are cropped and mirrored, as it has not
    learned them by heart. On texts it gained nothing (benchmarks/RESULTS.md).
    """
    from trainer.teacher import SHARE

    config = plan.config
    if config.distill is not None:
        return config.distill
    unseen = plan.data.kind == "image" and plan.data.task.augmented and config.augment
    quantizes = config.method != "float" and config.recipe != "fliqs" and config.max_steps != 0
    return SHARE if unseen and quantizes and plan.bundle.trained else 0.0


def training_arguments(config: RunConfig) -> Any:
    """The flags as transformers' TrainingArguments."""
    import torch
    from transformers import TrainingArguments

    folder = config.run_folder
    os.environ["TENSORBOARD_LOGGING_DIR"] = str(Path(config.log_dir or folder / "tensorboard").absolute())
    return TrainingArguments(
        output_dir=str(folder / "checkpoints"),
        num_train_epochs=config.num_train_epochs,
        max_steps=config.max_steps,
        learning_rate=config.learning_rate,
        per_device_train_batch_size=config.train_batch_size,
        per_device_eval_batch_size=config.eval_batch_size,
        gradient_accumulation_steps=config.gradient_accumulation_steps,
        optim=config.optimizer,
        optim_args="momentum=0.9" if config.optimizer == "sgd" else None,
        seed=config.seed,
        data_seed=config.seed,
        fp16=config.fp16,
        bf16=config.bf16,
        eval_strategy="steps" if config.eval_steps else "no",
        eval_steps=config.eval_steps,
        logging_steps=config.log_steps,
        save_strategy=config.save_strategy,
        save_total_limit=1,
        report_to=config.report_to,
        use_cpu=config.device == "cpu" or not torch.cuda.is_available(),  # else the Trainer looks for a GPU's bfloat16
        ddp_find_unused_parameters=True,  # each format has scales of its own, of which a step uses one
        remove_unused_columns=False,
        dataloader_num_workers=config.num_workers,
        dataloader_pin_memory=torch.cuda.is_available() and config.device != "cpu",
        disable_tqdm=config.quiet or not sys.stderr.isatty(),
    )


def search_settings(config: RunConfig) -> ReinforceConfig:
    """The search flags as the trainer's configuration; what a flag leaves open, the recipe decides."""
    from dataclasses import fields

    from trainer.search import ReinforceConfig

    names = {field.name for field in fields(ReinforceConfig)}
    given = {name: getattr(config, name) for name in names if getattr(config, name, None) is not None}
    if config.target_list:
        given["target_bits"] = config.target_list if len(config.target_list) > 1 else config.target_list[0]
    return ReinforceConfig.fliqs(**given) if config.recipe == "fliqs" else ReinforceConfig(**given)


def compile_mode(plan: Plan, examples: int) -> Any:
    """'auto' compiles where the run is long enough to win back the time that compiling takes."""
    config = plan.config
    if config.compile != "auto" or not plan.formats:
        return config.compile if plan.formats else "off"
    batches = -(-examples // (config.train_batch_size * config.gradient_accumulation_steps))
    steps = config.max_steps if config.max_steps >= 0 else config.num_train_epochs * batches
    elements = sum(p.positions * p.channels for p in plan.profiles) * config.train_batch_size
    return "auto" if elements * steps > COMPILE_ABOVE else "off"


def last_checkpoint(folder: Path) -> str | None:
    """The newest complete checkpoint: the Trainer writes its own state last."""
    complete = [path.parent for path in folder.glob("checkpoint-*/trainer_state.json")]
    return str(max(complete, key=lambda path: int(path.name.rpartition("-")[2]))) if complete else None


def final_assignment(plan: Plan, trainer: ReinforceTrainer) -> dict[str, tuple[Format, Format]]:
    """What the layers run in at the end; float where nothing else was asked for."""
    return trainer.assignment or dict.fromkeys(plan.layers, (FLOAT, FLOAT))


def evaluate(
    trainer: ReinforceTrainer, plan: Plan, answers: dict[str, dict[str, list[int]]] | None = None
) -> dict[str, dict[str, float]]:
    """Metrics of every labelled evaluation split, by split: the task's own, 'loss' and 'n' (examples).

    Where there are classes, `answers` gets each split's 'predicted' and 'label', one number an example in its order:
    two runs can then be compared example by example.
    """
    from quant.convert import weights_kept

    metrics = {}
    judge = trainer.compute_metrics
    for name, split in plan.prepared.validation.items():
        if name in plan.prepared.judges:
            trainer.compute_metrics = plan.prepared.judges[name]
        elif judge is not None and answers is not None:
            trainer.compute_metrics = lambda seen, name=name: _noting(seen, name, answers) or judge(seen)  # type: ignore
        told = trainer.evaluate(split, metric_key_prefix=name)
        own = {key.removeprefix(f"{name}_"): value for key, value in told.items() if key.startswith(f"{name}_")}
        kept = {key: value for key, value in own.items() if not key.endswith(("runtime", "per_second", "time"))}
        if plan.prepared.writer is not None:
            with weights_kept(trainer.modules):
                kept |= plan.prepared.writer(name, trainer.model, trainer.batches_of(split))
        metrics[name] = {**kept, "n": len(plan.data.validation[name] if name in plan.prepared.judges else split)}
    trainer.compute_metrics = judge
    return metrics


def _noting(seen: Any, name: str, answers: dict[str, dict[str, list[int]]]) -> None:
    """Note the answers of a split with classes: logits (examples, classes) and whole-numbered labels (examples,)."""
    logits = seen.predictions[0] if isinstance(seen.predictions, tuple) else seen.predictions
    labels = seen.label_ids
    if getattr(logits, "ndim", 0) == 2 and getattr(labels, "ndim", 0) == 1 and labels.dtype.kind in "iu":
        answers[name] = {"predicted": logits.argmax(1).tolist(), "label": labels.tolist()}


def describe(plan: Plan) -> dict[str, Any]:
    """The part of the record that is known before training."""
    config = plan.config
    return {
        "schema_version": SCHEMA_VERSION,
        "status": "finished",
        "reason": None,
        "task": config.task_name,
        "model": config.model_name,
        "method": config.method,
        "seed": config.seed,
        "run_id": config.run_name,
        "cost_type": config.cost_type,
        "cost_target": budget(plan),
        "metric": plan.data.metric,
        "search_space": [f.name for f in config.search_formats] if config.chooses else None,
        "decisions": {d.name: list(d.layers) for d in search_space(plan).decisions} if config.chooses else None,
        "distill": teacher_share(plan),
        "layers": [{"name": p.name, "macs": p.macs, "params": p.params} for p in plan.profiles],
        "versions": {"python": platform.python_version(), **{name: version(name) for name in PACKAGES}},
        "commit": commit(),
        "device": device_name(config),
        "notes": [*plan.data.notes, *plan.bundle.notes, *plan.prepared.notes, *layer_notes(plan)],
    }


def costs_of(plan: Plan, assignment: dict[str, tuple[Format, Format]]) -> dict[str, Any]:
    """Cost of the assignment, and the range that assignments of the search space have."""
    from cost.cost import COSTS, UNITS, overhead_memory, unsearched_memory
    from policy.space import build_space

    config = plan.config
    cost_type: Any = config.cost_type
    costs = {name: cost(plan.profiles, assignment) for name, cost in COSTS.items()}
    overhead = overhead_memory(plan.profiles, assignment, config.per_channel)
    unsearched = unsearched_memory(plan.bundle.model, plan.layers)
    space = build_space(
        plan.layers, config.search_formats, "layer", config.weight_only_search, config.separate_activations
    )
    return {
        "cost": costs[cost_type],
        "cost_unit": UNITS[cost_type],
        "cost_range": list(space.cost_range(plan.profiles, cost_type)),
        "limits": [
            {"name": limit.name, "unit": limit.unit, "limit": limit.value, "value": limit.total(assignment)}
            for limit in (limits_of(config, plan.profiles) if config.chooses else ())
        ],
        "costs": {
            **costs,
            "overhead": overhead,
            "unsearched": unsearched,
            "total": costs["memory"] + overhead + unsearched,
        },
    }


def layer_notes(plan: Plan) -> list[str]:
    """What a reader of the cost must know: weights that no layer call reaches, layers that were never called."""
    from quant.convert import hidden_weights, other_weights

    notes = []
    if others := other_weights(plan.bundle.model):
        notes.append(f"{len(others)} layers are of kinds that stay in float: {', '.join(list(others)[:3])}")
    if hidden := hidden_weights(plan.bundle.model):
        notes.append(f"{len(hidden)} weights inside nn.MultiheadAttention stay in float: {', '.join(hidden[:3])} ...")
    if idle := [p.name for p in plan.profiles if not p.calls]:
        notes.append(f"{len(idle)} layers are never called and cost no compute: {', '.join(idle[:3])}")
    return notes


def save_result(
    plan: Plan, modules: dict[str, QuantModule], assignment: dict[str, tuple[Format, Format]], own: Path
) -> None:
    """The trained model, where a run keeps it and where --save_model_path wants it as well."""
    from eval.saved_model import save_model

    folders: Sequence[str | Path | None] = (own, plan.config.save_model_path)
    for folder in folders:
        if folder is not None:
            save_model(Path(folder), plan.config, plan.bundle, modules, assignment, plan.data.num_labels)


def commit() -> str | None:
    """The revision of this code, None outside a git checkout."""
    root = Path(__file__).resolve().parent.parent
    if not (root / ".git").exists():
        return None
    asked = subprocess.run(["git", "rev-parse", "HEAD"], cwd=root, capture_output=True, text=True, check=False)
    return asked.stdout.strip() or None


def device_name(config: RunConfig) -> str:
    """'cuda: its name', or 'cpu: threads'."""
    import torch

    if config.device != "cpu" and torch.cuda.is_available():
        return f"cuda: {torch.cuda.get_device_name()}"
    return f"cpu: {torch.get_num_threads()} threads"


def main(argv: list[str]) -> int:
    """Run what the flags say and print where the record is. `torchrun` shares one run among several GPUs."""
    config = parse(argv)
    if config.cuda_visible_devices is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = config.cuda_visible_devices
    quiet = config.quiet or not first_process()
    logging.basicConfig(level=logging.WARNING if quiet else logging.INFO, format="%(message)s")
    result = config.run_folder / "result.json"
    if result.exists():
        raise UserError(f"--run_id {config.run_name}: {result} exists already; choose another --exp_name or --run_id")
    record = run(config)
    if not first_process():
        return 0
    if record["status"] != "finished":
        print(f"failed: {record['reason']}", file=sys.stderr)
        return 1
    for folder in [*config.smaller_targets.values(), config.run_folder]:
        path = folder / "result.json"
        print("\n".join([*outcome(json.loads(path.read_text())), f"record: {path}"]))
    return 0


def outcome(record: Mapping[str, Any]) -> list[str]:
    """What a finished run has reached, in lines: metrics, cost, and whether what was asked for was kept."""
    lines = [
        f"{split}: " + "  ".join(f"{name} {value:.5g}" for name, value in metrics.items())
        for split, metrics in record["metrics"].items()
    ]
    contest = record.get("contest") or {}
    found = record["cost_target"] is None or "max_drop" in contest  # then the target is what was found, not asked for
    target = "" if found else f" (target {record['cost_target']:.6g})"
    lines.append(f"cost: {record['cost']:.6g} {record['cost_unit']}{target}")
    for limit in record["limits"]:
        lines.append(f"{limit['name']}: {limit['value']:.6g} {limit['unit']} (limit {limit['limit']:.6g})")
    if "max_drop" in contest:
        kept = "within" if contest["within_drop"] else "NOT within"
        quality, of_float, drop = contest["held_out_quality"], contest["float_quality"], contest["max_drop"]
        lines.append(f"held-out quality: {quality:.5f} when chosen, float {of_float:.5f}: {kept} {drop:g}")
    return lines


if __name__ == "__main__":
    entry(main)
