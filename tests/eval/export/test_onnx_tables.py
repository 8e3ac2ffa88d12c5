"""What embeddings without a format are stored in: 4 bits where the loss on training examples allows it."""

from types import SimpleNamespace

import pytest
from torch import nn

import eval.export.evaluation
from eval.export.onnx_tables import BYTES, EXAMPLES, GROUPS, LANGUAGE_EXAMPLES, format_of_tables


class Words(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.words, self.head = nn.Embedding(50, width), nn.Linear(width, 2)


def run_of(width=64, kind="text", pixels=None, regression=False, round_embeddings=True):
    return SimpleNamespace(
        model=Words(width),
        inputs=SimpleNamespace(pixels=pixels, regression=regression),
        round_embeddings=round_embeddings,
        plan=SimpleNamespace(data=SimpleNamespace(kind=kind)),
    )


@pytest.fixture
def measured(monkeypatch):
    """Replaces evaluation: `measured(before, after)`; returns what was evaluated, (format of the table, rows)."""
    seen = []

    def prepare(before, after):
        def evaluate(run, model, splits):
            format = model.words.formats[0] if hasattr(model.words, "formats") else None
            seen.append((format, len(splits["train"])))
            return {"train": {"loss": before if format is None else after}}

        monkeypatch.setattr(eval.export.evaluation, "evaluate_exported", evaluate)
        monkeypatch.setattr(eval.export.evaluation, "training_rows", lambda run, behind: range(1000))
        return seen

    return prepare


@pytest.mark.parametrize(
    ("kind", "regression", "before", "after", "expected"),
    [
        ("text", False, 0.3, 0.304, GROUPS),
        ("text", False, 0.3, 0.306, BYTES),
        ("text", False, 0.3, float("nan"), BYTES),
        ("text", True, 0.3, 0.301, GROUPS),
        ("text", True, 0.3, 0.304, BYTES),
        ("lm", False, 4.0, 4.004, GROUPS),
        ("lm", False, 4.0, 4.01, BYTES),
    ],
)
def test_four_bits_where_the_loss_on_training_examples_stays(kind, regression, before, after, expected, measured):
    seen = measured(before, after)
    run = run_of(kind=kind, regression=regression)
    format, why = format_of_tables(run)
    assert format == expected
    assert "(words)" in why and f"stored in {expected}" in why and "--no_round_embeddings" in why
    count = LANGUAGE_EXAMPLES if kind == "lm" else EXAMPLES
    assert seen == [(None, count), (GROUPS, count)]
    assert type(run.model.words) is nn.Embedding


def test_nothing_is_measured_where_nothing_is_to_be_chosen(measured):
    seen = measured(1.0, 1.0)
    assert format_of_tables(run_of(width=24))[0] == BYTES  # has no whole groups of 16
    assert format_of_tables(run_of(kind="qa"))[0] == BYTES
    assert format_of_tables(run_of(round_embeddings=False)) == (None, "")
    assert format_of_tables(run_of(pixels={"size": 8})) == (None, "")
    assert not seen
