"""BatchReader: collated batches of chosen rows, in orders that depend on the seed alone.

A resumed run, and each of several processes, then sees the same rows.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.data import IterableDataset
from transformers import TrainingArguments
from transformers.trainer_utils import has_length

from quant.errors import UserError
from trainer.training.progress import Listener, counted, unheard


@dataclass
class BatchReader:
    """Reads rows of map-style datasets as the batches of a Trainer."""

    collate: Callable[[list[Any]], Any]
    """Items -> batch on the model's device."""
    seed: int

    def order(self, dataset: Any, salt: int) -> list[int]:
        """Return a permutation of the dataset's rows that depends on the seed and `salt`."""
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + salt)
        return torch.randperm(len(dataset), generator=generator).tolist()

    def read(self, dataset: Any, rows: Iterable[int]) -> Any:
        """Return one batch of the given rows; a dataset with `__getitems__` is asked for all of them at once."""
        indices = list(rows)
        return self.collate(
            dataset.__getitems__(indices) if hasattr(dataset, "__getitems__") else [dataset[i] for i in indices]
        )

    def all_of(self, dataset: Any, size: int) -> Iterator[Any]:
        """Yield the whole dataset in its order, in batches of `size`."""
        for start in range(0, len(dataset), size):
            yield self.read(dataset, range(start, min(start + size, len(dataset))))

    def sample(
        self,
        dataset: Any,
        examples: int,
        size: int,
        *,
        exclude: Collection[int] = (),
        phase: str | None = None,
        tell: Listener = unheard,
    ) -> Iterator[Any]:
        """Yield the same random rows at every call, augmented as in training.

        Args:
            dataset: training data.
            examples: number of rows.
            size: rows per batch; a last batch of a single row is dropped, since it has no variance for a batch norm.
            exclude: rows to leave out.
            phase: reports progress under this name; None: no reports.
            tell: listener of the reports.
        """
        left_out = set(exclude)
        rows = [row for row in self.order(dataset, salt=0) if row not in left_out][:examples]
        if len(rows) % size == 1 and len(rows) > 1:
            rows.pop()
        starts: Iterable[int] = range(0, len(rows), size)
        if phase is not None:
            starts = counted(starts, math.ceil(len(rows) / size), phase, tell)
        for start in starts:
            yield self.read(dataset, rows[start : start + size])


def streams(dataset: Any) -> bool:
    """Whether a dataset can only be iterated: it has no length, or no access by index."""
    return dataset is not None and (isinstance(dataset, IterableDataset) or not has_length(dataset))


def check_training_data(dataset: Any, search: bool) -> None:
    """Raise UserError for training data without rows by index, or for none where a search needs it."""
    if search and dataset is None:
        raise UserError("a search needs a train_dataset: it calibrates, measures and trains on it")
    if streams(dataset):
        kind = type(dataset).__name__
        raise UserError(f"train_dataset needs a length and rows by index, got a stream ({kind}): gather it in a list")


@dataclass(frozen=True)
class TrainingLength:
    """Length of a training in rows and optimizer steps, counted as transformers' Trainer counts them."""

    rows: int
    """Training rows per epoch."""
    batch_size: int
    """Training examples per batch in all processes together."""
    accumulation: int
    """Batches per optimizer step."""
    drop_last: bool
    max_steps: int
    """Optimizer steps of the training; negative: given by `epochs`."""
    epochs: float

    @classmethod
    def of(cls, args: TrainingArguments, dataset: Any, held_out: int) -> TrainingLength:
        """Return the length of a training on a dataset, some of whose rows are held out; None: there is no training."""
        rows = 0 if dataset is None else len(dataset) - held_out
        batches = args.per_device_train_batch_size * args.world_size, args.gradient_accumulation_steps
        return cls(rows, *batches, args.dataloader_drop_last, args.max_steps, args.num_train_epochs)

    @property
    def step_examples(self) -> int:
        """Training examples per optimizer step."""
        return self.batch_size * self.accumulation

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps per epoch."""
        batches = self.rows // self.batch_size if self.drop_last else math.ceil(self.rows / self.batch_size)
        return max(1, math.ceil(batches / self.accumulation))

    @property
    def steps(self) -> int:
        """Optimizer steps of the training."""
        return self.max_steps if self.max_steps >= 0 else math.ceil(self.epochs * self.steps_per_epoch)

    def position(self, step: int) -> int:
        """Return the number of rows that all steps before `step` have read."""
        epoch, within = divmod(step, self.steps_per_epoch)
        return epoch * self.rows + min(within * self.step_examples, self.rows)
