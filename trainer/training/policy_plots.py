"""The policy as pictures in TensorBoard: a row a decision, a column a choice, the brighter the more probable."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
from transformers.integrations import TensorBoardCallback

from policy.space import SearchSpace

CELL = (8, 32)
"""height and width of a cell in pixels"""
TAG = "policy/probabilities"


def show_policy(callbacks: Iterable[Any], space: SearchSpace, entries: Iterable[Mapping[str, Any]]) -> None:
    """A picture for each entry of the history that holds probabilities; beside the first, what rows and columns are.

    Does nothing where the run has no TensorBoard.
    """
    writer = next((call.tb_writer for call in callbacks if isinstance(call, TensorBoardCallback)), None)
    told = [entry for entry in entries if "probabilities" in entry]
    if writer is None:
        return
    for entry in told:
        if entry["step"] == 1:
            writer.add_text(TAG, legend(space), 1)
        picture = np.kron(np.asarray(entry["probabilities"]), np.ones(CELL))
        writer.add_image(TAG, picture, entry["step"], dataformats="HW")


def legend(space: SearchSpace) -> str:
    """What the picture's columns and rows are, in Markdown."""
    pairs = space.decisions[0].choices
    columns = [str(weight) if weight == activation else f"{weight}/{activation}" for weight, activation in pairs]
    rows = "\n".join(f"{row}. {decision.name}" for row, decision in enumerate(space.decisions, 1))
    return f"Columns, from the left: {', '.join(columns)}. Rows, from the top:\n\n{rows}"
