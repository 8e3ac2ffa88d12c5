"""Progress reports, and the share of the training that measuring may take."""

import pytest

from trainer.search.config import ReinforceConfig
from trainer.search.evaluation_sizes import LEAST_MEASURED, MOST_EVALUATED, examples_to_measure
from trainer.training.progress import EvaluationProgress, Passes, counted


def listening():
    reports = []
    return reports, lambda phase, done=0, total=None, what="": reports.append((phase, done, total, what))


def test_counted_items_are_reported_from_none_to_all():
    reports, tell = listening()
    assert list(counted("ab", 2, "reading", tell)) == ["a", "b"]
    assert reports == [("reading", 0, 2, ""), ("reading", 1, 2, "batch 1 of 2"), ("reading", 2, 2, "batch 2 of 2")]


def test_each_evaluation_is_reported_from_its_own_start():
    reports, tell = listening()
    progress = EvaluationProgress(tell)
    for loader in ("ab", iter("c")):
        progress.begin(loader)
        progress.on_prediction_step(None, None, None)
    assert reports == [
        ("evaluating", 0, 2, ""),
        ("evaluating", 1, 2, "batch 1"),
        ("evaluating", 0, None, ""),
        ("evaluating", 1, None, "batch 1"),
    ]


def test_passes_never_exceed_their_reported_number():
    reports, tell = listening()
    passes = Passes("choosing", 2)
    for _ in range(3):
        passes.count(tell)
    assert [(done, total) for _, done, total, _ in reports] == [(1, 2), (2, 2), (3, 3)]


@pytest.mark.parametrize("share", [0.01, 0.1, 0.25, 1.0])
@pytest.mark.parametrize("steps", [20, 200, 5000])
def test_measuring_takes_at_most_its_share_of_the_passes_of_training(steps, share):
    batch, assignments = 32, 100
    examples = examples_to_measure(steps, batch, assignments, share)
    assert examples == 1 or examples * assignments <= share * 3 * steps * batch
    assert examples <= MOST_EVALUATED


def test_without_training_there_is_no_share_to_keep_within():
    assert examples_to_measure(0, 32, 100, 0.01) == LEAST_MEASURED


@pytest.mark.parametrize("share", [0.0, -1.0, 1.5])
def test_a_share_out_of_range_is_refused(share):
    with pytest.raises(ValueError, match="measure_share"):
        ReinforceConfig(target_bits=4, measure_share=share)
