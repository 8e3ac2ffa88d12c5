"""ReinforceTrainer: transformers' Trainer whose model changes formats under a search, or under none."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.utils.data import Dataset, Sampler, Subset
from transformers import Trainer, TrainingArguments

from cost.cost import assignment_from_json, assignment_to_json
from cost.profile import LayerProfile, profile_model
from policy.budget import Budget, Limit
from policy.solve import Table
from policy.space import Partition, SearchSpace, build_space
from quant.convert import Assignment, calibrate, in_float, quantize_model, set_formats, weights_kept
from quant.errors import UserError
from quant.formats import Format, parse_search_space
from quant.quant_module import QuantModule
from trainer import checkpoint
from trainer.allocation import allocate, effects, propose
from trainer.contest import Contest
from trainer.distill import Distiller
from trainer.drop import cheapest_budget
from trainer.evidence import additivity, certificate
from trainer.history import History
from trainer.phased_sampler import PhasedSampler
from trainer.policy_pictures import show_policy
from trainer.processes import mean_over_processes, of_first_process, own_share, share_buffers
from trainer.recalibrate import has_untrained_batch_norm, recalibrate_batch_norm
from trainer.search import Phases, ReinforceConfig, Search, examples_to_judge, resolve_target
from trainer.sensitivity import Sensitivity, believing_prior, divergence, increase, measure_sensitivity

__all__ = ["ReinforceConfig", "ReinforceTrainer", "TrainingDiverged"]

SCALES = "_quantizer.grids."
"""what the names of learned scales contain"""
STATE = "training"
"""file of a checkpoint that holds everything but the model and the random generators"""
SEARCH_MEASURES = ("reward", "quality", "cost", "entropy")
FLUSH_STEPS = 10
"""steps between writes of the history: losses are read from the device then, not at every step"""
PROBABILITY_STEPS = 10
"""steps between records of the policy's probabilities"""


@dataclass
class Target:
    """One budget that the run works towards, and what has become of it."""

    budget: Budget | None = None
    search: Search | None = None
    assignment: dict[str, tuple[Format, Format]] | None = None
    """what the layers run in at the end, once that is chosen; None: not yet, or float"""
    contest: dict[str, Any] | None = None
    """how a search's final choice was made: part of the record"""


class TrainingDiverged(RuntimeError):
    """A loss or reward that is not finite; the message names the step and the assignment."""


