"""Frame rates from rounded time stamps, dropped frames, repeats and pauses: for any rate, rounding and length."""

import numpy as np
import pytest

from fvdm.media.timing import MAX_PAUSE, MAX_STRETCH, Grid, Timing, measure

RATES = (120, 60, 60000 / 1001, 50, 30, 30000 / 1001, 25, 24, 24000 / 1001, 15, 12.5, 10, 7)


@pytest.mark.parametrize("rate", RATES)
@pytest.mark.parametrize("unit", [0.001, 0.01, 1 / 90000])
@pytest.mark.parametrize("rounding", [round, int])
def test_every_rate_is_found_and_a_dropped_frame_costs_one_repeat(rate, unit, rounding):
    if 3 * unit > 1 / rate:
        return
    random = np.random.default_rng(0)
    for length, drops in ((40, 0), (40, 1), (400, 1), (400, 7)):
        kept = sorted(set(range(length)) - set((random.permutation(length - 2)[:drops] + 1).tolist()))
        times = [rounding(k / rate / unit) * unit for k in kept]
        for stated in ((), (rate,), (round(rate, 3),), (30.0 if rate < 30 else 25.0,)):
            timing = measure(times, unit, stated)
            assert timing.fps == pytest.approx(rate, rel=1e-5 if rate in stated else 3 * unit * rate / length)
            shown = list(Grid(timing).even(zip(times, kept, strict=True)))
            assert len(shown) == length
            assert all(shown[k] == k for k in kept)


@pytest.mark.parametrize(("stated", "exact"), [(29.97, 30000 / 1001), (23.976, 24000 / 1001), (59.94, 60000 / 1001)])
def test_a_rounded_rate_means_the_exact_one(stated, exact):
    times = [round(k / exact, 3) for k in range(50)]
    assert measure(times, 0.001, (stated,)).fps == round(exact, 6)


def test_a_stated_rate_that_the_stamps_contradict_is_not_believed():
    times = [round(k / 30, 3) for k in range(60)]
    assert measure(times, 0.001, (25.0,)).fps == 30
    assert measure([k / 12.5 for k in range(60)], 1 / 90000, (25.0,)).fps == 12.5


def test_jitter_keeps_every_frame():
    random = np.random.default_rng(1)
    times = np.sort(np.arange(200) / 30 + random.uniform(-0.007, 0.007, 200)).tolist()
    timing = measure(times, 1 / 90000)
    assert timing.step is None
    assert timing.fps == pytest.approx(30, rel=0.01)


def test_without_times_the_stated_rate_counts():
    assert measure([], 0.001, (24.0,)) == Timing(24.0)
    assert measure([0.0], 0.001) == Timing(None)
    assert measure([0.0, 0.0, 0.0], 0.001, (0.0, 5000.0)) == Timing(None)
    assert measure([0.0, 0.04], 0.001).fps == 25


def test_pauses_are_repeated_until_the_video_would_be_eight_times_as_long():
    def times(pause):
        return [k / 30 for k in range(40)] + [40 / 30 + pause + k / 30 for k in range(40)]

    short, long = measure(times(10), 1e-4), measure(times(25), 1e-4)
    assert not short.pauses
    assert not short.notes
    assert len(list(Grid(short).even((t, t) for t in times(10)))) == 80 + 300
    assert len(long.pauses) == 1
    shown = list(Grid(long).even((t, t) for t in times(25)))
    assert len(shown) == 80 + MAX_PAUSE - 1
    assert sorted(set(shown)) == times(25)
    assert "a pause is shortened" in long.notes[0]


def test_a_shortened_video_is_at_most_eight_times_as_long():
    random = np.random.default_rng(2)
    for _ in range(50):
        gaps = np.where(random.random(60) < 0.2, random.uniform(0.1, 300, 60), 1 / 30)
        times = np.cumsum(gaps).tolist()
        shown = list(Grid(measure(times, 1e-4)).even((t, k) for k, t in enumerate(times)))
        assert len(shown) <= MAX_STRETCH * len(times) + 1
        assert shown == sorted(shown)


def test_repeats_fill_the_places_of_frames_that_say_the_same_again():
    frames = [(float(k), k) for k in range(10) if k not in (3, 4, 9)]
    grid = Grid(Timing(1.0), repeats=[2.0, 3.0, 4.0, 9.0])
    assert list(grid.even(frames)) == [0, 1, 2, 2, 2, 5, 6, 7, 8, 8]
    uneven = Grid(Timing(1.0, step=1.0), repeats=[3.0, 9.0, 10.0])
    assert list(uneven.even(frames)) == [0, 1, 2, 2, 2, 5, 6, 7, 8, 8, 8]


def test_frames_without_times_follow_one_another():
    assert list(Grid(Timing(None)).even((None, k) for k in range(5))) == list(range(5))
    assert list(Grid(Timing(1.0, step=1.0)).even([(0.0, 0), (None, 1), (None, 2)])) == [0, 1, 2]
