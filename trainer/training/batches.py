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
from transformers.trainer_utils import has_length

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


def steps_per_epoch(rows: int, batch_size: int, accumulation: int, drop_last: bool) -> int:
    """Return the optimizer steps of a pass over `rows`, counted as transformers' Trainer counts them."""
    batches = math.floor(rows / batch_size) if drop_last else math.ceil(rows / batch_size)
    return max(1, math.ceil(batches / accumulation))
