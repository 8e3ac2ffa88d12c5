"""Commands as a user pastes them, run as real processes, and what a user then has: exit code, last lines, files."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
SHARED = ROOT.parent / "shared"
PATIENCE = 600.0
"""seconds until a journey gives up on a command"""


@dataclass(frozen=True)
class Ended:
    """A command that has ended."""

    code: int
    out: str
    err: str

    @property
    def last_line(self) -> str:
        """The last line of the output."""
        return self.out.strip().splitlines()[-1]


def environment(extra: Mapping[str, str] | None = None) -> dict[str, str]:
    """What a command's process sees: no network, one thread (journeys run side by side), `extra` besides."""
    quiet = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "1"}
    return {**os.environ, **quiet, **(extra or {})}


def words_of(line: str | Sequence[str]) -> list[str]:
    """A command as the words of a process; `python` is the interpreter that the tests run in."""
    words = shlex.split(line.replace("\\\n", " ")) if isinstance(line, str) else [str(word) for word in line]
    return [sys.executable, *words[1:]] if words[0] in ("python", "python3") else words


@pytest.fixture(scope="session")
def command() -> Callable[..., Ended]:
    """Runs a command to its end: `command("python eval/eval_parse.py DIR", code=0, cwd=ROOT, env=None)`.

    Fails, showing both outputs, where the exit code is another one than `code`.
    """

    def run(
        line: str | Sequence[str],
        *,
        code: int = 0,
        cwd: Path = ROOT,
        env: Mapping[str, str] | None = None,
        timeout: float = PATIENCE,
    ) -> Ended:
        done = subprocess.run(
            words_of(line),
            cwd=cwd,
            env=environment(env),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=timeout,
            check=False,
        )
        assert done.returncode == code, f"{line}\nexit code {done.returncode}\n{done.stdout}\n{done.stderr}"
        return Ended(done.returncode, done.stdout, done.stderr)

    return run


def record_of(folder: Path) -> dict[str, Any]:
    """The record of the run in `folder`."""
    return json.loads((folder / "result.json").read_text())
