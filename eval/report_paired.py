"""Runs compared example by example: how sure a difference between two means is.

Two methods are evaluated on the same examples, so what varies from example to example cancels. What is left is the
error of having evaluated on a sample; with several seeds, their answers are averaged first.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray


def right(folder: Path) -> NDArray[np.float64] | None:
    """1 where a run's answer to an evaluated example is right, else 0, (examples,); None where it kept no answers."""
    path = folder / "predictions.json"
    if not path.exists():
        return None
    answers = next(iter(json.loads(path.read_text()).values()))
    return np.equal(answers["predicted"], answers["label"]).astype(float)


def share_right(folders: Sequence[Path]) -> NDArray[np.float64] | None:
    """`right` averaged over the runs of a method; None where one kept no answers, or they are of other examples."""
    answers = [answer for folder in folders if (answer := right(folder)) is not None]
    if len(answers) < len(folders) or len({len(answer) for answer in answers}) != 1:
        return None
    return np.mean(answers, axis=0)


def half_width(differences: NDArray[np.float64]) -> float:
    """Of the 95 % confidence interval of the mean of differences (examples,); 0 for a single one."""
    if len(differences) < 2:
        return 0.0
    return float(1.96 * differences.std(ddof=1) / np.sqrt(len(differences)))
