"""What embeddings without a format are stored in: 4 bits where the metric on training examples allows it."""

from types import SimpleNamespace

import pytest
from torch import nn

import eval.export.evaluation
from eval.export.onnx_tables import BYTES, EXAMPLES, GROUPS, LANGUAGE_EXAMPLES, format_of_tables


class Words(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.words, self.head = nn.Embedding(50, width), nn.Linear(width, 2)


def run_of(width=64, metric="accuracy", kind="text", pixels=None, round_embeddings=True):
    return SimpleNamespace(
        model=Words(width),
        record={"metric": metric},
        inputs=SimpleNamespace(pixels=pixels),
        round_embeddings=round_embeddings,
        plan=SimpleNamespace(data=SimpleNamespace(kind=kind)),
    )


@pytest.fixture
def measured(monkeypatch):
    """Replaces evaluation: `measured(before, after)`; returns what was evaluated, (formats of the table, rows)."""
    seen = []

    def prepare(metric, before, after):
        def evaluate(run, model, splits):
            format = model.words.formats[0] if hasattr(model.words, "formats") else None
            seen.append((format, len(splits["train"])))
            return {"train": {metric: before if format is None else after}}

        monkeypatch.setattr(eval.export.evaluation, "evaluate_exported", evaluate)
        monkeypatch.setattr(eval.export.evaluation, "training_rows", lambda run, behind: range(1000))
        return seen

    return prepare


@pytest.mark.parametrize(
    ("metric", "before", "after", "expected"),
    [
        ("accuracy", 0.9, 0.8985, GROUPS),
        ("accuracy", 0.9, 0.8975, BYTES),
        ("accuracy", 0.9, float("nan"), BYTES),
        ("perplexity", 50.0, 50.09, GROUPS),
        ("perplexity", 50.0, 50.2, BYTES),
    ],
)
def test_four_bits_where_the_metric_on_training_examples_stays(metric, before, after, expected, measured):
    seen = measured(metric, before, after)
    run = run_of(metric=metric, kind="lm" if metric == "perplexity" else "text")
    format, why = format_of_tables(run)
    assert format == expected
    assert "(words)" in why and f"stored in {expected}" in why and "--no_round_embeddings" in why
    count = LANGUAGE_EXAMPLES if metric == "perplexity" else EXAMPLES
    assert seen == [(None, count), (GROUPS, count)]
    assert type(run.model.words) is nn.Embedding


def test_nothing_is_measured_where_nothing_is_to_be_chosen(measured):
    seen = measured("accuracy", 1.0, 1.0)
    assert format_of_tables(run_of(width=40))[0] == BYTES  # has no whole groups of 32
    assert format_of_tables(run_of(kind="qa"))[0] == BYTES
    assert format_of_tables(run_of(round_embeddings=False)) == (None, "")
    assert format_of_tables(run_of(pixels={"size": 8})) == (None, "")
    assert not seen
