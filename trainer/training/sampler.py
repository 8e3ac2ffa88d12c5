"""Which training rows a step sees: rows held out for the search are added back once the assignment is chosen."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import Any

import numpy as np
import torch
from torch.utils.data import Sampler

from quant.errors import UserError


def held_out_size(rows: int, fraction: float) -> int:
    """Number of training rows that the search keeps for itself, of `rows`."""
    return max(1, round(rows * fraction))


def hold_out(dataset: Any, fraction: float, seed: int) -> list[int]:
    """Pick the training rows that the search keeps for itself, stratified by class where there are classes.

    Classes are the integers of `dataset.labels`, or of the column "labels" of a `datasets.Dataset`. Splits without such
    labels (values, token sequences, unknown) and splits too small to hold every class are plain random ones.

    Args:
        dataset: map-style training data.
        fraction: share of the rows to hold out, in (0, 1).
        seed: seed of the split.

    Returns:
        The sorted indices of the held-out rows: at least one, and fewer than all.

    Raises:
        UserError: if no row would be left on one of the two sides.
    """
    from sklearn.model_selection import train_test_split

    rows = len(dataset)
    size = held_out_size(rows, fraction)
    if not 0 < fraction < 1 or size >= rows:
        raise UserError(f"--search_fraction {fraction}: needs a share in (0, 1) that leaves some of {rows} rows")
    labels = _labels(dataset)
    strata = None
    if len(labels) == rows and all(isinstance(label, int) for label in labels):
        counts = np.unique(labels, return_counts=True)[1]
        if counts.min() >= 2 and len(counts) <= min(size, rows - size):
            strata = labels
    _, held_out = train_test_split(np.arange(rows), test_size=size, random_state=seed, stratify=strata)
    return sorted(held_out.tolist())


def _labels(dataset: Any) -> list[Any]:
    labels = getattr(dataset, "labels", None)
    if labels is None and "labels" in (getattr(dataset, "column_names", None) or ()):
        labels = dataset["labels"][:]
    return list(labels or ()) if labels is None or isinstance(labels, list) else np.asarray(labels).tolist()


class PhasedSampler(Sampler[int]):
    """Shuffled passes over the rows that are not held out; from a given position on, over all rows.

    An epoch always has the length of a pass without the held-out rows, so that step counts do not depend on the second
    phase. The row at a position depends on the seed alone: a resumed run sees the same rows.

    Args:
        size: number of rows.
        held_out: rows to leave out at first.
        returned_at: position, counted over all epochs, from which on all rows are used.
        seed: seed of the order.
    """

    def __init__(self, size: int, held_out: Collection[int], returned_at: int, seed: int) -> None:
        held = set(held_out)
        self.kept = [row for row in range(size) if row not in held]
        self.size = size
        self.returned_at = returned_at
        self.seed = seed
        self.epoch = 0
        self._pass: tuple[tuple[bool, int], list[int]] | None = None

    def set_epoch(self, epoch: int) -> None:
        """Select the epoch, from 0, of the next pass."""
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.kept)

    def __iter__(self) -> Iterator[int]:
        start = self.epoch * len(self)
        return (self.row(position) for position in range(start, start + len(self)))

    def row(self, position: int) -> int:
        """Return the row at a position counted from the start of the run."""
        returned = position >= self.returned_at
        rows = range(self.size) if returned else self.kept
        which, offset = divmod(position - (self.returned_at if returned else 0), len(rows))
        if self._pass is None or self._pass[0] != (returned, which):
            generator = torch.Generator().manual_seed(self.seed * 1_000_003 + 2 * which + returned)
            self._pass = (returned, which), torch.randperm(len(rows), generator=generator).tolist()
        return rows[self._pass[1][offset]]
