"""NLPTrainer: transformers' Trainer with `quantize`, which searches a quantized model that keeps its accuracy."""

from __future__ import annotations

import copy
import logging
import math
from collections.abc import Sequence
from dataclasses import replace
from glob import escape
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import Trainer, TrainerCallback
from transformers.trainer_callback import ExportableState

from cost.cost import compute_cost, memory_cost
from cost.profile import profile_model
from quant.analysis.tied import tied_layers
from quant.convert import calibrate, find_layers, get_formats, quantize_model, set_formats
from quant.errors import UserError
from quant.formats import FLOAT, Format, IntFormat
from quant.quant_module import QuantModule
from quant.quantizers.quantizer import QuantizerConfig
from quant.transforms.graph import find_groups
from quant.transforms.migration import SmoothQuantConfig, fold, sound_groups
from quant.transforms.token_clipping import output_loss, outputs
from quant.transforms.unfold import unfold
from trainer.reinforce_trainer import ReinforceTrainer, TrainingDiverged
from trainer.training.batches import streams
from trainer.training.checkpoint import save_weights
from trainer.training.quantization_file import write_companions, write_quantization
from trainer.tuning import metrics, objectives
from trainer.tuning.strategy import (
    PLAIN,
    RECIPES,
    Measured,
    QuantizationConfig,
    Recipe,
    Setting,
    Trial,
    check_metrics,
    tune,
)

__all__ = ["NLPTrainer", "QuantizationConfig", "metrics", "objectives"]

logger = logging.getLogger(__name__)

INT8, INT16 = IntFormat(8), IntFormat(16)
TRIALS = "trials"
"""Sub-folder of the output folder for the files of quantization-aware training."""