class ReinforceTrainer(Trainer):
    """Trains shared weights while a policy picks the formats; ends with the chosen assignment, trained and calibrated.

    Args:
        model: any module that takes the datasets' columns and returns a loss (or pass `compute_loss_func`).
        search: how to search, or how a competitor of the search decides; None: train under `assignment`.
        search_space: formats to choose from, as a flag ('2,4,8') or parsed.
        partition: 'layer', 'single', or block name -> layer names.
        assignment: fixed formats, without a search; None: float.
        modules: the quantized layers, if the model is quantized already; None: all layers are quantized here.
        profiles: their profiles; None: measured on the first training example.
        search_dataset: held-out part of the training data that assignments are judged on; None: a search splits 10 %
            off, a competitor judges on all of it, since it learns nothing from it.
        search_rows: where its rows stand in `train_dataset`, if they are part of it: they are left out until the
            assignment is chosen, and trained on from then on.
        limits: hard limits beside the search's own target.
        distiller: a float teacher whose class probabilities the model is trained towards as well.
        history: file that gets one line a step.
        calibration_samples: training examples that ranges are calibrated on; None: 8 batches.
        after_calibration: called once ranges are there, to make them better.
    """

    # The Trainer types these as optional: they are None before its constructor and `train` have set them.
    model: Any
    optimizer: Any
    lr_scheduler: Any

    def __init__(
        self,
        model: nn.Module,
        args: TrainingArguments,
        *,
        search: ReinforceConfig | None = None,
        search_space: str | Sequence[Format] = "4,8",
        partition: Partition = "layer",
        weight_only_search: bool = False,
        separate_activations: bool = False,
        assignment: Assignment | None = None,
        modules: Mapping[str, QuantModule] | None = None,
        profiles: Sequence[LayerProfile] | None = None,
        train_dataset: Dataset | None = None,
        search_dataset: Dataset | None = None,
        search_rows: Sequence[int] = (),
        limits: Sequence[Limit] = (),
        distiller: Distiller | None = None,
        history: Path | None = None,
        on_step: Callable[[dict[str, Any]], None] | None = None,
        calibration_samples: int | None = None,
        after_calibration: Callable[[ReinforceTrainer], None] | None = None,
        **trainer_arguments: Any,
    ) -> None:
        formats = parse_search_space(search_space) if isinstance(search_space, str) else tuple(search_space)
        if search is not None and modules is None:
            modules = quantize_model(model, formats=formats)
        self.modules = dict(modules or {})
        searching = search is not None and search.method == "search"
        if searching and search_dataset is None:
            search_rows = _hold_out(len(train_dataset), args.seed)  # type: ignore[arg-type]
            search_dataset = Subset(train_dataset, search_rows)  # type: ignore[arg-type]
        args.logging_nan_inf_filter = False  # it would let a diverged run end normally
        super().__init__(model=model, args=args, train_dataset=train_dataset, **trainer_arguments)
        self.search_config = search
        self.search_dataset: Any = train_dataset if search_dataset is None else search_dataset
        self.search_rows = list(search_rows) if searching else []
        first = self.is_world_process_zero()  # of several processes, one writes and tells
        self.history = History(history) if history is not None and first else None
        self.on_step = on_step if first else None
        self.distiller = distiller
        if distiller is not None:
            distiller.teacher.to(self.args.device)
        self.targets = [Target(assignment=dict(assignment) if assignment else None)]
        """one, or one for each of several `target_bits`: they take turns at the steps"""
        self._turn = 0
        self.calibration_samples = calibration_samples
        self.after_calibration = after_calibration
        self.phases: Phases | None = None
        self._settled = not searching
        self._pending: list[dict[str, Any]] = []
        self._entry: dict[str, Any] = {}
        self._choices: Tensor | None = None
        self._micro_step = 0
        self._scale_exponents: dict[str, int] = {}
        self._float_quality: float | None = None
        """held-out quality of the float model, which `max_drop` counts from"""
        self._limits = tuple(limits)
        if search is not None:
            self.profiles = list(profiles or profile_model(self.model, self._batch(train_dataset, [0]), self.modules))
            self.space: SearchSpace = build_space(
                list(self.modules), formats, partition, weight_only_search, separate_activations
            )
            self.costs = self.space.cost_table(self.profiles, search.cost_type)
            self.targets = [Target(self._budget(bits, self._limits)) for bits in _each(search.target_bits)]

    def _budget(self, bits: float | None, limits: Sequence[Limit]) -> Budget:
        config = self._config
        if config.max_drop is not None:  # until the bisection: anything goes
            bits = max(weight.bits for weight, _ in self.space.decisions[0].choices)
        target = resolve_target(self.space, self.profiles, config.cost_type, config.cost_target, bits)
        tables = self.costs, *(limit.table(self.space) for limit in limits)
        return Budget(tables, (target, *(limit.value for limit in limits)))

    # ------------------------------------------------------ the target whose turn it is

    @property
    def _target(self) -> Target:
        return self.targets[self._turn]

    @property
    def budget(self) -> Budget:
        """The limits of the target whose turn it is. Raises ValueError for a trainer without a search."""
        if self._target.budget is None:
            raise ValueError("this trainer has no budget: pass search=ReinforceConfig(...)")
        return self._target.budget

    @property
    def cost_target(self) -> float:
        """Its limit on the run's own cost, in MiB or GBOPs."""
        return self.budget.limits[0]

    @property
    def search(self) -> Search | None:
        return self._target.search

    @property
    def assignment(self) -> dict[str, tuple[Format, Format]] | None:
        """What the layers run in, once that is chosen; None: not yet, or float."""
        return self._target.assignment

    @property
    def contest(self) -> dict[str, Any] | None:
        """How its assignment was chosen: part of the record."""
        return self._target.contest

    def _in_turn(self) -> Iterator[Target]:
        """Each target, which has the turn meanwhile."""
        for turn, target in enumerate(self.targets):
            self._turn = turn
            yield target

    def use(self, turn: int) -> None:
        """After the training: put the model into the assignment of target `turn`, calibrated for it."""
        self._turn = turn
        if self.assignment is not None:
            set_formats(self.modules, self.assignment)
        self._recalibrate(batch_norm=bool(self.modules) and self.args.max_steps != 0)

    # ------------------------------------------------------ the run

    def train(self, resume_from_checkpoint: str | None = None, **kwargs: Any) -> Any:  # type: ignore[override]
        """Train to the end and finish: the model then runs in `assignment`, calibrated on training data.

        Raises TrainingDiverged for a loss or reward that is not finite.
        """
        if resume_from_checkpoint is None:
            self.prepare()
        else:
            self._scale_exponents = checkpoint.load_state(Path(resume_from_checkpoint) / STATE)["scale_exponents"]
        output = super().train(resume_from_checkpoint=resume_from_checkpoint, **kwargs)
        self.finish()
        return output

    def prepare(self) -> None:
        """Before the first step: ranges from training data, the policy's prior from measured sensitivities."""
        if self.modules:
            if has_untrained_batch_norm(self.model):  # ranges seen through its starting values would clip everything
                recalibrate_batch_norm(self.model, self.calibration_batches())
            calibrate(self.model, self.modules, self.calibration_batches())
            if self.after_calibration is not None:
                self.after_calibration(self)
        config = self.search_config
        if config is None or config.method != "search":
            for target in self._in_turn():
                if config is not None:
                    target.assignment = self._agreed(allocate(config.method, self))
            if self.assignment:
                set_formats(self.modules, self.assignment)
            return
        effect = None if config.policy_prior == "none" else effects(config.policy_prior, self)
        for _ in self._in_turn():
            prior = pressure = None
            if effect is not None and config.max_drop is not None:
                self._float_quality = self._quality_in_float()
                self._lower_budget(-effect)
            candidates: dict[str, list[int]] = {}
            if effect is not None:
                prior, pressure = believing_prior(effect, self.budget)
                if config.contest:
                    candidates = propose(self, {config.policy_prior: effect})
            self._start_search(of_first_process(prior), of_first_process(pressure), candidates)

    def measure(self, what: Literal["outputs", "errors"] = "outputs") -> Sensitivity:
        """The measured effect of every single decision, on `search_dataset`.

        outputs: on the class probabilities (see `divergence`), or on the loss where there are no classes. errors: on
        the share of wrong answers.
        """
        batches = self.judging_batches(self.space.num_decisions * self.space.num_choices)
        measured = self.model, self.modules, self.space, batches
        if what == "errors":
            return measure_sensitivity(*measured, self._error, increase)
        if self._classes(batches[0]):
            return measure_sensitivity(*measured, self._logits, divergence)
        return measure_sensitivity(*measured, self.plain_loss, increase)

    def judging_batches(self, assignments: int) -> list[Any]:
        """Batches of `search_dataset` to judge so many assignments on; always the first of the same order."""
        steps, batch_size = self._total_steps(), self._global_batch_size * self.args.gradient_accumulation_steps
        available = len(self.search_dataset)
        wanted = self._config.sensitivity_examples or examples_to_judge(steps, batch_size, assignments)
        indices = self._permutation(self.search_dataset, salt=1)[: min(wanted, available)]
        # At least four batches, so that what is measured comes with an error.
        size = max(1, min(self.args.per_device_eval_batch_size, math.ceil(len(indices) / 4)))
        return [self._batch(self.search_dataset, indices[i : i + size]) for i in range(0, len(indices), size)]

    def _affordable_judgements(self) -> int:
        """Assignments that can be judged, beside those of the contest, in a twentieth of the time of training."""
        examples = sum(len(next(iter(batch.values()))) for batch in self.judging_batches(2 * self.space.num_decisions))
        step = self._global_batch_size * self.args.gradient_accumulation_steps
        return max(8, int(3 * self._total_steps() * step / 20 / examples))

    @torch.no_grad()
    def judge(self, choices: Sequence[Sequence[int]], in_formats: bool = True) -> NDArray[np.float64]:
        """Loss and quality of each choice on the same held-out batches, in eval mode: (choices, 2, batches).

        Without `in_formats` the layers stay in the formats they are in.
        """
        batches, training = self.judging_batches(2 * self.space.num_decisions), self.model.training
        self.model.eval()
        judged = np.zeros((len(choices), 2, len(batches)))
        kind = self._config.reward_quality
        with weights_kept(self.modules):
            for row, choice in enumerate(choices):
                if in_formats:
                    set_formats(self.modules, self.space.assignment(choice))
                for column, batch in enumerate(batches):
                    with self.compute_loss_context_manager():
                        loss, outputs = self.compute_loss(self.model, batch, return_outputs=True)
                    judged[row, :, column] = float(loss), float(quality(loss, outputs, batch, kind))
        self.model.train(training)
        return judged

    def finish(self) -> None:
        """Settle on the assignment, recalibrate what it changed, and write the rest of the history."""
        if self.search is not None and not self._settled:
            self._settle()
        share_buffers(self.model)
        self.use(len(self.targets) - 1)
        self._flush()

    def _drop_of(self, quality: float) -> dict[str, Any]:
        """What the record says of `max_drop`, if it was asked for."""
        if self._config.max_drop is None or self._float_quality is None:
            return {}
        kept = quality >= self._float_quality - self._config.max_drop
        return {"float_quality": self._float_quality, "max_drop": self._config.max_drop, "within_drop": kept}

    def _quality_in_float(self) -> float:
        nowhere = np.zeros(self.space.num_decisions, dtype=int)
        with in_float(self.modules):
            return float(self.judge([nowhere.tolist()], in_formats=False)[0, 1].mean())

    def _lower_budget(self, values: Table) -> None:
        """The least budget whose most valuable choice keeps the held-out quality within `max_drop` of float."""
        assert self._config.max_drop is not None and self._float_quality is not None
        floor = self._float_quality - self._config.max_drop
        whole = self._budget(None, self._limits)

        def quality_of(choice: Sequence[int]) -> float:
            return float(self.judge([choice])[0, 1].mean())

        self._target.budget = cheapest_budget(whole, values, quality_of, floor)

    def _start_search(
        self,
        prior: Tensor | None = None,
        pressure: Tensor | None = None,
        candidates: dict[str, list[int]] | None = None,
    ) -> None:
        total = self._total_steps()
        self.phases = Phases.of(self._config, total)
        generator = torch.Generator().manual_seed(self.args.seed + 7919 * self._turn)
        sharing = len(self.targets)
        self._target.search = Search(
            self.space, self.budget, self._config, self.phases, generator, prior, pressure, sharing, candidates or {}
        )

    def _total_steps(self) -> int:
        if self.args.max_steps >= 0:
            return self.args.max_steps
        return math.ceil(self.args.num_train_epochs * self._steps_per_epoch())

    def _steps_per_epoch(self) -> int:
        """As the Trainer counts them: an epoch is a pass over the rows that are not held out."""
        rows = self._rows - len(self.search_rows)
        batches = math.ceil(rows / self._global_batch_size)
        return math.ceil(batches / self.args.gradient_accumulation_steps)

    @property
    def _config(self) -> ReinforceConfig:
        if self.search_config is None:
            raise ValueError("this trainer was made without a search: pass search=ReinforceConfig(...)")
        return self.search_config

    def _settle(self) -> None:
        """From here on, only the chosen assignment of each target is trained."""
        share_buffers(self.model)
        for target in self._in_turn():
            target.assignment = self._agreed(self._choose(target))
        self._settled = True
        for target in self._in_turn():
            assert target.assignment is not None
            set_formats(self.modules, target.assignment)
            self._recalibrate(batch_norm=False)

    def _choose(self, target: Target) -> list[int]:
        assert target.search is not None
        best = target.search.best()
        if not self._config.contest:
            return best
        # The statistics of training are a mixture over all draws; the contest is between neighbours of the best.
        set_formats(self.modules, self.space.assignment(best))
        recalibrate_batch_norm(self.model, self.calibration_batches())
        if self._config.max_drop is not None:
            self._lower_budget(target.search.values())
            target.search.budget = self.budget
            best = target.search.best()
        contest = Contest(self.budget, self.judge)
        candidates = {name: c for name, c in target.search.candidates.items() if self.budget.fits(c)}
        verdict = contest.decide({**candidates, "policy": best})
        target.contest = {
            **verdict.describe(),
            **self._drop_of(verdict.describe()["held_out_quality"]),
            "certificate": certificate(contest, verdict.choice, self._affordable_judgements(), self.args.seed),
            "additivity": additivity(contest, verdict.choice, self.args.seed),
        }
        return list(verdict.choice)

    def _agreed(self, choice: Sequence[int]) -> dict[str, tuple[Format, Format]]:
        """The assignment of a choice, the first process's where there are several."""
        agreed = of_first_process(torch.tensor(list(choice)))
        assert agreed is not None
        return self.space.assignment(agreed.tolist())

    def _recalibrate(self, batch_norm: bool) -> None:
        if not self.modules or self.assignment is None:
            return
        calibrate(self.model, self.modules, self.calibration_batches(), learned=False)
        if batch_norm:
            recalibrate_batch_norm(self.model, self.calibration_batches())

    # ------------------------------------------------------ one step

    def training_step(self, model: nn.Module, inputs: Any, num_items_in_batch: Any = None) -> Tensor:
        first = self._micro_step == 0
        if first:
            self._begin_step()
        loss = super().training_step(model, inputs, num_items_in_batch)
        # The Trainer divides the loss by the accumulated batches, so their sum is the step's.
        self._entry["loss"] = loss if first else self._entry["loss"] + loss
        self._micro_step += 1
        if self._micro_step == self.current_gradient_accumulation_steps:
            self._micro_step = 0
            self._end_step()
        return loss

    def compute_loss(
        self, model: nn.Module, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        if self.distiller is None or not model.training:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        batch = dict(inputs)
        loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)  # type: ignore[misc]
        logits = class_logits(outputs, batch)
        if logits is None:
            raise UserError("--distill needs a model that tells classes apart, one answer for each example")
        counted = num_items_in_batch if self.model_accepts_loss_kwargs else None
        loss = self.distiller.loss(loss, logits, batch, counted)
        return (loss, outputs) if return_outputs else loss

    def _begin_step(self) -> None:
        """Draw the formats of this optimizer step: every batch accumulated into it sees the same ones."""
        step = self.state.global_step
        self._turn = step % len(self.targets)
        self._entry = {"step": step + 1, "phase": "train", "learning_rate": self._get_learning_rate()}
        if len(self.targets) > 1:
            self._entry["target"] = self.cost_target
            if self._settled and self.assignment is not None:
                set_formats(self.modules, self.assignment)
        if self.search is None or self.phases is None:
            return
        if not self._settled and step >= self.phases.settle:
            self._settle()
            self._turn = step % len(self.targets)
            set_formats(self.modules, self.assignment or {})
        self._entry["phase"] = self.phases.name(step)
        if self._settled:
            self._choices = None
            return
        self._choices = self.search.draws(step)
        set_formats(self.modules, self.space.assignment(self._choices[0].tolist()))

    def _end_step(self) -> None:
        step, entry = self.state.global_step, self._entry
        if self.search is not None and self.phases is not None:
            if self._choices is None:
                assert self.assignment is not None
                entry["cost"] = self.search.cost(self.space.choice(self.assignment))
            elif step >= self.phases.delay:
                qualities = self.qualities(self._choices, step)
                if not all(math.isfinite(quality) for quality in qualities):
                    raise self._diverged("reward", float("nan"), step + 1)
                entry.update(self.search.learn(self._choices, qualities, step))
            else:
                entry["cost"] = self.search.cost(self._choices[0])
                entry["entropy"] = self.search.policy.entropy().item()
            if step % PROBABILITY_STEPS == 0:
                entry["probabilities"] = self.search.policy.probabilities().detach().tolist()
            if self._choices is not None:
                entry["choice"] = self._choices[0].tolist()
        self._pending.append(entry)
        if len(self._pending) >= FLUSH_STEPS:
            self._flush()

    @torch.no_grad()
    def qualities(self, choices: Tensor, step: int) -> list[float]:
        """Quality in (0, 1] of each choice, on one held-out batch that depends on seed and step alone, in eval mode."""
        size = self._config.search_batch_size or self._global_batch_size
        indices = own_share(self._permutation(self.search_dataset, salt=2 + step)[:size])
        batch = self._batch(self.search_dataset, indices)
        training = self.model.training
        self.model.eval()
        measured = []
        for choice in choices:
            set_formats(self.modules, self.space.assignment(choice.tolist()))
            with self.compute_loss_context_manager():
                loss, outputs = self.compute_loss(self.model, batch, return_outputs=True)
            measured.append(quality(loss, outputs, batch, self._config.reward_quality))
        self.model.train(training)
        return mean_over_processes(torch.stack(measured), len(indices)).tolist()

    def plain_loss(self, model: nn.Module, batch: Any) -> Tensor:
        with self.compute_loss_context_manager():
            loss = self.compute_loss(model, batch)
        assert isinstance(loss, Tensor)
        return loss

    def _error(self, model: nn.Module, batch: Any) -> Tensor:
        with self.compute_loss_context_manager():
            loss, outputs = self.compute_loss(model, batch, return_outputs=True)
        return 1 - quality(loss, outputs, batch, "accuracy")

    def _logits(self, model: nn.Module, batch: Any) -> Tensor:
        with self.compute_loss_context_manager():
            outputs: Any = self.compute_loss(model, batch, return_outputs=True)[1]
        return class_logits(outputs, batch)  # type: ignore[return-value]

    @torch.no_grad()
    def _classes(self, batch: Any) -> bool:
        """Whether the model tells classes apart."""
        training = self.model.training
        self.model.eval()
        with self.compute_loss_context_manager():
            outputs: Any = self.compute_loss(self.model, batch, return_outputs=True)[1]
        self.model.train(training)
        return class_logits(outputs, batch) is not None

    # ------------------------------------------------------ data

    def _get_train_sampler(self, train_dataset: Dataset | None = None) -> Sampler | None:
        if not self.search_rows:
            return super()._get_train_sampler(train_dataset)
        returned_at = self._position(Phases.of(self._config, self._total_steps()).settle)
        return PhasedSampler(self._rows, self.search_rows, returned_at, self.args.seed)

    @property
    def _rows(self) -> int:
        return len(self.train_dataset)  # type: ignore[arg-type]

    @property
    def _global_batch_size(self) -> int:
        """Training examples of a batch in all processes together."""
        return self.args.per_device_train_batch_size * self.args.world_size

    def _position(self, step: int) -> int:
        """Rows that all steps before `step` have taken, counted as `PhasedSampler` counts them."""
        rows = self._rows - len(self.search_rows)
        step_rows = self._global_batch_size * self.args.gradient_accumulation_steps
        epoch, within = divmod(step, self._steps_per_epoch())
        return epoch * rows + min(within * step_rows, rows)

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

    def calibration_batches(self) -> Iterator[Any]:
        """The same training batches every time, augmented as in training: that is what the weights have adapted to.

        Statistics of plain images would be others (a black border raises the first layer's variance by half), and cost
        a ResNet-20 three points of accuracy on CIFAR-10.
        """
        count = 8 if self.search_config is None else self.search_config.calibration_batches
        size = self._global_batch_size  # of several processes each sees all of it: without gradients there is room
        held = set(self.search_rows)
        order = self._permutation(self.train_dataset, salt=0)
        indices = [row for row in order if row not in held][: self.calibration_samples or count * size]
        for start in range(0, len(indices), size):
            yield self._batch(self.train_dataset, indices[start : start + size])

    # ------------------------------------------------------ optimizer, history

    def get_decay_parameter_names(self, model: nn.Module) -> list[str]:
        """Weight decay is for weights: a learned scale would shrink its grid."""
        return [name for name in super().get_decay_parameter_names(model) if SCALES not in name]

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """The Trainer's optimizer; one that moves every number by about the learning rate gets smaller ones for scales.

        Adam's step does not depend on the gradient's size, so a scale of 0.01 would double within a few steps. Scales
        are grouped by magnitude, and a group's learning rate is relative to it. SGD needs none of this: LSQ's gradient
        is already made for it.
        """
        optimizer = super().create_optimizer(model)
        if self.args.optim == "sgd" or any("scale_exponent" in group for group in optimizer.param_groups):
            return optimizer
        named = {name: parameter for name, parameter in self.model.named_parameters() if SCALES in name}
        if not self._scale_exponents:  # a resumed run has them from its checkpoint: scales have moved since
            # An offset (LSQ+) may be 0 or negative: it moves at the pace of its scale.
            size = {
                name: named[name.removesuffix("offset") + "scale"] if name.endswith(".offset") else p
                for name, p in named.items()
            }
            self._scale_exponents = {name: round(math.log2(p.detach().mean().item())) for name, p in size.items()}
        scales = {parameter: self._scale_exponents[name] for name, parameter in named.items()}
        for group in optimizer.param_groups:
            group["params"] = [parameter for parameter in group["params"] if parameter not in scales]
        template = {key: value for key, value in optimizer.param_groups[-1].items() if key != "params"}
        for exponent in sorted(set(scales.values())):
            members = [parameter for parameter, own in scales.items() if own == exponent]
            own = {"lr": template["lr"] * 2.0**exponent, "weight_decay": 0.0, "scale_exponent": exponent}
            optimizer.add_param_group({**template, **own, "params": members})
        return optimizer

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        with weights_kept(self.modules):
            return super().evaluation_loop(*args, **kwargs)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """What the Trainer logs (to TensorBoard, say), and beside it where the search stands."""
        if "loss" in logs:
            logs |= {f"search/{name}": self._entry[name] for name in SEARCH_MEASURES if name in self._entry}
        super().log(logs, start_time)

    def _flush(self) -> None:
        """Read the losses of the last steps from the device, check them, write the history."""
        entries, self._pending = self._pending, []
        if not entries:
            return
        losses = mean_over_processes(torch.stack([entry["loss"] for entry in entries])).tolist()
        for entry, loss in zip(entries, losses, strict=True):
            if not math.isfinite(loss):
                raise self._diverged("loss", loss, entry["step"], entry.get("choice"))
            entry["loss"] = loss
        if self.history is not None:
            self.history.write(entries)
        if self.search is not None:
            show_policy(self.callback_handler.callbacks, self.space, entries)
        if self.on_step is not None:
            for entry in entries:
                self.on_step(entry)

    def _diverged(self, what: str, value: float, step: int, choice: Sequence[int] | None = None) -> TrainingDiverged:
        formats = self.assignment if choice is None else self.space.assignment(choice)
        if choice is None and self._choices is not None:
            formats = self.space.assignment(self._choices[0].tolist())
        text = ", ".join(f"{name} {w}/{a}" for name, (w, a) in (formats or {}).items()) or "float"
        return TrainingDiverged(f"{what} is {value} at step {step} under the assignment: {text}")

    # ------------------------------------------------------ checkpoints, without pickles

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        self._flush()
        if not self.args.should_save:
            return
        folder = Path(output_dir)
        state = {
            "optimizer": self.optimizer.state_dict(),
            "scheduler": self.lr_scheduler.state_dict(),
            "targets": [
                {
                    "search": None if target.search is None else target.search.state_dict(),
                    "contest": target.contest,
                    "limits": None if target.budget is None else list(target.budget.limits),
                    "assignment": None if target.assignment is None else assignment_to_json(target.assignment),
                }
                for target in self.targets
            ],
            "scale_exponents": self._scale_exponents,
            "settled": self._settled,
            "float_quality": self._float_quality,
        }
        checkpoint.save_state(state, folder / STATE)

    def _load_optimizer_and_scheduler(self, checkpoint_folder: str | None) -> None:
        if checkpoint_folder is None:
            return
        state = checkpoint.load_state(Path(checkpoint_folder) / STATE)
        self.optimizer.load_state_dict(state["optimizer"])
        self.lr_scheduler.load_state_dict(state["scheduler"])
        self._settled, self._float_quality = state["settled"], state["float_quality"]
        for target, saved in zip(self._in_turn(), state["targets"], strict=True):
            if target.budget is not None:
                target.budget = replace(target.budget, limits=tuple(saved["limits"]))
            if saved["search"] is not None:
                self._start_search()
                assert target.search is not None
                target.search.load_state_dict(saved["search"])
            target.contest = saved["contest"]
            if saved["assignment"] is not None:
                target.assignment = assignment_from_json(saved["assignment"])
        self._turn = self.state.global_step % len(self.targets)
        if self.assignment is not None:
            set_formats(self.modules, self.assignment)
        if self.history is not None:
            self.history.truncate(self.state.global_step)

    def _save_rng_state(self, output_dir: str) -> None:
        checkpoint.save_state(checkpoint.random_state(), Path(output_dir) / f"random_{self.args.process_index}")
        self.accelerator.wait_for_everyone()  # what follows declares the checkpoint complete

    def _load_rng_state(self, checkpoint_folder: str | None) -> None:
        if checkpoint_folder is not None:
            path = Path(checkpoint_folder) / f"random_{self.args.process_index}"
            checkpoint.restore_random_state(checkpoint.load_state(path))

    def _save_scaler(self, output_dir: str) -> None:
        if self.accelerator.scaler is not None and self.args.should_save:
            checkpoint.save_state(self.accelerator.scaler.state_dict(), Path(output_dir) / "scaler")

    def _load_scaler(self, checkpoint_folder: str | None) -> None:
        if checkpoint_folder is not None and self.accelerator.scaler is not None:
            self.accelerator.scaler.load_state_dict(checkpoint.load_state(Path(checkpoint_folder) / "scaler"))

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Tensor] | None = None) -> None:
        folder = Path(output_dir or str(self.args.output_dir))
        state = {
            name: tensor.detach().cpu().contiguous().clone()
            for name, tensor in (state_dict or self.model.state_dict()).items()
        }
        checkpoint.save_tensors(state, folder / "model.safetensors")

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        tensors = checkpoint.load_tensors(Path(resume_from_checkpoint) / "model.safetensors")
        (model or self.model).load_state_dict(tensors)


