"""AssignmentEvaluator: measures assignments on held-out data.

Which examples it reads depends on the seed and the step alone, so that a resumed run, and each of several processes,
sees the same ones.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.utils.data import default_collate

from policy.space import SearchSpace
from quant.convert import in_float, rounded_weights_cached, run_model
from quant.errors import UserError
from quant.module_utils import evaluating
from quant.quant_module import QuantModule
from quant.quantizers.prefix_cache import prefix_cached
from quant.reconstruction.blocks import Unit, find_units
from trainer.search.evaluation_sizes import EvaluationSizes
from trainer.search.sensitivity import Sensitivity, increase, measure_sensitivity
from trainer.training.batch_norm import LEAST_TELLING, statistics_of_batch
from trainer.training.batches import BatchReader
from trainer.training.distillation import Answers, Teacher, answers_of, class_logits, difference
from trainer.training.distributed import mean_over_processes, own_share
from trainer.training.progress import Listener, Passes, unheard

LARGEST_LIKELY = 20.0
"""Largest loss whose exp(-loss) still distinguishes models; a loss summed over many tokens is beyond it."""
Quality = Literal["likelihood", "accuracy"]


def _loss_and_outputs(model: nn.Module, batch: Any) -> tuple[Tensor, Any]:
    outputs = run_model(model, batch)
    return (outputs["loss"] if isinstance(outputs, Mapping) else outputs[0]), outputs


class AssignmentEvaluator:
    """Evaluates assignments of formats to layers on held-out data.

    Args:
        model: model whose layers are `modules`.
        modules: layer name -> quantized layer.
        space: search space that choices index.
        dataset: map-style held-out data.
        seed: seed of the order in which examples are read.
        sizes: numbers of examples; None: those of a run without training.
        reader: reads rows as batches on the model's device.
        loss_and_outputs: (model, batch) -> (loss, outputs); default: those that the model returns.
        autocast: context for forward passes.
        quality: what rewards and qualities measure, see `quality`.
        reward_examples: held-out examples per reward, over all processes.
        teacher: float model; assignments are then compared by the divergence from its probabilities of classes or
            tokens.
        tell: listener of the progress.
    """

    def __init__(
        self,
        model: nn.Module,
        modules: Mapping[str, QuantModule],
        space: SearchSpace,
        dataset: Any,
        seed: int = 0,
        *,
        sizes: EvaluationSizes | None = None,
        reader: BatchReader | None = None,
        loss_and_outputs: Callable[[nn.Module, Any], tuple[Tensor, Any]] = _loss_and_outputs,
        autocast: Callable[[], AbstractContextManager[Any]] = nullcontext,
        quality: Quality = "likelihood",
        reward_examples: int = 32,
        teacher: Teacher | None = None,
        tell: Listener = unheard,
    ) -> None:
        self.model, self.modules, self.space, self.dataset = model, modules, space, dataset
        self.sizes = sizes or EvaluationSizes(len(dataset), space.num_decisions, space.num_choices, batch_size=64)
        self.reader = reader or BatchReader(default_collate, seed)
        self.loss_and_outputs, self.autocast = loss_and_outputs, autocast
        self.quality: Quality = quality
        self.reward_examples = reward_examples
        self.teacher = teacher
        self.tell = tell
        self.reference_loss: float | None = None
        """Loss that others are compared with where exp(-loss) is no likelihood, see `find_reference_loss`."""
        self.passes: Passes | None = None
        """Progress of the current phase in forward passes; None: evaluations report nothing."""

    # ------------------------------------------------------ single formats

    def measure(
        self, what: Literal["outputs", "errors"] = "outputs", first_order: NDArray[np.float64] | None = None
    ) -> Sensitivity:
        """Measure the sensitivity of every single decision in each of its formats.

        Args:
            what: 'outputs' measures the divergence of the probabilities of classes or tokens (see
                `distillation.difference`), or the increase of the loss for models without them; 'errors' the increase
                of the share of wrong answers.
            first_order: estimates by which negligible choices are not measured, see `measure_sensitivity`.
        """
        batches = self._batches(0, self.sizes.to_measure(), LEAST_TELLING)
        measured = self.model, self.modules, self.space, batches
        if what == "errors":
            return measure_sensitivity(*measured, self._error_rate, increase, self.tell, first_order)
        if answers_of(self._outputs(batches[0]), batches[0]) is not None:
            return measure_sensitivity(*measured, self.answers, difference, self.tell, first_order)
        return measure_sensitivity(*measured, self.loss, increase, self.tell, first_order)

    def units(self) -> list[Unit]:
        """Return the blocks and single layers of the model, see `quant.reconstruction.blocks.find_units`."""
        batch = self.reader.read(self.dataset, [0])
        with evaluating(self.model):
            return find_units(self.model, self.modules, batch)

    # ------------------------------------------------------ whole assignments

    @property
    def criterion(self) -> Literal["divergence", "loss"]:
        """What `evaluate_assignments` takes for the degradation of a choice."""
        return "loss" if self._reference(self.reader.read(self.dataset, [0])) is None else "divergence"

    @property
    def decide(self) -> Callable[[Sequence[Sequence[int]]], NDArray[np.float64]] | None:
        """`evaluate_assignments` on examples disjoint from its own; None if too few are left."""
        batches = self.deciding_batches()
        return partial(self.evaluate_assignments, batches=batches) if batches else None

    def evaluate_assignments(
        self, choices: Sequence[Sequence[int]], batches: Sequence[Any] | None = None
    ) -> NDArray[np.float64]:
        """Evaluate choices in eval mode, all on the same batches, batch norms on the statistics of the batch.

        Args:
            choices: choices of the search space, one index per decision.
            batches: held-out batches; None: `evaluation_batches()`.

        Returns:
            (choices, 2, batches): the degradation, which is the divergence from the teacher's probabilities, or the
            loss without a teacher, classes or tokens; and the quality in (0, 1].
        """
        return self._evaluate(choices, batches, self._set_choice)

    def evaluate_float(self) -> float:
        """Return the mean held-out quality of the model in float."""
        with in_float(self.modules):
            return float(self._evaluate([()], None, lambda choice: None)[0, 1].mean())

    @torch.no_grad()
    def _evaluate(
        self, choices: Sequence[Sequence[int]], batches: Sequence[Any] | None, apply: Callable[[Sequence[int]], None]
    ) -> NDArray[np.float64]:
        batches = self.evaluation_batches() if batches is None else batches
        if self.passes is not None and not self.passes.done:
            self.tell(self.passes.phase, 0, self.passes.expected)
        results = np.zeros((len(choices), 2, len(batches)))
        # Sorted, each choice shares all layers before the first difference with the previous one.
        order = sorted(range(len(choices)), key=lambda row: tuple(choices[row]))
        for column, batch in enumerate(batches):
            with evaluating(self.model), statistics_of_batch(self.model, batch), prefix_cached(self.modules) as cache:
                reference = self._reference(batch)
                for row in order:
                    apply(choices[row])
                    cache.restart()
                    loss, outputs = self._forward(self.model, batch)
                    answers = None if reference is None else answers_of(outputs, batch)
                    compared = reference is not None and answers is not None
                    degradation = difference(reference, answers).mean() if compared else loss  # type: ignore[arg-type]
                    results[row, :, column] = float(degradation), float(self._quality(loss, outputs, batch))
                    if self.passes is not None:
                        self.passes.count(self.tell)
        return results

    @torch.inference_mode()
    def rewarded_qualities(self, choices: Tensor, step: int) -> list[float]:
        """Return the quality in (0, 1] of each drawn choice on one held-out batch, in eval mode.

        Args:
            choices: int64 (draws, decisions).
            step: step of the run; the batch depends on it and the seed alone.
        """
        rows = own_share(self.reader.order(self.dataset, salt=2 + step)[: self.reward_examples])
        batch = self.reader.read(self.dataset, rows)
        measured = []
        kept = rounded_weights_cached(self.modules)  # draws often agree on a layer
        with evaluating(self.model), statistics_of_batch(self.model, batch), kept:
            for choice in choices:
                self._set_choice(choice.tolist())
                measured.append(self._quality(*self._forward(self.model, batch), batch))
        return mean_over_processes(torch.stack(measured), len(rows)).tolist()

    @torch.no_grad()
    def find_reference_loss(self) -> None:
        """Measure the float model's loss before training; for models without classes it becomes `reference_loss`."""
        batches = self.evaluation_batches()
        if class_logits(self._outputs(batches[0]), batches[0]) is None:
            with evaluating(self.model), in_float(self.modules):
                losses = [float(self.loss(self.model, batch)) for batch in batches]
            self.reference_loss = reference_of(sum(losses) / len(losses), batches[0].get("labels"))

    # ------------------------------------------------------ held-out batches

    def evaluation_batches(self, assignments: int | None = None) -> list[Any]:
        """Return held-out batches for evaluating this many assignments: always the first of the same order."""
        return self._batches(0, self.sizes.to_evaluate(assignments))

    def deciding_batches(self) -> list[Any]:
        """Return held-out batches disjoint from `evaluation_batches()`; none if too few examples are left."""
        return self._batches(*self.sizes.to_decide())

    def _batches(self, first: int, count: int, least: int = 1) -> list[Any]:
        order = self.reader.order(self.dataset, salt=1)
        starts = self.sizes.batch_starts(first, count, least)
        ends = (min(start + starts.step, first + count) for start in starts)
        return [self.reader.read(self.dataset, order[start:end]) for start, end in zip(starts, ends, strict=True)]

    # ------------------------------------------------------ one batch

    def loss(self, model: nn.Module, batch: Any) -> Tensor:
        """Return the mean loss of a batch, scalar."""
        return self._forward(model, batch)[0]

    def answers(self, model: nn.Module, batch: Any) -> Answers:
        """Return the logits of a batch, see `distillation.answers_of`."""
        return answers_of(self._forward(model, batch)[1], batch)  # type: ignore[return-value]

    def _forward(self, model: nn.Module, batch: Any) -> tuple[Tensor, Any]:
        with self.autocast():
            return self.loss_and_outputs(model, batch)

    def _set_choice(self, choice: Sequence[int]) -> None:
        self.space.apply(self.modules, choice)

    def _error_rate(self, model: nn.Module, batch: Any) -> Tensor:
        loss, outputs = self._forward(model, batch)
        return 1 - quality(loss, outputs, batch, "accuracy", self.reference_loss)

    def _quality(self, loss: Tensor, outputs: Any, batch: Any) -> Tensor:
        return quality(loss, outputs, batch, self.quality, self.reference_loss)

    def _reference(self, batch: Any) -> Answers | None:
        if self.teacher is None:
            return None
        with self.autocast(), statistics_of_batch(self.teacher.model, batch):
            return self.teacher.reference(batch)

    @torch.no_grad()
    def _outputs(self, batch: Any) -> Any:
        with evaluating(self.model):
            return self._forward(self.model, batch)[1]


