"""history.jsonl: one line for each step of a run."""

from __future__ import annotations

import json
import os
from pathlib import Path
from statistics import median
from typing import Any

from trainer.training.atomic import write_atomically

RISE = 3.0
"""times its start from which the end of a loss is far above it"""
LEAST_START = 0.5
"""what a start counts as at least: of a model that has learned its data, every new batch is many times above it"""


class History:
    """Appends one JSON object a step; after a resume it continues behind the checkpoint's step."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def write(self, entries: list[dict[str, Any]]) -> None:
        """Append entries, one line each; where the disk is full, none of them."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        size = self.path.stat().st_size if self.path.exists() else 0
        try:
            with self.path.open("a") as file:
                file.writelines(json.dumps(entry, allow_nan=False) + "\n" for entry in entries)
        except OSError:
            os.truncate(self.path, size)
            raise

    def truncate(self, step: int) -> int:
        """Forget what was written after `step`: those steps will be run again.

        Returns how many of the steps up to it have no line that can be read.
        """
        kept = [entry for entry in self.entries() if entry["step"] <= step]
        if self.path.exists():
            text = "".join(json.dumps(entry, allow_nan=False) + "\n" for entry in kept)
            write_atomically(self.path, lambda temporary: Path(temporary).write_text(text))
        return step - len(kept)

    def rise(self) -> tuple[float, float] | None:
        """(start, end) of a loss that ended far above where it started; None where it did not."""
        losses = [entry["loss"] for entry in self.entries() if isinstance(entry.get("loss"), int | float)]
        if not losses:
            return None
        few = max(1, min(10, len(losses) // 10))
        start, end = median(losses[:few]), median(losses[-few:])
        return (start, end) if end > RISE * max(start, LEAST_START) else None

    def entries(self) -> list[dict[str, Any]]:
        """The lines that can be read: not the one that was being written when the run was killed."""
        found = []
        for line in self.path.read_bytes().splitlines() if self.path.exists() else ():
            try:
                entry = json.loads(line)
            except ValueError:  # no JSON, or no text
                continue
            if isinstance(entry, dict) and isinstance(entry.get("step"), int):
                found.append(entry)
        return found
