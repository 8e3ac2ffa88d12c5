"""Policy plots in TensorBoard: one row per decision, one column per choice, brightness shows the probability."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
from transformers.integrations import TensorBoardCallback

from policy.space import SearchSpace

CELL = (8, 32)
"""Height and width of a cell in pixels."""
TAG = "policy/probabilities"


def show_policy(callbacks: Iterable[Any], space: SearchSpace, entries: Iterable[Mapping[str, Any]]) -> None:
    """Add an image for each entry of the history with probabilities, and a legend with the first one.

    Args:
        callbacks: the Trainer's callbacks; nothing happens without a TensorBoard writer among them.
        space: search space of the policy.
        entries: entries of the history.
    """
    writer = next((call.tb_writer for call in callbacks if isinstance(call, TensorBoardCallback)), None)
    if writer is None:
        return
    for entry in entries:
        if "probabilities" not in entry:
            continue
        if entry["step"] == 1:
            writer.add_text(TAG, legend(space), 1)
        picture = np.kron(np.asarray(entry["probabilities"]), np.ones(CELL))
        writer.add_image(TAG, picture, entry["step"], dataformats="HW")


def legend(space: SearchSpace) -> str:
    """Return the names of columns and rows, in Markdown."""
    pairs = space.decisions[0].choices
    columns = [str(weight) if weight == activation else f"{weight}/{activation}" for weight, activation in pairs]
    rows = "\n".join(f"{row}. {name}" for row, name in enumerate(space.names, 1))
    return f"Columns, from the left: {', '.join(columns)}. Rows, from the top:\n\n{rows}"
