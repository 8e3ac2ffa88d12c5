"""history.jsonl: one line for each step of a run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


class History:
    """Appends one JSON object a step; after a resume it continues behind the checkpoint's step."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def write(self, entries: list[dict[str, Any]]) -> None:
        """Append entries, one line each."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a") as file:
            file.writelines(json.dumps(entry, allow_nan=False) + "\n" for entry in entries)

    def truncate(self, step: int) -> None:
        """Forget what was written after `step`: those steps will be run again."""
        if not self.path.exists():
            return
        kept = []
        for line in self.path.read_text().splitlines():
            try:
                entry = json.loads(line)
            except json.JSONDecodeError:
                break  # the line that was being written when the run was killed
            if entry["step"] > step:
                break
            kept.append(line)
        temporary = self.path.with_suffix(".tmp")
        temporary.write_text("".join(f"{line}\n" for line in kept))
        temporary.replace(self.path)
