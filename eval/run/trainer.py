"""Builds the trainer of a run from its plan and its flags, and evaluates the model."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from eval.config.run_config import RunConfig
from eval.run.chosen_architecture import extracted
from eval.run.engine import storage_of
from eval.run.limits import limits_of
from eval.run.plan import Plan, count_steps, partition, search_settings
from eval.run.sensitivities import keep_sensitivities
from quant.formats import Format

if TYPE_CHECKING:  # importing torch and the Trainer takes seconds; flags are checked without them
    from transformers import TrainerCallback

    from eval.run.progress import RunProgress
    from quant.quant_module import QuantModule
    from trainer.reinforce_trainer import ReinforceTrainer
    from trainer.training.distillation import Teacher

COMPILE_ABOVE = 1e8
"""Elements rounded in a whole CPU run (activations; without training weights) above which --compile auto compiles the
kernels, which costs 3 s."""
SAVE_INTERVAL = 0.1
"""Default of the Trainer's `save_steps`, which reads values below 1 as a share of the run's steps."""


def make_trainer(
    plan: Plan,
    on_step: Callable[[dict[str, Any]], None] | None = None,
    assignment: dict[str, tuple[Format, Format]] | None = None,
    progress: RunProgress | None = None,
    structure: Sequence[int] | None = None,
) -> tuple[ReinforceTrainer, dict[str, QuantModule], dict[str, Any] | None]:
    """Build the trainer of a run.

    Args:
        plan: Plan of the run.
        on_step: Called with each step's entry of history.jsonl.
        assignment: Layer name -> (weight format, activation format). Trains it without a search.
        progress: Shows the progress and the logged values.
        structure: With `assignment`: the architecture to train, one index per decision of the plan's elastic model.

    Returns:
        The trainer; its quantized layers by name; the metrics of the float model, or None if its weights are not
        trained or the run itself is in float.
    """
    from transformers import PrinterCallback
    from transformers.trainer_utils import set_seed

    from eval.data.dataset import not_augmented
    from eval.run.ptq import (
        clip_outlier_tokens,
        clips_tokens,
        migrate_outliers,
        place_around_layers,
        quantize_caches,
        quantizer_configs,
        weight_rounding,
    )
    from quant.channel_groups import split_channels
    from quant.convert import quantize_model
    from quant.quant_cache import as_layer
    from quant.quant_utils import use_compiled
    from quant.transforms.placement import add_cache
    from trainer.reinforce_trainer import ReinforceTrainer
    from trainer.training.sampler import hold_out
    from trainer.training.scale_groups import freeze_weights

    config, prepared = plan.config, plan.prepared
    set_seed(config.seed)
    chooses = config.chooses and assignment is None
    train = prepared.train
    held_out_rows: list[int] = []
    if chooses and config.method == "search":
        held_out_rows = hold_out(train, config.search_fraction, config.seed)
    search_dataset = not_augmented(train.select(held_out_rows) if held_out_rows else train) if chooses else None
    modules: dict[str, QuantModule] = {}
    teacher = float_teacher(plan)
    if structure is not None:
        plan = extracted(plan, structure)
    if plan.formats:
        weight, activation = quantizer_configs(config)
        modules = quantize_model(
            plan.bundle.model, include=plan.layers, formats=plan.formats, weight=weight, activation=activation
        )
        if config.channel_groups > 1:
            split_channels(modules, config.channel_groups)
        if config.train == "scales":
            freeze_weights(plan.bundle.model)
    caches = {name: as_layer(add_cache(plan.bundle.model, name)) for name in plan.cache_choices}
    if plan.formats and not config.chooses:
        assignment = dict.fromkeys(plan.layers, config.uniform_formats)
        if (stores := storage_of(plan.bundle.model, plan.layers, config)) is not None:
            assignment = {name: stores(name, pair) or pair for name, pair in assignment.items()}
    arguments = training_arguments(config)
    if config.save_strategy == "best":
        arguments.metric_for_best_model, arguments.greater_is_better = f"{next(iter(prepared.validation))}_loss", False
    use_compiled(compile_mode(plan, len(train) - len(held_out_rows)), arguments.device)
    trainer = ReinforceTrainer(
        plan.bundle.model,
        arguments,
        search=search_settings(config) if chooses else None,
        search_space=config.search_formats,
        partition=partition(plan) if chooses else "layer",
        weight_only_search=config.weight_only_search,
        separate_activations=config.separate_activations,
        assignment=assignment,
        modules=modules | caches,
        caches=plan.cache_choices,
        profiles=plan.profiles,
        train_dataset=train,
        search_dataset=search_dataset,
        search_rows=held_out_rows,
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
        rounding=weight_rounding(config),
        architecture=plan.architecture if chooses else None,
        on_progress=progress,
    )
    if chooses and trainer.is_world_process_zero():
        trainer.searches.after_measuring = partial(keep_sensitivities, config.run_folder, trainer.space)
    trainer.remove_callback(PrinterCallback)
    if progress is not None:
        trainer.add_callback(progress_callback(progress))
    migrate_outliers(plan, trainer)
    place_around_layers(plan, trainer)
    has_baseline = plan.bundle.trained and (config.method != "float" or bool(plan.caches))
    float_metrics = evaluate(trainer, plan) if has_baseline else None
    quantize_caches(plan, trainer)
    return trainer, modules, float_metrics


def progress_callback(progress: RunProgress) -> TrainerCallback:
    """Make a callback that passes the values that the Trainer logs to `progress`."""
    from transformers import TrainerCallback

    class ProgressCallback(TrainerCallback):
        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **others: Any) -> None:
            if state.is_world_process_zero:
                progress.log(logs or {})

    return ProgressCallback()


def float_teacher(plan: Plan) -> Teacher | None:
    """Copy the float model, before its layers are replaced, if it is needed for distillation or for the search.

    If scales alone are trained, the copy shares the weights, unless these are about to change.
    """
    from eval.run.ptq import changes_weights
    from trainer.training.distillation import Teacher

    share, data, config = teacher_share(plan), plan.data, plan.config
    answers = plan.bundle.trained and data.kind in ("image", "text", "lm") and not data.task.regression
    compares = answers and config.method in ("search", "exhaustive") and search_settings(config).contest
    if not (share or compares):
        return None
    model = plan.bundle.model
    keeps = config.train == "scales" and not changes_weights(config)
    shared: dict[int, Any] = {id(parameter): parameter for parameter in model.parameters()} if keeps else {}
    return Teacher(copy.deepcopy(model, shared), share)


def teacher_share(plan: Plan) -> float:
    """Return the weight of the distillation loss in [0, 1]; 0 disables distillation.

    By default, only tasks with augmented images are distilled: the teacher has not memorized randomly cropped and
    mirrored images. For texts, distillation had no benefit (benchmarks/RESULTS.md).
    """
    from trainer.training.distillation import SHARE

    config = plan.config
    if config.distill is not None:
        return config.distill
    augmented = plan.data.kind == "image" and plan.data.task.augmented and config.augment
    quantizes = config.method != "float" and config.recipe != "fliqs" and config.max_steps != 0
    return SHARE if augmented and quantizes and plan.bundle.trained else 0.0


def training_arguments(config: RunConfig) -> Any:
    """Convert the flags to TrainingArguments of transformers."""
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
        save_steps=config.eval_steps or SAVE_INTERVAL,
        save_total_limit=2,  # the older one is a fallback if the newer is damaged
        report_to=config.report_to,
        use_cpu=config.device == "cpu"
        or config.offload_weights
        or not torch.cuda.is_available(),  # else the Trainer checks a GPU for bfloat16 support
        ddp_find_unused_parameters=True,  # a step uses only the scales of the sampled formats
        remove_unused_columns=False,
        dataloader_num_workers=config.num_workers,
        dataloader_pin_memory=torch.cuda.is_available() and config.device != "cpu",
        disable_tqdm=True,  # `eval.run.progress` shows the progress instead
    )


def compile_mode(plan: Plan, examples: int) -> Any:
    """Resolve --compile: 'auto' compiles if the run is long enough to regain the time for compilation.

    Without training, the weights are what is rounded: once in each format, and for the evaluation.
    """
    config = plan.config
    if config.compile != "auto" or not plan.formats:
        return config.compile if plan.formats else "off"
    if config.max_steps == 0:
        rounded = sum(p.params for p in plan.profiles) * (1 + len(plan.formats))
    else:
        elements = sum(p.positions * p.channels for p in plan.profiles if p.kind != "embedding")
        rounded = elements * config.train_batch_size * count_steps(config, examples)
    return "auto" if rounded > COMPILE_ABOVE else "off"


def evaluate(
    trainer: ReinforceTrainer, plan: Plan, answers: dict[str, dict[str, list[Any]]] | None = None
) -> dict[str, dict[str, float]]:
    """Evaluate the model on every labelled evaluation split.

    Args:
        trainer: Trainer of the run.
        plan: Plan of the run.
        answers: For classification, receives 'predicted' and 'label' of each split, one class index per example in the
            order of the split, and 'classes', their names. Two runs can then be compared example by example.

    Returns:
        Split -> metrics of the task, 'loss', and 'n', the number of examples.
    """
    from quant.convert import rounded_weights_cached
    from trainer.training.progress import counted

    metrics = {}
    compute_metrics = trainer.compute_metrics
    for name, split in plan.prepared.validation.items():
        if name in plan.prepared.split_metrics:
            trainer.compute_metrics = plan.prepared.split_metrics[name]
        elif compute_metrics is not None and answers is not None:
            trainer.compute_metrics = partial(_compute_and_record, compute_metrics, plan, name, answers)
        prefixed = trainer.evaluate(split, metric_key_prefix=name)
        own = {key.removeprefix(f"{name}_"): value for key, value in prefixed.items() if key.startswith(f"{name}_")}
        kept = {key: value for key, value in own.items() if not key.endswith(("runtime", "per_second", "time"))}
        if plan.prepared.writer is not None:
            with rounded_weights_cached(trainer.modules):
                size = -(-len(split) // trainer.args.per_device_eval_batch_size)
                batches = counted(trainer.batches_of(split), size, f"writing answers for {name}", trainer.tell)
                kept |= plan.prepared.writer(name, trainer.model, batches)
        metrics[name] = {**kept, "n": len(plan.data.validation[name] if name in plan.prepared.split_metrics else split)}
    trainer.compute_metrics = compute_metrics
    return metrics


def _compute_and_record(
    compute_metrics: Callable[[Any], dict[str, float]],
    plan: Plan,
    name: str,
    answers: dict[str, dict[str, list[Any]]],
    prediction: Any,
) -> dict[str, float]:
    """Compute the metrics of split `name`, and add its predicted classes and labels to `answers`.

    Only for classification: logits of shape (examples, classes) and integer labels of shape (examples,).
    """
    logits = prediction.predictions[0] if isinstance(prediction.predictions, tuple) else prediction.predictions
    labels = prediction.label_ids
    if getattr(logits, "ndim", 0) == 2 and getattr(labels, "ndim", 0) == 1 and labels.dtype.kind in "iu":
        answers[name] = {"predicted": logits.argmax(1).tolist(), "label": labels.tolist()}
        answers[name]["classes"] = list(plan.data.label_names)
    return compute_metrics(prediction)
