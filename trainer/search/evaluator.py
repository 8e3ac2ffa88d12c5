"""JudgingTrainer: a Trainer that measures assignments on data that is held out, and picks its batches itself.

What it sees depends on the seed and the step alone, so that a resumed run, and every process of several, sees the same.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.utils.data import IterableDataset
from transformers.trainer_utils import has_length

from policy.space import SearchSpace
from quant.convert import in_float, rounded_weights_cached, set_formats
from quant.errors import UserError
from quant.module_utils import evaluating
from quant.quant_module import QuantModule
from quant.quantizers.prefix_cache import prefix_cached
from trainer.search.search_state import (
    LEAST_JUDGED,
    MOST_JUDGED,
    ReinforceConfig,
    examples_to_judge,
    examples_to_measure,
)
from trainer.search.sensitivity import Sensitivity, increase, measure_sensitivity
from trainer.training.batch_norm import LEAST_TELLING, statistics_of_batch
from trainer.training.distillation import Teacher, class_logits, softened_divergence
from trainer.training.distributed import mean_over_processes, own_share
from trainer.training.progress import Listener, Passes, counted, unheard
from trainer.training.safetensors_trainer import PickleFreeTrainer

LEAST_MEASURED = 32
"""examples that single formats are measured on: against float, effects are larger than between neighbours"""
LARGEST_LIKELY = 20.0
"""loss up to which exp(-loss) tells something: that of a sum over many words does not"""
DECIDING_SHARE = 4
"""times the examples that propose may decide: two choices are compared then, instead of a neighbourhood"""


class JudgingTrainer(PickleFreeTrainer):
    """Needs what its subclass's constructor sets: the quantized layers, their search space, and the data apart."""

    modules: dict[str, QuantModule]
    space: SearchSpace
    search_config: ReinforceConfig | None
    search_dataset: Any
    """what assignments are judged on"""
    search_rows: list[int]
    """where its rows stand in the training data, if they are part of it"""
    calibration_samples: int | None
    """training examples that ranges are calibrated on"""
    teacher: Teacher | None
    """the float model, where it comes trained"""
    reference_loss: float | None = None
    """what losses are measured by where their size says nothing, see `telling_reference`"""
    tell: Listener = staticmethod(unheard)
    """hears how far the run is"""
    passes: Passes | None = None
    """counts what `judge` does, where that is a phase of its own"""

    def measure(self, what: Literal["outputs", "errors"] = "outputs") -> Sensitivity:
        """The measured effect of every single decision, on `search_dataset`.

        outputs: on the class probabilities (see `softened_divergence`), or on the loss where there are no classes.
        errors: on the share of wrong answers.
        """
        batches = self._batches_apart(0, self._measuring_examples(), LEAST_TELLING)
        measured = self.model, self.modules, self.space, batches
        if what == "errors":
            return measure_sensitivity(*measured, self._error, increase, self.tell)
        if self._classes(batches[0]):
            return measure_sensitivity(*measured, self._logits, softened_divergence, self.tell)
        return measure_sensitivity(*measured, self.plain_loss, increase, self.tell)

    def judging_batches(self, assignments: int, least: int = LEAST_JUDGED) -> list[Any]:
        """Batches of `search_dataset` to judge so many assignments on; always the first of the same order."""
        return self._batches_apart(0, self._judging_examples(assignments, least))

    def _deciding_batches(self) -> list[Any]:
        """Batches of `search_dataset` that `judging_batches` leaves: more, for the few that are compared at last."""
        return self._batches_apart(*self._deciding_rows)

    @property
    def _deciding_rows(self) -> tuple[int, int]:
        """(from where on, how many) rows decide; none where too few are left."""
        seen = self._judging_examples(2 * self.space.num_decisions)
        left = min(len(self.search_dataset) - seen, MOST_JUDGED, DECIDING_SHARE * seen)
        return seen, left if left >= LEAST_JUDGED else 0

    def _batches_apart(self, start: int, count: int, least: int = 1) -> list[Any]:
        """`count` examples of `search_dataset` from `start` on in an order of their own, as batches."""
        order = self._permutation(self.search_dataset, salt=1)
        starts = self._batch_starts(start, count, least)
        return [self._batch(self.search_dataset, order[i : min(i + starts.step, start + count)]) for i in starts]

    def _batch_starts(self, start: int, count: int, least: int = 1) -> range:
        """Where each batch of `_batches_apart` starts; the range's step is their length."""
        # At least four batches, so that what is measured comes with an error.
        size = min(self.args.per_device_eval_batch_size, max(math.ceil(count / 4), least))
        return range(start, start + count, size)

    def _judging_examples(self, assignments: int, least: int = LEAST_JUDGED) -> int:
        """Examples of `search_dataset` to judge so many assignments on."""
        wanted = self._config.sensitivity_examples or examples_to_judge(
            self._total_steps(), self._step_examples, assignments, least
        )
        return min(wanted, len(self.search_dataset))

    def _measuring_examples(self) -> int:
        """Examples of `search_dataset` to measure single formats on."""
        pairs, config = self.space.num_decisions * self.space.num_choices, self._config
        wanted = config.sensitivity_examples or examples_to_measure(
            self._total_steps(), self._step_examples, pairs, LEAST_MEASURED, config.measure_share
        )
        return min(wanted, len(self.search_dataset))

    def _affordable_judgements(self, share: float) -> int:
        """Assignments that can be judged in a share of the time of training, whose steps count as three passes."""
        passes = 3 * self._total_steps() * self._step_examples
        return int(share * passes / self._judging_examples(2 * self.space.num_decisions))

    @property
    def judging_passes(self) -> int:
        """Forward passes that judging one assignment takes."""
        return len(self._batch_starts(0, self._judging_examples(2 * self.space.num_decisions)))

    @property
    def judged_by(self) -> Literal["divergence", "loss"]:
        """What `judge` takes for the harm of a choice: the record says it."""
        return "loss" if self._known(self._batch(self.search_dataset, [0])) is None else "divergence"

    @property
    def decide_by(self) -> Callable[[Sequence[Sequence[int]]], NDArray[np.float64]] | None:
        """`judge` on examples that it does not see itself; None where too few are left."""
        batches = self._deciding_batches()
        return partial(self.judge, batches=batches) if batches else None

    @torch.no_grad()
    def judge(
        self, choices: Sequence[Sequence[int]], in_formats: bool = True, batches: Sequence[Any] | None = None
    ) -> NDArray[np.float64]:
        """Harm and quality of each choice on the same held-out batches, in eval mode: (choices, 2, batches).

        Batch norms go by the statistics of the batch. Harm is the divergence from the teacher's class probabilities;
        without a teacher or classes, the loss. Without `in_formats` the layers stay in the formats they are in.
        """
        batches = self.judging_batches(2 * self.space.num_decisions) if batches is None else batches
        if self.passes is not None and not self.passes.done:
            self.tell(self.passes.phase, 0, self.passes.expected)
        judged = np.zeros((len(choices), 2, len(batches)))
        kind = self._config.reward_quality
        # Sorted, each choice shares with the one before it all layers up to the first that differs.
        order = sorted(range(len(choices)), key=lambda row: tuple(choices[row]))
        for column, batch in enumerate(batches):
            with evaluating(self.model), statistics_of_batch(self.model, batch), prefix_cached(self.modules) as cache:
                known = self._known(batch)
                for row in order:
                    if in_formats:
                        set_formats(self.modules, self.space.assignment(choices[row]))
                    cache.restart()
                    with self.compute_loss_context_manager():
                        loss, outputs = self.compute_loss(self.model, batch, return_outputs=True)
                        logits = class_logits(outputs, batch)
                    harm = loss if known is None or logits is None else softened_divergence(known, logits).mean()
                    judged[row, :, column] = float(harm), float(self._quality(loss, outputs, batch, kind))
                    if self.passes is not None:
                        self.passes.count(self.tell)
        return judged

    def _known(self, batch: Any) -> Tensor | None:
        """The teacher's logits for a batch that is judged; None without a teacher or classes."""
        if self.teacher is None:
            return None
        with self.compute_loss_context_manager(), statistics_of_batch(self.teacher.model, batch):
            return self.teacher.answers(batch)

    @torch.inference_mode()
    def qualities(self, choices: Tensor, step: int) -> list[float]:
        """Quality in (0, 1] of each choice, on one held-out batch that depends on seed and step alone, in eval mode."""
        size = math.ceil(self._config.reward_share * self._global_batch_size)
        indices = own_share(self._permutation(self.search_dataset, salt=2 + step)[:size])
        batch = self._batch(self.search_dataset, indices)
        measured = []
        kept = rounded_weights_cached(self.modules)  # for draws that agree on a layer
        with evaluating(self.model), statistics_of_batch(self.model, batch), kept:
            for choice in choices:
                set_formats(self.modules, self.space.assignment(choice.tolist()))
                with self.compute_loss_context_manager():
                    loss, outputs = self.compute_loss(self.model, batch, return_outputs=True)
                measured.append(self._quality(loss, outputs, batch, self._config.reward_quality))
        return mean_over_processes(torch.stack(measured), len(indices)).tolist()

    def plain_loss(self, model: nn.Module, batch: Any) -> Tensor:
        with self.compute_loss_context_manager():
            loss = self.compute_loss(model, batch)
        assert isinstance(loss, Tensor)
        return loss

    def _error(self, model: nn.Module, batch: Any) -> Tensor:
        with self.compute_loss_context_manager():
            loss, outputs = self.compute_loss(model, batch, return_outputs=True)
        return 1 - self._quality(loss, outputs, batch, "accuracy")

    def _quality(self, loss: Tensor, outputs: Any, batch: Any, kind: str) -> Tensor:
        return quality(loss, outputs, batch, kind, self.reference_loss)

    @torch.no_grad()
    def find_reference_loss(self) -> None:
        """Before the first step, in float: by what losses are measured, if the model tells no classes apart."""
        batches = self.judging_batches(2 * self.space.num_decisions)
        if not self._classes(batches[0]):
            with evaluating(self.model), in_float(self.modules):
                losses = [float(self.plain_loss(self.model, batch)) for batch in batches]
            self.reference_loss = telling_reference(sum(losses) / len(losses), batches[0].get("labels"))

    def _logits(self, model: nn.Module, batch: Any) -> Tensor:
        with self.compute_loss_context_manager():
            outputs: Any = self.compute_loss(model, batch, return_outputs=True)[1]
        return class_logits(outputs, batch)  # type: ignore[return-value]

    @torch.no_grad()
    def _classes(self, batch: Any) -> bool:
        """Whether the model tells classes apart."""
        with evaluating(self.model), self.compute_loss_context_manager():
            outputs: Any = self.compute_loss(self.model, batch, return_outputs=True)[1]
        return class_logits(outputs, batch) is not None

    @property
    def _config(self) -> ReinforceConfig:
        if self.search_config is None:
            raise ValueError("this trainer was made without a search: pass search=ReinforceConfig(...)")
        return self.search_config

    def _total_steps(self) -> int:
        if self.args.max_steps >= 0:
            return self.args.max_steps
        return math.ceil(self.args.num_train_epochs * self._steps_per_epoch())

    def _steps_per_epoch(self) -> int:
        """As the Trainer counts them: an epoch is a pass over the rows that are not held out."""
        rows = self._rows - len(self.search_rows)
        batches = rows / self._global_batch_size
        whole = math.floor(batches) if self.args.dataloader_drop_last else math.ceil(batches)
        return max(1, math.ceil(whole / self.args.gradient_accumulation_steps))

    @property
    def _rows(self) -> int:
        return len(self.train_dataset)  # type: ignore[arg-type]

    @property
    def _global_batch_size(self) -> int:
        """Training examples of a batch in all processes together."""
        return self.args.per_device_train_batch_size * self.args.world_size

    @property
    def _step_examples(self) -> int:
        """Training examples of an optimizer step."""
        return self._global_batch_size * self.args.gradient_accumulation_steps

    def _permutation(self, dataset: Any, salt: int) -> list[int]:
        generator = torch.Generator().manual_seed(self.args.seed * 1_000_003 + salt)
        return torch.randperm(len(dataset), generator=generator).tolist()

    def _batch(self, dataset: Any, indices: Sequence[int]) -> Any:
        # What the loader would do: a data set that makes whole batches is asked for one.
        rows = list(indices)
        items = dataset.__getitems__(rows) if hasattr(dataset, "__getitems__") else [dataset[i] for i in rows]
        # Columns that the model does not take are dropped, as the Trainer's own loaders do.
        collate = self._get_collator_with_removed_columns(self.data_collator)
        return self._prepare_inputs(collate(items))

    def batches_of(self, dataset: Any) -> Iterator[Any]:
        """All of it in its order, in evaluation batches."""
        size = self.args.per_device_eval_batch_size
        for start in range(0, len(dataset), size):
            yield self._batch(dataset, range(start, min(start + size, len(dataset))))

    def calibration_batches(self, phase: str | None = None) -> Iterator[Any]:
        """The same training batches every time, augmented as in training: that is what the weights have adapted to.

        Statistics of plain images would be others (a black border raises the first layer's variance by half), and cost
        a ResNet-20 three points of accuracy on CIFAR-10. Listeners hear of each as a part of `phase`, if that is given.
        """
        count = 8 if self.search_config is None else self.search_config.calibration_batches
        size = self._global_batch_size  # of several processes each sees all of it: without gradients there is room
        held = set(self.search_rows)
        order = self._permutation(self.train_dataset, salt=0)
        indices = [row for row in order if row not in held][: self.calibration_samples or count * size]
        if len(indices) % size == 1 and len(indices) > 1:
            indices.pop()  # one row alone has no variance for a batch norm
        starts: Iterable[int] = range(0, len(indices), size)
        if phase is not None:
            starts = counted(starts, math.ceil(len(indices) / size), phase, self.tell)
        for start in starts:
            yield self._batch(self.train_dataset, indices[start : start + size])


