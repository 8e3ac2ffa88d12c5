"""Paired comparison of runs: the error of a difference between two mean accuracies.

Both methods are evaluated on the same examples, so the variation between examples cancels. The remaining error is that
of evaluating on a sample. With several seeds, the answers are averaged over the seeds first.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any, TypeGuard

import numpy as np
from numpy.typing import NDArray

from eval.report.records import DamagedFile, Group


@dataclass(frozen=True)
class Answers:
    """Correctness of a run on each evaluated example, or its mean over several runs."""

    examples: bytes
    """Digest of the labels in order. Equal digests stand for equal examples."""
    right: NDArray[Any]
    """Whether the answer is correct, or the share of runs with a correct answer, (examples,)."""


def read_answers(folder: Path) -> Answers | None:
    """Read the answers of a run from predictions.json; None if it has no such file.

    Raises:
        DamagedFile: The file holds no answers.
    """
    path = folder / "predictions.json"
    try:
        splits = json.loads(path.read_bytes())
    except FileNotFoundError:
        return None
    except OSError as error:
        raise DamagedFile(path, f"not readable: {error.strerror}") from None
    except ValueError as error:  # no JSON, or no text
        raise DamagedFile(path, f"truncated or damaged: {error}") from None
    first = next(iter(splits.values()), None) if isinstance(splits, dict) else None
    predicted, labels = (first.get(name) if isinstance(first, dict) else None for name in ("predicted", "label"))
    if not (_whole_numbers(predicted) and _whole_numbers(labels) and len(predicted) == len(labels)):
        raise DamagedFile(path, "damaged: its first split has no 'predicted' and 'label', whole numbers, as many")
    right = [answer == label for answer, label in zip(predicted, labels, strict=True)]
    return Answers(sha256(json.dumps(labels).encode()).digest(), np.array(right))


def mean_answers(answers: Sequence[Answers | None]) -> Answers | None:
    """Average the answers of several runs; None if one kept none, or if they are of different examples."""
    known = [answer for answer in answers if answer is not None]
    if len(known) < len(answers) or len({answer.examples for answer in known}) != 1:
        return None
    return Answers(known[0].examples, np.mean([answer.right for answer in known], axis=0))


def group_answers(group: Group, answers: Mapping[Path, Answers | None]) -> Answers | None:
    """Answers of a configuration averaged over its runs; None as for `mean_answers`."""
    return mean_answers([answers.get(run.folder) for run in group.runs])


def share_right(folders: Sequence[Path]) -> NDArray[np.float64] | None:
    """Share of runs that answer each example correctly, (examples,); None as for `mean_answers`."""
    found = mean_answers([read_answers(folder) for folder in folders])
    return None if found is None else found.right


def half_width(differences: NDArray[np.float64]) -> float:
    """Half width of the 95 % confidence interval of the mean of differences (examples,); 0 for a single example."""
    if len(differences) < 2:
        return 0.0
    return float(1.96 * differences.std(ddof=1) / np.sqrt(len(differences)))


def _whole_numbers(value: Any) -> TypeGuard[list[int]]:
    return isinstance(value, list) and bool(value) and all(type(item) is int for item in value)
