"""StepLogger: collects the measures of each step and passes them on, without reading the device at every step."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import CallbackHandler

from policy.space import SearchSpace
from quant.convert import Assignment
from trainer.training.distributed import mean_over_processes
from trainer.training.history import History
from trainer.training.policy_plots import show_policy

FLUSH_STEPS = 10
"""Steps between writes: the losses are read from the device then, not at every step."""
LOGGED_MEASURES = ("reward", "quality", "cost", "entropy")
"""Measures of the search that the Trainer's own logs contain too."""


class TrainingDiverged(RuntimeError):
    """A loss or reward is not finite; the message names the step and the assignment."""


class StepLogger(TrainerCallback):
    """Writes one entry per step to the history, to TensorBoard and to a listener.

    Args:
        callbacks: handler of the Trainer's callbacks, among which a TensorBoard writer is looked up.
        formats_of: choice -> its assignment, for errors; None stands for a step without a draw.
        space: search space of the policy plots; None: there is no search.
        history: file of the entries.
        on_step: called with every entry.
    """

    def __init__(
        self,
        callbacks: CallbackHandler,
        formats_of: Callable[[Sequence[int] | None], Assignment | None],
        space: SearchSpace | None = None,
        history: Path | None = None,
        on_step: Callable[[dict[str, Any]], None] | None = None,
    ) -> None:
        self.callbacks, self.formats_of, self.space = callbacks, formats_of, space
        self.history, self.on_step = None if history is None else History(history), on_step
        self.entry: dict[str, Any] = {}
        """Entry of the current step."""
        self._pending: list[dict[str, Any]] = []

    def truncate(self, step: int) -> str | None:
        """Remove the history after `step`, as those steps are run again; return a note if earlier ones are lost."""
        if self.history is None or not (lost := self.history.truncate(step)):
            return None
        return f"{self.history.path.name} was damaged: it lacks {lost} of the {step} steps"

    def begin(self, entry: dict[str, Any]) -> None:
        """Start the entry of a step."""
        self.entry = entry

    def add_loss(self, loss: Tensor) -> None:
        """Add the loss of one of the accumulated batches, scalar."""
        self.entry["loss"] = self.entry["loss"] + loss if "loss" in self.entry else loss

    def end(self) -> None:
        """Complete the entry of a step."""
        self._pending.append(self.entry)

    def measures(self) -> dict[str, Any]:
        """Return the current step's measures of the search, as the Trainer logs them."""
        return {f"search/{name}": self.entry[name] for name in LOGGED_MEASURES if name in self.entry}

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Write the entries every `FLUSH_STEPS` steps."""
        if len(self._pending) >= FLUSH_STEPS:
            self.flush()

    def flush(self) -> None:
        """Read the losses from the device, check them and write all pending entries.

        Raises:
            TrainingDiverged: for a loss that is not finite.
        """
        entries, self._pending = self._pending, []
        if not entries:
            return
        losses = mean_over_processes(torch.stack([entry["loss"] for entry in entries])).tolist()
        for entry, loss in zip(entries, losses, strict=True):
            if not math.isfinite(loss):
                raise self.diverged("loss", loss, entry["step"], entry.get("choice"))
            entry["loss"] = loss
        self._write(entries)

    def _write(self, entries: list[dict[str, Any]]) -> None:
        if self.history is not None:
            self.history.write(entries)
        if self.space is not None:
            show_policy(self.callbacks.callbacks, self.space, entries)
        for entry in entries if self.on_step is not None else ():
            self.on_step(entry)  # type: ignore[misc]

    def diverged(self, what: str, value: float, step: int, choice: Sequence[int] | None) -> TrainingDiverged:
        """Return the error for a loss or reward that is not finite."""
        formats: Mapping[str, Any] = self.formats_of(choice) or {}
        text = ", ".join(f"{name} {w}/{a}" for name, (w, a) in formats.items()) or "float"
        return TrainingDiverged(f"{what} is {value} at step {step} under the assignment: {text}")
