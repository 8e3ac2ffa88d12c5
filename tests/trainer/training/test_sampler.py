import itertools

from trainer.training.sampler import PhasedSampler


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
