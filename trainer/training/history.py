"""History: history.jsonl with one line per step of a run."""

from __future__ import annotations

import json
import os
from pathlib import Path
from statistics import median
from typing import Any

from trainer.training.atomic import write_atomically

RISE = 3.0
"""Ratio of the end of a loss to its start from which it has risen."""
LEAST_START = 0.5
"""Least value of a start: the losses of a model that fits its data are small, and single batches far above them."""


class History:
    """Appends one JSON object per step; a resumed run continues after the checkpoint's step."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def write(self, entries: list[dict[str, Any]]) -> None:
        """Append entries, one line each: all of them, or none if the disk is full."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        size = self.path.stat().st_size if self.path.exists() else 0
        try:
            with self.path.open("a") as file:
                file.writelines(json.dumps(entry, allow_nan=False) + "\n" for entry in entries)
        except OSError:
            os.truncate(self.path, size)
            raise

    def truncate(self, step: int) -> int:
        """Remove the entries after `step`, because those steps are run again.

        Returns:
            The number of steps up to `step` without a readable entry.
        """
        kept = [entry for entry in self.entries() if entry["step"] <= step]
        if self.path.exists():
            text = "".join(json.dumps(entry, allow_nan=False) + "\n" for entry in kept)
            write_atomically(self.path, lambda temporary: Path(temporary).write_text(text))
        return step - len(kept)

    def rise(self) -> tuple[float, float] | None:
        """Return (start, end) of a loss that ended far above its start, else None."""
        losses = [entry["loss"] for entry in self.entries() if isinstance(entry.get("loss"), int | float)]
        if not losses:
            return None
        few = max(1, min(10, len(losses) // 10))
        start, end = median(losses[:few]), median(losses[-few:])
        return (start, end) if end > RISE * max(start, LEAST_START) else None

    def entries(self) -> list[dict[str, Any]]:
        """Return all readable entries; a line that was cut off when the run was killed is skipped."""
        found = []
        for line in self.path.read_bytes().splitlines() if self.path.exists() else ():
            try:
                entry = json.loads(line)
            except ValueError:  # no JSON, or no text
                continue
            if isinstance(entry, dict) and isinstance(entry.get("step"), int):
                found.append(entry)
        return found