def quality(loss: Tensor, outputs: Any, batch: Mapping[str, Tensor], kind: str) -> Tensor:
    """Quality in (0, 1] of a batch, 0-d: what the reward sees.

    likelihood: mean probability of the true class; exp(-loss) where there is no class to be sure of (language models,
    regression). accuracy: share of examples whose largest logit is the truth.
    """
    logits = class_logits(outputs, batch)
    if logits is None:
        value = torch.exp(-loss.float())
    elif kind == "accuracy":
        value = (logits.argmax(dim=1) == batch["labels"]).float().mean()
    else:
        value = logits.float().softmax(dim=1).gather(1, batch["labels"].view(-1, 1)).mean()
    return torch.where(value > 0, value, torch.where(value.isnan(), value, torch.finfo(torch.float32).tiny))


def class_logits(outputs: Any, batch: Mapping[str, Tensor]) -> Tensor | None:
    """The logits (examples, classes) of a model that tells classes apart; None for any other."""
    labels: Any = batch.get("labels")
    logits: Any = outputs.get("logits") if isinstance(outputs, Mapping) else getattr(outputs, "logits", None)
    classes = logits is not None and labels is not None and logits.dim() == 2 and logits.shape[1] > 1
    return logits if classes and not labels.is_floating_point() else None


def _each(bits: float | tuple[float, ...] | None) -> tuple[float | None, ...]:
    return bits if isinstance(bits, tuple) else (bits,)


def _hold_out(size: int, seed: int, fraction: float = 0.1) -> list[int]:
    """A random tenth of `size` rows."""
    order = torch.randperm(size, generator=torch.Generator().manual_seed(seed)).tolist()
    return sorted(order[: max(1, round(size * fraction))])