class NLPTrainer(Trainer):
    """A Trainer that quantizes its model: `model = trainer.quantize(QuantizationConfig(...))`.

    The quantized model becomes the trainer's model: `save_model` writes it, `eval.saved_model.load_model` reads it.
    """

    model: Any
    quantized: tuple[dict[str, QuantModule], dict[str, tuple[Format, Format]]] | None = None
    """Layers and formats of the quantized model; None before `quantize`."""

    def __init__(self, *arguments: Any, **keywords: Any) -> None:
        super().__init__(*arguments, **keywords)
        # Read here, because later the Trainer stores its own optimizer in the same attributes.
        self._has_optimizers = self.optimizer is not None or self.lr_scheduler is not None

    def quantize(self, quant_config: QuantizationConfig, exclude: Sequence[str] | None = None) -> nn.Module | None:
        """Find the best quantized model whose metrics are accepted.

        Args:
            quant_config: what to accept and what to try.
            exclude: globs over names of layers to leave in float; None: none.

        Returns:
            The model in eval mode; None if none is accepted, in which case the trainer keeps the float model.

        Raises:
            UserError: if the evaluation does not return a metric, there is no data to calibrate on, or the approach
                trains and cannot (a stream of data, optimizers for the parameters of another model).
        """
        batches = self._samples(quant_config.sampling_size)
        if quant_config.approach == "QuantizationAwareTraining":
            self._check_training()
        original = unfold(self.model)
        base = self.evaluate()
        check_metrics(quant_config.required, base)
        layers = find_layers(original, exclude=exclude)
        profiles = profile_model(original, batches[0], list(layers))
        kept: dict[Setting, tuple[nn.Module, Any]] = {}
        latest: list[Any] = []

        def evaluate(setting: Setting) -> Measured:
            model = copy.deepcopy(original)
            try:
                modules, assignment = self._quantized(model, setting, layers, batches)
                self.model = self.model_wrapped = model
                measured = self.evaluate()
            except TrainingDiverged as error:  # other trials may not diverge
                logger.warning(f"{setting}: {error}")
                return Measured({metric.name: math.nan for metric in quant_config.required})
            finally:
                self.model = self.model_wrapped = original
            latest[:] = [(model, (modules, assignment))]
            costs = {"performance": compute_cost(profiles, assignment), "modelsize": memory_cost(profiles, assignment)}
            return Measured(measured, costs)

        def keep(trial: Trial) -> None:
            if trial.accepted:
                kept[trial.setting] = latest[0][0].to("cpu"), latest[0][1]

        best, trials = tune(
            evaluate,
            base,
            {name: type(layer).__name__ for name, layer in layers.items()},
            quant_config,
            recipes=self._recipes(original, layers, batches),
            rank=lambda setting: self._ranked(original, setting, layers, batches),
            on_trial=keep,
        )
        logger.info(f"{len(trials)} trials, accepted: {'none' if best is None else best.setting}")
        if best is None:
            return None
        self.model, self.quantized = kept[best.setting]
        self.model = self.model_wrapped = self.model.to(self.args.device).eval()
        return self.model

    def _samples(self, size: int) -> list[Any]:
        """Return the first `size` training examples in evaluation batches. Raises UserError if there are none."""
        dataset: Any = () if self.train_dataset is None else self.train_dataset
        rows = list(islice(dataset, size)) if streams(dataset) else [dataset[i] for i in range(min(size, len(dataset)))]
        if not rows:
            raise UserError("the calibration set is empty: NLPTrainer needs a train_dataset to quantize")
        step = self.args.per_device_eval_batch_size
        collate = self._get_collator_with_removed_columns(self.data_collator)
        return [self._prepare_inputs(collate(rows[start : start + step])) for start in range(0, len(rows), step)]

    def _check_training(self) -> None:
        """Raise UserError for arguments that allow a float training, but not the training of quantized copies."""
        if streams(self.train_dataset):
            raise UserError(
                "QuantizationAwareTraining needs a train_dataset with a length and rows by index, "
                f"got {type(self.train_dataset).__name__}"
            )
        if self._has_optimizers:
            raise UserError(
                "QuantizationAwareTraining trains copies of the model, and `optimizers` hold the parameters of one: "
                "give NLPTrainer optimizer_cls_and_kwargs, or name the optimizer in its arguments"
            )

    def _recipes(self, model: nn.Module, layers: Any, batches: Sequence[Any]) -> list[Recipe]:
        """Return the recipes the model supports: Gamma Migration needs a norm whose readers can absorb its gamma."""
        groups = [group.only(list(layers)) for group in find_groups(model, batches[0])]
        groups = [group for group in groups if group.consumers and group.has_gamma]
        migrates = bool(groups) and bool(sound_groups(model, batches[0], groups))
        return [recipe for recipe in RECIPES if migrates or not recipe.gamma_migration]

    def _quantized(
        self,
        model: nn.Module,
        setting: Setting,
        layers: dict[str, nn.Module],
        batches: Sequence[Any],
    ) -> tuple[dict[str, QuantModule], dict[str, tuple[Format, Format]]]:
        """Quantize the model in place, and train it if the setting says so."""
        recipe, training = setting.recipe, setting.approach == "QuantizationAwareTraining"
        if recipe != PLAIN:
            smooth = None if recipe.smooth_quant is None else SmoothQuantConfig(alpha=recipe.smooth_quant)
            fold(model, batches[0], lambda: batches, list(layers), gamma=recipe.gamma_migration, smooth=smooth)
        ranges: Any = "learned" if training else "calibrated"
        dynamic: Any = "dynamic" if setting.approach == "PostTrainingDynamic" else ranges
        modules = quantize_model(
            model,
            include=[escape(name) for name in layers],
            formats=[INT8, INT16] if setting.wide else [INT8],
            weight=QuantizerConfig(
                range=ranges, granularity="channel", observer="mse", reduce_range=setting.reduce_range
            ),
            activation=QuantizerConfig(range=dynamic, observer="minmax", symmetric=False, ignore_padding=True),
        )
        tied = tied_layers(layers)  # layers that share a weight stay in float together
        precise = {tied.get(name, name) for name in setting.high_precision}
        assignment: dict[str, tuple[Format, Format]] = {
            name: (FLOAT, FLOAT)
            if tied.get(name, name) in precise
            else (INT8, INT16 if type(layer).__name__ in setting.wide else INT8)
            for name, layer in layers.items()
        }
        calibrate(model, modules, batches)
        set_formats(modules, assignment)
        assignment = get_formats(modules)  # layers that calibration did not reach are in float
        if training:
            self._trainer_of(model, modules, assignment).train()
        return modules, assignment

    def _trainer_of(
        self, model: nn.Module, modules: dict[str, QuantModule], assignment: dict[str, tuple[Format, Format]]
    ) -> ReinforceTrainer:
        """Return the trainer of a quantized copy, with the arguments of this trainer."""
        optimizer, arguments = self.optimizer_cls_and_kwargs, copy.copy(self.args)
        arguments.output_dir = str(Path(str(self.args.output_dir)) / TRIALS)  # separate from the user's checkpoints
        trainer = ReinforceTrainer(
            model,
            arguments,
            modules=modules,
            assignment=assignment,
            train_dataset=self.train_dataset,
            eval_dataset=self.eval_dataset,
            data_collator=self.data_collator,
            processing_class=self.processing_class,
            compute_loss_func=self.compute_loss_func,
            compute_metrics=self.compute_metrics,
            preprocess_logits_for_metrics=self.preprocess_logits_for_metrics,
            optimizer_cls_and_kwargs=optimizer and (optimizer[0], dict(optimizer[1])),  # the Trainer removes entries
        )
        if type(self).compute_loss is not Trainer.compute_loss:
            trainer.compute_loss = self.compute_loss  # type: ignore[method-assign]
        own = {type(callback) for callback in trainer.callback_handler.callbacks}  # such as its progress bar
        for callback in self.callback_handler.callbacks:
            if type(callback) not in own:
                trainer.add_callback(_unused(callback))
        return trainer

    def _ranked(
        self,
        original: nn.Module,
        setting: Setting,
        layers: dict[str, nn.Module],
        batches: Sequence[Any],
    ) -> list[str]:
        """Return the layers by the change of the outputs when each alone is quantized, the largest first."""
        if setting.approach == "QuantizationAwareTraining":
            setting = replace(setting, approach="PostTrainingStatic", high_precision=frozenset())
        model = copy.deepcopy(original).eval()
        with torch.no_grad():
            modules, assignment = self._quantized(model, setting, layers, batches)
            model.eval()
            set_formats(modules, dict.fromkeys(modules, (FLOAT, FLOAT)))
            targets = [outputs(model, batch) for batch in batches]
            change = {}
            for name, formats in assignment.items():
                set_formats(modules, {name: formats})
                change[name] = output_loss(model, batches, targets)
                set_formats(modules, {name: (FLOAT, FLOAT)})
        return sorted(change, key=lambda name: -change[name])

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        """Save as the Trainer does, but a quantized model for `load_model`: tied weights under each name."""
        if self.quantized is None:
            super()._save(output_dir, state_dict)
            return
        if self.args.should_save:
            folder = Path(output_dir or str(self.args.output_dir))
            save_weights(state_dict or self.model.state_dict(), folder)
            write_companions(folder, self)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Write the model, and the ranges and formats of a quantized one, for `eval.saved_model.load_model`."""
        super().save_model(output_dir, _internal_call)
        if self.quantized is None:
            return
        modules, assignment = self.quantized
        write_quantization(Path(output_dir or str(self.args.output_dir)), self.model, modules, assignment)


def _unused(callback: TrainerCallback) -> TrainerCallback:
    """Return the callback; one with an exportable state is created anew from its arguments."""
    return type(callback)(**callback.state()["args"]) if isinstance(callback, ExportableState) else callback
