"""Which training rows a step sees: the held-out ones stay out until the policy no longer needs them."""

from __future__ import annotations

from collections.abc import Collection, Iterator

import torch
from torch.utils.data import Sampler


class PhasedSampler(Sampler[int]):
    """Shuffled passes over the rows that are not held out; from a position on, over all rows.

    An epoch is as long as the first phase's pass, throughout, so that step counts mean the same with and without the
    second phase. What stands at a position depends on the seed alone: a resumed run sees the same rows.
    """

    def __init__(self, size: int, held_out: Collection[int], returned_at: int, seed: int) -> None:
        """`size` rows, of which `held_out` are left out before position `returned_at`, counted over all epochs."""
        held = set(held_out)
        self.kept = [row for row in range(size) if row not in held]
        self.size = size
        self.returned_at = returned_at
        self.seed = seed
        self.epoch = 0
        self._pass: tuple[tuple[bool, int], list[int]] | None = None

    def set_epoch(self, epoch: int) -> None:
        """The next pass is that of this epoch, from 0."""
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.kept)

    def __iter__(self) -> Iterator[int]:
        start = self.epoch * len(self)
        return (self.row(position) for position in range(start, start + len(self)))

    def row(self, position: int) -> int:
        """The row at a position, counted from the start of the run."""
        returned = position >= self.returned_at
        rows = range(self.size) if returned else self.kept
        which, offset = divmod(position - (self.returned_at if returned else 0), len(rows))
        if self._pass is None or self._pass[0] != (returned, which):
            generator = torch.Generator().manual_seed(self.seed * 1_000_003 + 2 * which + returned)
            self._pass = (returned, which), torch.randperm(len(rows), generator=generator).tolist()
        return rows[self._pass[1][offset]]
