"""Chooses what an ONNX file stores those embeddings of a text model in that have no format of their own."""

from __future__ import annotations

from typing import TYPE_CHECKING

from quant.formats import Format, GroupFormat, IntFormat

if TYPE_CHECKING:
    from eval.export.finished_run import FinishedRun

GROUPS, BYTES = GroupFormat(4, 16, zero_point=True), IntFormat(8)
"""5.25 bits a value with the scales and zero points of groups; 8 bits with a scale per row."""
MAX_RISE = 0.005
"""Largest rise of the loss on training examples for which 4 bits are taken: of the mean log-probability of the truth;
for a regression, as a share of the loss. A metric of some hundred examples would move more by chance than by rounding.
"""
EXAMPLES, LANGUAGE_EXAMPLES = 512, 64
"""Training examples that tell whether 4 bits are enough; fewer of a language model, which predicts every token."""


def format_of_tables(run: FinishedRun) -> tuple[Format | None, str]:
    """Choose 4 bits where the loss on training examples allows it, else 8.

    Args:
        run: The run.

    Returns:
        The format and a note that says why; None and '' if embeddings stay as they are.
    """
    from quant.export.tables import float_tables

    tables = float_tables(run.model)
    if run.inputs.pixels is not None or not run.round_embeddings or not tables:
        return None, ""
    names = f"embeddings without a format of their own ({', '.join(tables)}) are stored in"
    leave = "--no_round_embeddings leaves them in float"
    if uneven := [name for name, table in tables.items() if table.embedding_dim % GROUPS.size]:
        return BYTES, f"{names} {BYTES}, a scale per row: {uneven[0]} has no whole groups of {GROUPS.size}; {leave}"
    if run.plan.data.kind == "qa":
        return BYTES, f"{names} {BYTES}, a scale per row: answers are not judged on training examples; {leave}"
    count, before, after = _losses(run)
    loss = f"the loss on {count:,} training examples is {before:.5g} in float, {after:.5g} in {GROUPS}"
    if after - before <= MAX_RISE * (before if run.inputs.regression else 1.0):  # never if it is NaN
        return GROUPS, f"{names} {GROUPS}: {loss}; {leave}"
    return BYTES, f"{names} {BYTES}, a scale per row: {loss}; {leave}"


def _losses(run: FinishedRun) -> tuple[int, float, float]:
    """Return how many training examples were evaluated, and the loss with tables in float and in groups."""
    from torch.utils.data import Subset

    from eval.export.evaluation import evaluate_exported, training_rows
    from quant.export.tables import rounded_tables

    rows = training_rows(run, 0)
    most = LANGUAGE_EXAMPLES if run.plan.data.kind == "lm" else EXAMPLES
    splits = {"train": Subset(rows, range(min(most, len(rows))))}
    found = []
    for format in (None, GROUPS):
        with rounded_tables(run.model, format):
            found.append(evaluate_exported(run, run.model, splits)["train"]["loss"])
    return len(splits["train"]), found[0], found[1]
