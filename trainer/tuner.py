"""NLPTrainer: transformers' Trainer with `quantize`, which looks for a quantized model that keeps its accuracy."""

from __future__ import annotations

import copy
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import Trainer

from cost.cost import compute_cost, memory_cost
from cost.profile import profile_model
from quant.convert import calibrate, find_layers, quantize_model, set_formats
from quant.errors import UserError
from quant.formats import FLOAT, Format, IntFormat
from quant.graph import find_groups
from quant.migration import SmoothQuantConfig, fold
from quant.quant_module import QuantModule
from quant.quantizer import QuantizerConfig
from quant.token_clipping import output_loss, outputs
from trainer import metrics, objectives
from trainer.quantization_file import write_quantization
from trainer.reinforce_trainer import ReinforceTrainer
from trainer.tuning import PLAIN, RECIPES, Measured, QuantizationConfig, Recipe, Setting, Trial, check_metrics, tune

__all__ = ["NLPTrainer", "QuantizationConfig", "metrics", "objectives"]

logger = logging.getLogger(__name__)

INT8, INT16 = IntFormat(8), IntFormat(16)


class NLPTrainer(Trainer):
    """A Trainer that quantizes its model: `model = trainer.quantize(QuantizationConfig(...))`.

    The model then is the trainer's: `save_model` writes it, and `eval.saved_model.load_model` reads it back.
    """

    model: Any
    quantized: tuple[dict[str, QuantModule], dict[str, tuple[Format, Format]]] | None = None
    """layers and formats of the model, once it is quantized"""

    def quantize(self, quant_config: QuantizationConfig, exclude: Sequence[str] | None = None) -> nn.Module | None:
        """The best model whose metrics are accepted, in eval mode; None, and the float model stays, if there is none.

        Args:
            quant_config: what is accepted and what is tried, see `QuantizationConfig`.
            exclude: globs over names of layers to leave in float; default: none.

        Raises UserError where the evaluation does not return a metric, or there is no data to calibrate on.
        """
        if self.train_dataset is None or not len(self.train_dataset):  # type: ignore[arg-type]
            raise UserError("the calibration set is empty: NLPTrainer needs a train_dataset to quantize")
        original = self.model
        base = self.evaluate()
        check_metrics(quant_config.metrics, base)
        layers = find_layers(original, exclude=exclude)
        batches = self._samples(quant_config.sampling_size)
        profiles = profile_model(original, batches[0], list(layers))
        kept: dict[Setting, tuple[nn.Module, Any]] = {}
        latest: list[Any] = []

        def evaluate(setting: Setting) -> Measured:
            model = copy.deepcopy(original)
            modules, assignment = self._quantized(model, setting, layers, batches)
            try:
                self.model = self.model_wrapped = model
                measured = self.evaluate()
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
        """The first `size` training examples, in evaluation batches."""
        dataset: Any = self.train_dataset
        size, step = min(size, len(dataset)), self.args.per_device_eval_batch_size
        collate = self._get_collator_with_removed_columns(self.data_collator)
        parts = [range(start, min(start + step, size)) for start in range(0, size, step)]
        return [self._prepare_inputs(collate([dataset[i] for i in part])) for part in parts]

    def _recipes(self, model: nn.Module, layers: Any, batches: Sequence[Any]) -> list[Recipe]:
        """The recipes that this model can take: Gamma Migration needs a norm whose readers are known."""
        groups = [group.only(list(layers)) for group in find_groups(model, batches[0])]
        normal = any(group.normalizes and group.consumers for group in groups)
        return [recipe for recipe in RECIPES if normal or not recipe.gamma_migration]

    def _quantized(
        self, model: nn.Module, setting: Setting, layers: dict[str, nn.Module], batches: Sequence[Any]
    ) -> tuple[dict[str, QuantModule], dict[str, tuple[Format, Format]]]:
        """`model` quantized in place; trained, if the setting says so."""
        recipe, training = setting.recipe, setting.approach == "QuantizationAwareTraining"
        if recipe != PLAIN:
            smooth = None if recipe.smooth_quant is None else SmoothQuantConfig(alpha=recipe.smooth_quant)
            fold(model, batches[0], lambda: batches, list(layers), gamma=recipe.gamma_migration, smooth=smooth)
        ranges: Any = "learned" if training else "calibrated"
        dynamic: Any = "dynamic" if setting.approach == "PostTrainingDynamic" else ranges
        modules = quantize_model(
            model,
            include=list(layers),
            formats=[INT8, INT16] if setting.wide else [INT8],
            weight=QuantizerConfig(range=ranges, granularity="channel", observer="mse"),
            activation=QuantizerConfig(range=dynamic, observer="minmax", symmetric=False, ignore_padding=True),
        )
        assignment: dict[str, tuple[Format, Format]] = {
            name: (FLOAT, FLOAT)
            if name in setting.high_precision
            else (INT8, INT16 if type(layer).__name__ in setting.wide else INT8)
            for name, layer in layers.items()
        }
        calibrate(model, modules, batches)
        set_formats(modules, assignment)
        if training:
            ReinforceTrainer(
                model,
                self.args,
                modules=modules,
                assignment=assignment,
                train_dataset=self.train_dataset,
                data_collator=self.data_collator,
            ).train()
        return modules, assignment

    def _ranked(
        self, original: nn.Module, setting: Setting, layers: dict[str, nn.Module], batches: Sequence[Any]
    ) -> list[str]:
        """Layers by what each alone, quantized, does to the model's outputs; the worst first."""
        if setting.approach == "QuantizationAwareTraining":
            setting = Setting("PostTrainingStatic", setting.recipe, setting.wide)
        model = copy.deepcopy(original).eval()
        with torch.no_grad():
            modules, assignment = self._quantized(model, setting, layers, batches)
            model.eval()
            set_formats(modules, dict.fromkeys(modules, (FLOAT, FLOAT)))
            targets = [outputs(model, batch) for batch in batches]
            effect = {}
            for name, formats in assignment.items():
                set_formats(modules, {name: formats})
                effect[name] = output_loss(model, batches, targets)
                set_formats(modules, {name: (FLOAT, FLOAT)})
        return sorted(effect, key=lambda name: -effect[name])

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Write the model; once it is quantized, with its ranges and formats, for `eval.saved_model.load_model`."""
        super().save_model(output_dir, _internal_call)
        if self.quantized is None:
            return
        modules, assignment = self.quantized
        write_quantization(Path(output_dir or str(self.args.output_dir)), self.model, modules, assignment)
