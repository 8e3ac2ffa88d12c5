from collections import Counter

import pytest
import torch

from trainer.training.batches import BatchReader, TrainingLength, streams

READER = BatchReader(torch.tensor, seed=3)


@pytest.mark.parametrize(
    ("length", "expected"),
    [
        (TrainingLength(100, 8, 1, False, -1, 2.0), (13, 26)),
        (TrainingLength(100, 8, 1, True, -1, 2.0), (12, 24)),
        (TrainingLength(100, 8, 4, False, -1, 1.5), (4, 6)),
        (TrainingLength(100, 8, 4, False, 7, 1.5), (4, 7)),
        (TrainingLength(3, 8, 1, True, -1, 1.0), (1, 1)),
    ],
)
def test_steps_are_counted_as_the_trainer_counts_them(length, expected):
    assert (length.steps_per_epoch, length.steps) == expected


def test_a_position_counts_the_rows_before_a_step():
    length = TrainingLength(20, 8, 1, False, 9, 1.0)
    assert [length.position(step) for step in range(5)] == [0, 8, 16, 20, 28]


def test_samples_are_the_same_rows_every_time_without_the_excluded_ones():
    rows = list(range(30))
    first = [batch.tolist() for batch in READER.sample(rows, 20, 8, exclude=[3, 4])]
    assert first == [batch.tolist() for batch in READER.sample(rows, 20, 8, exclude=[3, 4])]
    assert [len(batch) for batch in first] == [8, 8, 4]
    counted = Counter(row for batch in first for row in batch)
    assert max(counted.values()) == 1 and not {3, 4} & set(counted)
    assert [len(batch) for batch in READER.sample(rows, 17, 8)] == [8, 8], "a single row has no variance"


def test_all_rows_are_read_in_their_order():
    assert [batch.tolist() for batch in READER.all_of(list(range(5)), 2)] == [[0, 1], [2, 3], [4]]
    assert READER.order(range(9), salt=1) != READER.order(range(9), salt=2)
    assert streams(iter([1])) and not streams([1]) and not streams(None)
