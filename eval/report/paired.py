"""Runs compared example by example: how sure a difference between two means is.

Two methods are evaluated on the same examples, so what varies from example to example cancels. What is left is the
error of having evaluated on a sample; with several seeds, their answers are averaged first.
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
    """How one run answered the evaluated examples, or the mean of several."""

    examples: bytes
    """digest of the labels in their order: where it is the same, so are the examples"""
    right: NDArray[Any]
    """whether the answer is right, or the share of runs that have it right, (examples,)"""


def read_answers(folder: Path) -> Answers | None:
    """A run's answers; None where it kept none. Raises DamagedFile for a file that does not hold any."""
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
    """Averaged over the runs of a method; None where one kept no answers, or they are of other examples."""
    known = [answer for answer in answers if answer is not None]
    if len(known) < len(answers) or len({answer.examples for answer in known}) != 1:
        return None
    return Answers(known[0].examples, np.mean([answer.right for answer in known], axis=0))


def group_answers(group: Group, answers: Mapping[Path, Answers | None]) -> Answers | None:
    """Answers of a configuration averaged over its runs; None as for `mean_answers`."""
    return mean_answers([answers.get(run.folder) for run in group.runs])


def share_right(folders: Sequence[Path]) -> NDArray[np.float64] | None:
    """Share of a method's runs that answered each example rightly, (examples,); None as for `mean_answers`."""
    found = mean_answers([read_answers(folder) for folder in folders])
    return None if found is None else found.right


def half_width(differences: NDArray[np.float64]) -> float:
    """Of the 95 % confidence interval of the mean of differences (examples,); 0 for a single one."""
    if len(differences) < 2:
        return 0.0
    return float(1.96 * differences.std(ddof=1) / np.sqrt(len(differences)))


def _whole_numbers(value: Any) -> TypeGuard[list[int]]:
    return isinstance(value, list) and bool(value) and all(type(item) is int for item in value)
