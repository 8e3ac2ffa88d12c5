"""Chooses what an ONNX file stores those embeddings of a text model in that have no format of their own."""

from __future__ import annotations

from typing import TYPE_CHECKING

from quant.formats import Format, GroupFormat, IntFormat

if TYPE_CHECKING:
    from eval.export.finished_run import FinishedRun

GROUPS, BYTES = GroupFormat(4, 32), IntFormat(8)
"""4.5 bits a value with the scales of groups; 8 bits with a scale per row."""
EXAMPLES, LANGUAGE_EXAMPLES = 512, 64
"""Training examples that tell whether 4 bits are enough; fewer of a language model, which predicts every token."""


def format_of_tables(run: FinishedRun) -> tuple[Format | None, str]:
    """Choose 4 bits where the metric on training examples allows it, else 8.

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
        return BYTES, f"{names} {BYTES}, a scale per row: answers have no metric on training examples; {leave}"
    count, before, after = _metrics(run)
    metric = f"{run.record['metric']} on {count:,} training examples {before:.5g} in float, {after:.5g} in {GROUPS}"
    if _allowed(run, before, after):
        return GROUPS, f"{names} {GROUPS}: {metric}; {leave}"
    return BYTES, f"{names} {BYTES}, a scale per row: {metric}; {leave}"


def _metrics(run: FinishedRun) -> tuple[int, float, float]:
    """Return how many training examples were evaluated, and the metric with tables in float and in groups."""
    from torch.utils.data import Subset

    from eval.export.evaluation import evaluate_exported, training_rows
    from quant.export.tables import rounded_tables

    rows = training_rows(run, 0)
    most = LANGUAGE_EXAMPLES if run.plan.data.kind == "lm" else EXAMPLES
    splits = {"train": Subset(rows, range(min(most, len(rows))))}
    found = []
    for format in (None, GROUPS):
        with rounded_tables(run.model, format):
            found.append(evaluate_exported(run, run.model, splits)["train"][run.record["metric"]])
    return len(splits["train"]), found[0], found[1]


def _allowed(run: FinishedRun, before: float, after: float) -> bool:
    from eval.export.onnx_outputs import rounding_allowed

    return rounding_allowed(run.record["metric"], before, after)