def quality(loss: Tensor, outputs: Any, batch: Mapping[str, Any], kind: str, reference: float | None = None) -> Tensor:
    """Quality in (0, 1] of a batch, 0-d: what the reward sees.

    likelihood: mean probability of the true class; of language models exp(-loss). For losses that are no likelihood
    (see `telling_reference`) 1/2 at the `reference` loss, falling from 1 to 0 with the distance from it, as a share of
    its size. accuracy: share of examples whose largest logit is the truth. Examples with a label below 0 do not count.
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


def streams(dataset: Any) -> bool:
    """Whether rows come one after the other alone, without an index."""
    return dataset is not None and (isinstance(dataset, IterableDataset) or not has_length(dataset))


def telling_reference(loss: float, labels: Any) -> float | None:
    """The loss to measure others by, given the float model's; None where exp(-loss) is the likelihood of something.

    That it is of whole-numbered labels: words, pixels, positions of an answer.
    """
    whole = isinstance(labels, Tensor) and not labels.is_floating_point()
    return None if (whole and 0 <= loss <= LARGEST_LIKELY) or not math.isfinite(loss) else loss


def _quality_of_loss(loss: Tensor, reference: float | None) -> Tensor:
    if reference is None:
        return torch.exp(-loss).clamp(max=1)
    apart = (loss - reference) / (abs(reference) or 1.0)
    return (1 - apart / (1 + apart.abs())) / 2