def quality(loss: Tensor, outputs: Any, batch: Mapping[str, Any], kind: str, reference: float | None = None) -> Tensor:
    """Return the quality of a batch in (0, 1], 0-d: what rewards see.

    Args:
        loss: mean loss of the batch, scalar.
        outputs: outputs of the model.
        batch: the batch; examples with a negative label do not count.
        kind: 'likelihood' is the mean probability of the true class, and exp(-loss) for language models. Losses that
            are no likelihood give 1/2 at the reference and fall from 1 to 0 with the relative distance from it.
            'accuracy' is the share of examples whose largest logit is the true class.
        reference: see `reference_of`.

    Raises:
        UserError: for the accuracy of a model without classes.
    """
    logits = class_logits(outputs, batch)
    if logits is None and kind == "accuracy":
        raise UserError("--reward_quality accuracy needs a model that tells classes apart; choose likelihood")
    if logits is None:
        value = _quality_of_loss(loss.float(), reference)
    else:
        labels = batch["labels"].view(-1)
        counted = labels >= 0
        if kind == "accuracy":
            right = (logits.argmax(dim=1) == labels).float()
        else:
            right = logits.float().softmax(dim=1).gather(1, labels.clamp(min=0)[:, None]).squeeze(1)
        value = torch.where(counted, right, 0).sum() / counted.sum().clamp(min=1)
    return torch.where(value > 0, value, torch.where(value.isnan(), value, torch.finfo(torch.float32).tiny))


def reference_of(loss: float, labels: Any) -> float | None:
    """Return the float model's loss as the reference for others; None where exp(-loss) is a likelihood.

    It is one if the labels are integers: tokens, pixels, positions of an answer.
    """
    whole = isinstance(labels, Tensor) and not labels.is_floating_point()
    return None if (whole and 0 <= loss <= LARGEST_LIKELY) or not math.isfinite(loss) else loss


def _quality_of_loss(loss: Tensor, reference: float | None) -> Tensor:
    if reference is None:
        return torch.exp(-loss).clamp(max=1)
    apart = (loss - reference) / (abs(reference) or 1.0)
    return (1 - apart / (1 + apart.abs())) / 2
