"""ReinforceTrainer: transformers' Trainer whose model changes formats under a search, or under none."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset, Sampler, Subset
from transformers import TrainerState, TrainingArguments
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import has_length

from cost.cost import assignment_from_json, assignment_to_json
from cost.profile import LayerProfile, profile_model, tied_in
from policy.budget import Budget, Limit
from policy.solve import Table
from policy.space import Partition, SearchSpace, build_space
from quant.analysis.float_share import FloatShare, float_share
from quant.analysis.reach import notes_on_reach, reach_of
from quant.convert import (
    Assignment,
    calibrate,
    check_tied,
    in_float,
    quantize_model,
    rounded_weights_cached,
    set_formats,
)
from quant.errors import NotFiniteError, UserError
from quant.formats import Format, parse_search_space
from quant.quant_module import QuantModule, Reach, runs_in
from quant.quantizers.quantizer import Quantizer
from trainer.search.baselines import allocate, effects, propose
from trainer.search.diagnostics import SAMPLES, additivity, all_if_affordable, certificate
from trainer.search.evaluator import JudgingTrainer, quality, streams
from trainer.search.quality_constraint import STEPS as HALVINGS
from trainer.search.quality_constraint import cheapest_budget, cheapest_choice, limited
from trainer.search.search_state import Phases, ReinforceConfig, Search, resolve_target
from trainer.search.selection import PROPOSALS, ROUNDS, Contest
from trainer.search.sensitivity import believing_prior
from trainer.training import checkpoint, checksums
from trainer.training.batch_norm import has_untrained_batch_norm, recalibrate_batch_norm
from trainer.training.distillation import Teacher, class_logits
from trainer.training.distributed import mean_over_processes, of_first_process, share_buffers
from trainer.training.history import History
from trainer.training.policy_plots import show_policy
from trainer.training.progress import Listener, Passes, unheard
from trainer.training.quantization_file import write_companions, write_quantization
from trainer.training.sampler import PhasedSampler, hold_out
from trainer.training.scale_groups import SCALES, group_scales, needs_groups, scale_exponents

__all__ = ["ReinforceConfig", "ReinforceTrainer", "TrainingDiverged", "quality"]

logger = logging.getLogger(__name__)
STATE = "training"
"""file of a checkpoint that holds everything but the model and the random generators"""
SEARCH_MEASURES = ("reward", "quality", "cost", "entropy")
FLUSH_STEPS = 10
"""steps between writes of the history: losses are read from the device then, not at every step"""
RECALIBRATING = "calibrating the chosen formats"
SEARCH_FRACTION = 0.1
"""share of the training rows that a search without a `search_dataset` holds out"""
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


class ReinforceTrainer(JudgingTrainer):
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
        teacher: the float model: a search then judges by the distance from its class probabilities, and trains towards
            them if it has a share of the loss.
        history: file that gets one line a step.
        calibration_samples: training examples that ranges are calibrated on; None: 8 batches.
        after_calibration: called once ranges are there, to make them better.
        on_progress: hears how far the run is: calibrating, measuring, training, choosing, evaluating.
    """

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
        teacher: Teacher | None = None,
        history: Path | None = None,
        on_step: Callable[[dict[str, Any]], None] | None = None,
        calibration_samples: int | None = None,
        after_calibration: Callable[[ReinforceTrainer], None] | None = None,
        on_progress: Listener | None = None,
        **trainer_arguments: Any,
    ) -> None:
        if teacher is not None and teacher.model is model:
            raise ValueError("the teacher is the model itself: give it a copy, Teacher(copy.deepcopy(model))")
        if streams(train_dataset):
            kind = type(train_dataset).__name__
            raise UserError(
                f"train_dataset needs a length and rows by index, got a stream ({kind}): gather it in a list"
            )
        if search is not None and train_dataset is None:
            raise UserError("a search needs a train_dataset: it calibrates, measures and trains on it")
        formats = parse_search_space(search_space) if isinstance(search_space, str) else tuple(search_space)
        if wrong := [entry for entry in formats if not isinstance(entry, Format)]:
            text = ",".join(map(str, formats))
            raise UserError(f"search_space holds {wrong[0]!r}, which is no Format: pass search_space={text!r}")
        if search is not None and modules is None:
            modules = quantize_model(model, formats=formats)
        self.modules = dict(modules or {})
        check_tied(self.modules, assignment or {})
        searching = search is not None and search.method == "search"
        if searching and search_dataset is None:
            search_rows = hold_out(train_dataset, SEARCH_FRACTION, args.seed)
            search_dataset = Subset(train_dataset, search_rows)  # type: ignore[arg-type]
        args.logging_nan_inf_filter = False  # it would let a diverged run end normally
        super().__init__(model=model, args=args, train_dataset=train_dataset, **trainer_arguments)
        if self.compute_loss_func is not None and not self.label_names:
            self.label_names = ["labels"]  # else the Trainer drops what `forward` does not take
        self.search_config = search
        self.search_dataset: Any = train_dataset if search_dataset is None else search_dataset
        self.search_rows = list(search_rows) if searching else []
        first = self.is_world_process_zero()  # of several processes, one writes and tells
        self.history = History(history) if history is not None and first else None
        self.on_step = on_step if first else None
        self.tell = on_progress if first and on_progress is not None else unheard
        self._evaluated = 0
        self._to_evaluate: int | None = None
        self.teacher = teacher
        if teacher is not None:
            teacher.model.to(self.args.device)
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
        self.notes: list[str] = []
        self.reach: dict[str, Reach] = {}
        """layers that the first calibration did not reach, for good"""
        """what went otherwise than asked: part of the record"""
        self._float_quality: float | None = None
        """held-out quality of the float model, which `max_drop` counts from"""
        self._limits = tuple(limits)
        if search is not None:
            self.profiles = list(profiles or profile_model(self.model, self._batch(train_dataset, [0]), self.modules))
            if self.profiles and not any(profile.calls for profile in self.profiles):
                raise UserError(
                    f"the model calls none of its {len(self.profiles)} quantized layers: does it keep the float ones "
                    "in a list, or read their weights itself?"
                )
            self.space: SearchSpace = build_space(
                list(self.modules),
                formats,
                partition,
                weight_only_search,
                separate_activations,
                tied_in(self.profiles),
            )
            self.costs = self.space.cost_table(self.profiles, search.cost_type)
            self.targets = [Target(self._budget(bits, self._limits)) for bits in _each(search.target_bits)]

    def _budget(self, bits: float | None, limits: Sequence[Limit]) -> Budget:
        config = self._config
        if config.max_drop is not None:  # until the bisection: anything goes
            bits = max(weight.bits for weight, _ in self.space.decisions[0].choices)
        target = resolve_target(self.space, self.profiles, config.cost_type, config.cost_target, bits)
        return Budget.of(self.space, self.costs, target, limits)

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
    def cost(self) -> float:
        """What its assignment costs, in MiB or GBOPs. Raises ValueError before one is chosen."""
        if self.assignment is None:
            raise ValueError("nothing is chosen yet: train first")
        return self.budget.costs(self.space.choice(self.assignment))[0]

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
        """After the training: put the model into the assignment of target `turn`, calibrated for it.

        A model that stays in float has its batch norms recalibrated too: methods are compared, and the moving averages
        of some models (MobileNetV2's forget 0.3 % a step) are far from anything after a short training.
        """
        self._turn = turn
        if self.assignment is not None:
            set_formats(self.modules, self.assignment)
            self._recalibrate()
        if self.args.max_steps != 0:
            recalibrate_batch_norm(self.model, self.calibration_batches("recalibrating batch norms"))

    # ------------------------------------------------------ the run

    def train(self, resume_from_checkpoint: str | bool | None = None, **kwargs: Any) -> Any:  # type: ignore[override]
        """Train to the end and finish: the model then runs in `assignment`, calibrated on training data.

        resume_from_checkpoint: a checkpoint's folder, or True: the newest whole one where there is one.

        Raises TrainingDiverged for a loss or reward that is not finite, CheckpointError for a damaged folder.
        """
        if isinstance(resume_from_checkpoint, bool):
            resume_from_checkpoint = self._whole_checkpoint() if resume_from_checkpoint else None
        elif resume_from_checkpoint is not None and (why := self._flaw(Path(resume_from_checkpoint))):
            raise checkpoint.CheckpointError(f"checkpoint {resume_from_checkpoint}: {why}")
        if resume_from_checkpoint is None:
            if self.history is not None:
                self.history.truncate(0)  # of a run that was killed before its first checkpoint
            self.prepare()
        else:
            self._scale_exponents = checkpoint.load_state(Path(resume_from_checkpoint) / STATE)["scale_exponents"]
        output = None
        if resume_from_checkpoint is None or not self._is_trained(resume_from_checkpoint):
            output = super().train(resume_from_checkpoint=resume_from_checkpoint, **kwargs)
        self.finish()
        return output

    def _whole_checkpoint(self) -> str | None:
        """The newest checkpoint that is whole; newer ones are set aside, and where they are damaged a note says so."""
        newer: dict[Path, str] = {}
        found = None
        for folder in checksums.numbered(Path(str(self.args.output_dir))):
            if (why := self._flaw(folder)) is None:
                found = str(folder)
                break
            newer[folder] = why
        self.accelerator.wait_for_everyone()  # all of them look at the same folders
        for folder, why in newer.items() if self.is_world_process_zero() else ():
            checksums.set_aside(folder)
            if why != checksums.INTERRUPTED:
                then = f"went on from {Path(found).name}" if found else "started anew"
                self.note(f"{folder.name} was damaged ({why}): the run {then}")
        return found

    def _flaw(self, folder: Path) -> str | None:
        """Why the run cannot go on from a checkpoint; None where it can."""
        if why := checksums.flaw(folder):
            return why
        saved = checkpoint.tensor_shapes(folder / "model.safetensors")
        own = {name: tuple(tensor.shape) for name, tensor in self.model.state_dict().items()}
        # A quantizer makes room for the formats that it meets in a file.
        roomy = tuple(f"{name}." for name, _ in self._quantizers())
        wrong = [name for name, shape in own.items() if saved.get(name) != shape]
        wrong += [name for name in saved.keys() - own.keys() if not name.startswith(roomy)]
        return f"model.safetensors is another model's: {min(wrong)}" if wrong else None

    @property
    def outside_cost(self) -> FloatShare:
        """What no cost of this trainer counts: the matrices of its model that are not in its layers."""
        return float_share(self.model, self.modules)

    def note(self, text: str) -> None:
        """Say what a reader of the run's record must know; checkpoints remember it."""
        self.notes.append(text)
        logger.warning(text)

    def _is_trained(self, checkpoint_folder: str) -> bool:
        """Whether a checkpoint is behind the last step; what it holds is then loaded, since Trainer would go on."""
        state = TrainerState.load_from_json(str(Path(checkpoint_folder) / TRAINER_STATE_NAME))
        if state.global_step < state.max_steps:
            return False
        self.state = state
        self._load_from_checkpoint(checkpoint_folder)
        self.create_optimizer_and_scheduler(state.max_steps)
        self._load_optimizer_and_scheduler(checkpoint_folder)
        return True

    def prepare(self) -> None:
        """Before the first step: ranges from training data, the policy's prior from measured sensitivities."""
        if self.modules:
            if has_untrained_batch_norm(self.model):  # ranges seen through its starting values would clip everything
                recalibrate_batch_norm(self.model, self.calibration_batches("calibrating batch norms"))
            calibrate(self.model, self.modules, self.calibration_batches("calibrating"))
            self._take_reach(reach_of(self.modules))
            for note in notes_on_reach(self.modules):
                self.notes.append(note)  # calibration has told of it
            if self.after_calibration is not None:
                self.after_calibration(self)
        config = self.search_config
        if config is not None:
            self.find_reference_loss()
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
                self.passes = Passes("looking for the budget", (HALVINGS + 3) * self.judging_passes)
                self._float_quality = self._quality_in_float()
                self._lower_budget(-effect)
                self.passes = None
            candidates: dict[str, list[int]] = {}
            if effect is not None:
                prior, pressure = believing_prior(effect, self.budget)
                if config.contest:
                    candidates = propose(self, {config.policy_prior: effect})
            self._start_search(of_first_process(prior), of_first_process(pressure), candidates)

    def _take_reach(self, reach: Mapping[str, Reach]) -> None:
        """Let what is chosen, and what it costs, be what layers run in that calibration did not reach."""
        if not reach:
            return
        self.reach = dict(reach)
        for name, found in reach.items():
            self.modules[name].reach = found
        for target in self.targets:
            if target.assignment is not None:
                given = target.assignment.items()
                target.assignment = {name: runs_in(reach.get(name, "called"), pair) for name, pair in given}
        if self.search_config is not None:
            self.space = replace(self.space, reach=reach)
            self.costs = self.space.cost_table(self.profiles, self.search_config.cost_type)
            for target, bits in zip(self.targets, _each(self.search_config.target_bits), strict=True):
                target.budget = self._budget(bits, self._limits)

    def finish(self) -> None:
        """Settle on the assignment, recalibrate what it changed, and write the rest of the history."""
        if self.search is not None and not self._settled:
            self._settle()
        share_buffers(self.model)
        self.use(len(self.targets) - 1)
        self._flush()

    @property
    def _least_quality(self) -> float | None:
        """What `max_drop` leaves of the float model's held-out quality; None where it was not asked for."""
        if self._config.max_drop is None or self._float_quality is None:
            return None
        return self._float_quality - self._config.max_drop

    def _drop_of(self, quality: float) -> dict[str, Any]:
        """What the record says of `max_drop`, if it was asked for."""
        if (floor := self._least_quality) is None:
            return {}
        told = {"float_quality": self._float_quality, "max_drop": self._config.max_drop}
        return {**told, "within_drop": quality >= floor}

    def _quality_in_float(self) -> float:
        nowhere = np.zeros(self.space.num_decisions, dtype=int)
        with in_float(self.modules):
            return float(self.judge([nowhere.tolist()], in_formats=False)[0, 1].mean())

    def _lower_budget(self, values: Table) -> None:
        """The least budget whose most valuable choice keeps the held-out quality within `max_drop` of float."""
        floor = self._least_quality
        assert floor is not None
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

    def _settle(self) -> None:
        """From here on, only the chosen assignment of each target is trained."""
        share_buffers(self.model)
        for target in self._in_turn():
            target.assignment = self._agreed(self._choose(target))
        self.passes = None
        self._settled = True
        for target in self._in_turn():
            assert target.assignment is not None
            set_formats(self.modules, target.assignment)
            self._recalibrate()

    def _choose(self, target: Target) -> list[int]:
        assert target.search is not None
        best = target.search.best()
        if not self._config.contest:
            return best
        # Only batches too small to go by their own statistics see these; those of training are a mixture of all draws.
        set_formats(self.modules, self.space.assignment(best))
        recalibrate_batch_norm(self.model, self.calibration_batches())
        affordable = max(8, self._affordable_judgements(1 / 20))
        self.passes = Passes("choosing", self._passes_of_contest(len(target.search.candidates) + 1, affordable))
        if self._config.max_drop is not None:
            self._lower_budget(target.search.values())
            target.search.budget = self.budget
            best = target.search.best()
        contest = Contest(self.budget, self.judge, self._contest_rounds, self.decide_by)
        candidates = {name: c for name, c in target.search.candidates.items() if self.budget.fits(c)}
        verdict = contest.decide({**candidates, "policy": best})
        everything = all_if_affordable(contest, affordable)  # then the certificate judges all there is anyway
        if everything is not None and (least := contest.best_of_all(everything, verdict.choice)) != verdict.choice:
            verdict = replace(verdict, choice=least, origin="the best of all")
        if (floor := self._least_quality) is not None:
            cheapest = cheapest_choice(contest, verdict.choice, floor, everything)
            if cheapest != verdict.choice:
                verdict = replace(verdict, choice=cheapest, origin=f"cheaper than {verdict.origin}")
            lower = limited(self.budget, self.budget.costs(cheapest)[0])
            target.budget = target.search.budget = contest.budget = lower
        told = verdict.describe()
        target.contest = {
            **told,
            "judged_by": self.judged_by,
            "decided_by": "the same examples" if contest.decide_by is None else "other examples",
            **self._drop_of(told["held_out_quality"]),
            "certificate": certificate(contest, verdict.choice, affordable, self.args.seed),
            "additivity": additivity(contest, verdict.choice, self.args.seed),
        }
        return list(verdict.choice)

    @property
    def _contest_rounds(self) -> int:
        """Measuring the neighbours of a choice is most of the contest's work; once is the least."""
        rounds = self._affordable_judgements(1 / 4) // (2 * self.space.num_decisions)
        return min(max(rounds, 1), ROUNDS)

    def _passes_of_contest(self, candidates: int, affordable: int) -> int:
        """Forward passes that `_choose` takes at most, about: what it can judge, in the batches that it judges on."""
        decisions, rounds = self.space.num_decisions, self._contest_rounds
        near, far = 2 * decisions, decisions * (self.space.num_choices - 1)
        judged = candidates + rounds * (near + PROPOSALS) + far + affordable + near + SAMPLES
        deciding = 2 * (rounds + 1) * len(self._batch_starts(*self._deciding_rows))
        return min(judged, max(self.budget.size, 1)) * self.judging_passes + deciding

    def _agreed(self, choice: Sequence[int]) -> dict[str, tuple[Format, Format]]:
        """The assignment of a choice, the first process's where there are several."""
        agreed = of_first_process(torch.tensor(list(choice)))
        assert agreed is not None
        return self.space.assignment(agreed.tolist())

    def _recalibrate(self) -> None:
        try:
            calibrate(self.model, self.modules, self.calibration_batches(RECALIBRATING), learned=False)
        except NotFiniteError as error:  # before training it would have been wrong input
            self._flush()  # which names the step, if the loss has shown it
            raise TrainingDiverged(f"{error}, after {self.state.global_step} steps") from None

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
        inputs = dict(inputs)  # a loss function of one's own takes the labels out of them
        batch = dict(inputs)
        loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)  # type: ignore[misc]
        if not isinstance(loss, Tensor) or (loss.numel() != 1 and self.args.n_gpu < 2):
            got = f"a tensor of shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else repr(loss)
            raise UserError(
                f"{type(self.model).__name__} returns {got} where its loss should be: return {{'loss': ..., 'logits': "
                "...} or (loss, logits) where there are labels, or pass compute_loss_func"
            )
        if self.compute_loss_func is not None and isinstance(outputs, Tensor | tuple):
            # The Trainer takes what comes first for the loss, and would drop an output, or the first row of one.
            outputs = (loss, *outputs) if isinstance(outputs, tuple) else (loss, outputs)
        if self.teacher is None or not self.teacher.share or not model.training:
            return (loss, outputs) if return_outputs else loss
        logits = class_logits(outputs, batch, checked=False)
        counted = num_items_in_batch if self.model_accepts_loss_kwargs else None
        loss = self.teacher.loss(loss, logits, batch, counted)
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
        self.tell("training", step + 1, self.state.max_steps, entry["phase"])
        if len(self._pending) >= FLUSH_STEPS:
            self._flush()

    # ------------------------------------------------------ data

    def _get_train_sampler(self, train_dataset: Dataset | None = None) -> Sampler | None:
        if not self.search_rows:
            return super()._get_train_sampler(train_dataset)
        returned_at = self._position(Phases.of(self._config, self._total_steps()).settle)
        return PhasedSampler(self._rows, self.search_rows, returned_at, self.args.seed)

    def _position(self, step: int) -> int:
        """Rows that all steps before `step` have taken, counted as `PhasedSampler` counts them."""
        rows = self._rows - len(self.search_rows)
        epoch, within = divmod(step, self._steps_per_epoch())
        return epoch * rows + min(within * self._step_examples, rows)

    # ------------------------------------------------------ optimizer, history

    def get_decay_parameter_names(self, model: nn.Module) -> list[str]:
        """Weight decay is for weights: a learned scale would shrink its grid."""
        return [name for name in super().get_decay_parameter_names(model) if SCALES not in name]

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """The Trainer's optimizer, in which learned scales move at a pace of their own, see `scale_groups`."""
        optimizer = super().create_optimizer(model)
        if needs_groups(optimizer):
            if not self._scale_exponents:  # a resumed run has them from its checkpoint: scales have moved since
                self._scale_exponents = scale_exponents(self.model)
            group_scales(optimizer, self.model, self._scale_exponents)
        return optimizer

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        """The Trainer's; while the search goes on, of its best choice so far, and not of what was drawn last."""
        search = self.targets[-1].search
        if search is not None and not self._settled:
            set_formats(self.modules, self.space.assignment(search.best()))
        loader = args[0] if args else kwargs["dataloader"]
        self._evaluated, self._to_evaluate = 0, len(loader) if has_length(loader) else None
        self.tell("evaluating", 0, self._to_evaluate)
        with rounded_weights_cached(self.modules):
            return super().evaluation_loop(*args, **kwargs)

    def prediction_step(self, *args: Any, **kwargs: Any) -> Any:
        """The Trainer's; listeners hear of the batch."""
        predicted = super().prediction_step(*args, **kwargs)
        self._evaluated += 1
        self.tell("evaluating", self._evaluated, self._to_evaluate, f"batch {self._evaluated}")
        return predicted

    def _determine_best_metric(self, metrics: dict[str, float], trial: Any) -> bool:
        """Whether this is the best evaluation so far: only of the chosen assignment can weights be the run's."""
        return self._settled and super()._determine_best_metric(metrics, trial)

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

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Write the model; with its ranges and formats, once these are chosen, for `eval.saved_model.load_model`."""
        super().save_model(output_dir, _internal_call)
        if not self.args.should_save or _internal_call:
            return
        folder = Path(output_dir or str(self.args.output_dir))
        write_companions(folder, self)
        if self.assignment:
            write_quantization(folder, self.model, self.modules, self.assignment)

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
            "reach": self.reach,
            "notes": self.notes,
            "float_quality": self._float_quality,
            "reference_loss": self.reference_loss,
            "token_quantiles": {name: q.token_quantiles for name, q in self._quantizers() if q.token_quantiles},
        }
        checkpoint.save_state(state, folder / STATE)

    def _quantizers(self) -> Iterator[tuple[str, Quantizer]]:
        return ((name, part) for name, part in self.model.named_modules() if isinstance(part, Quantizer))

    def _load_optimizer_and_scheduler(self, checkpoint_folder: str | None) -> None:
        if checkpoint_folder is None:
            return
        state = checkpoint.load_state(Path(checkpoint_folder) / STATE)
        self.optimizer.load_state_dict(state["optimizer"])
        self.lr_scheduler.load_state_dict(state["scheduler"])
        self._settled, self._float_quality = state["settled"], state["float_quality"]
        self.reference_loss = state.get("reference_loss")  # older checkpoints have none
        for name, quantizer in self._quantizers():
            quantizer.token_quantiles = state["token_quantiles"].get(name, {})
        self._take_reach(state.get("reach", {}))
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
        self.notes = [*state.get("notes", ()), *self.notes]
        if self.history is not None and (lost := self.history.truncate(self.state.global_step)):
            self.note(f"{self.history.path.name} was damaged: it lacks {lost} of the {self.state.global_step} steps")


def _each(bits: float | tuple[float, ...] | None) -> tuple[float | None, ...]:
    return bits if isinstance(bits, tuple) else (bits,)
