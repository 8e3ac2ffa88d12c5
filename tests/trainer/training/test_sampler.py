import itertools
from types import SimpleNamespace

import pytest
import torch
from datasets import Dataset

from quant.errors import UserError
from trainer.training.sampler import PhasedSampler, hold_out


class Rows(SimpleNamespace):
    """Data with a length and, where given, labels."""

    def __len__(self):
        return self.size


def test_held_out_rows_hold_every_class_in_proportion_however_labels_are_stored():
    labels = torch.arange(60) % 3
    table = Dataset.from_dict({"labels": labels.tolist()})
    stored = [Rows(size=60, labels=labels), Rows(size=60, labels=labels.tolist()), table, table.with_format("torch")]
    (rows,) = {tuple(hold_out(data, 0.1, seed=0)) for data in stored}
    assert sorted(labels[list(rows)].tolist()) == [0, 0, 1, 1, 2, 2] and list(rows) == sorted(rows)
    assert tuple(hold_out(table, 0.1, seed=1)) != rows


@pytest.mark.parametrize(
    "changes", [{}, {"labels": ["cat", "dog"]}, {"labels": torch.rand(60)}, {"labels": [0] * 59 + [1]}]
)
def test_rows_without_usable_classes_are_held_out_at_random(changes):
    assert hold_out(Rows(size=60, **changes), 0.1, seed=0) == hold_out(Rows(size=60), 0.1, seed=0)
    assert len(hold_out(Rows(size=60, **changes), 0.1, seed=0)) == 6


def test_rows_are_left_on_both_sides():
    assert len(hold_out(Rows(size=2), 0.1, seed=0)) == 1
    for size, fraction in ((1, 0.1), (10, 1.0), (10, 0.0)):
        with pytest.raises(UserError, match="--search_fraction"):
            hold_out(Rows(size=size), fraction, seed=0)


def epochs(sampler, count):
    for epoch in range(count):
        sampler.set_epoch(epoch)
        yield list(sampler)


def test_held_out_rows_stay_out_until_they_return():
    sampler = PhasedSampler(20, held_out=[3, 7, 11, 19], returned_at=40, seed=1)
    rows = list(itertools.chain.from_iterable(epochs(sampler, 6)))
    assert len(rows) == 6 * 16 and len(sampler) == 16
    assert not {3, 7, 11, 19} & set(rows[:40])
    assert sorted(rows[:16]) == sorted(set(range(20)) - {3, 7, 11, 19})
    assert sorted(rows[40:60]) == list(range(20)), "from there on, whole passes over everything"
    assert rows[:16] != rows[16:32], "every pass has its own order"


def test_an_epoch_that_starts_anew_has_the_same_rows():
    whole = list(epochs(PhasedSampler(20, [3, 7], 25, seed=1), 3))
    later = PhasedSampler(20, [3, 7], 25, seed=1)
    later.set_epoch(2)
    assert list(later) == whole[2]
    assert list(epochs(PhasedSampler(20, [3, 7], 25, seed=2), 3)) != whole
