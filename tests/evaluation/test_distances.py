"""Interval, extrapolation, kernel distance and floor, against what is known of Gaussians."""

import numpy as np
import pytest

from fvdm.evaluation.distances import bootstrap, extrapolate, floor, kernel_distance
from fvdm.evaluation.fvd import frechet_distance

few = pytest.mark.filterwarnings("ignore:the Fréchet distance")


def draw(n, d, seed, shift=0.0):
    return np.random.default_rng(seed).normal(size=(n, d)) + shift


def test_kernel_distance_equals_the_sum_over_pairs():
    a, b = draw(7, 5, 0), draw(9, 5, 1, 0.5)

    def k(x, y):
        return (sum(x * y) / 5 + 1) ** 3

    within = sum(k(a[i], a[j]) for i in range(7) for j in range(7) if i != j) / 42
    within += sum(k(b[i], b[j]) for i in range(9) for j in range(9) if i != j) / 72
    across = sum(k(x, y) for x in a for y in b) / 63
    assert kernel_distance(a, b) == pytest.approx(within - 2 * across, rel=1e-12)
    assert kernel_distance(a, b) == pytest.approx(kernel_distance(b, a), rel=1e-12)


def test_kernel_distance_is_unbiased():
    """Zero on average where the sets agree, at any n; far above where they do not."""
    same = [kernel_distance(draw(20, 8, s), draw(20, 8, s + 1000)) for s in range(200)]
    other = [kernel_distance(draw(20, 8, s), draw(20, 8, s + 1000, 1.0)) for s in range(20)]
    assert abs(np.mean(same)) < 4 * np.std(same) / 200**0.5
    assert min(other) > max(same)


@few
def test_extrapolation_comes_nearer_the_truth():
    """The truth of N(0, 1) against N(1/2, 1) in 30 dimensions is 7.5; the plain distance is far above."""
    errors, plain = [], []
    for seed in range(5):
        a, b = draw(300, 30, seed), draw(300, 30, seed + 50, 0.5)
        value, error = extrapolate(a, b, seed=seed)
        assert error > 0
        errors.append(abs(value - 7.5))
        plain.append(abs(frechet_distance(a, b) - 7.5))
    assert np.mean(errors) < 0.5 * np.mean(plain)
    assert extrapolate(a, b, seed=1) == extrapolate(a, b, seed=1)
    with pytest.raises(ValueError, match="16 or more"):
        extrapolate(a[:9], b)


@few
def test_the_interval_holds_the_distance_and_narrows():
    widths = []
    for n in (50, 800):
        a, b = draw(n, 10, 0), draw(n, 10, 1, 0.3)
        low, high = bootstrap(a, b, draws=60)
        assert 0 <= low < frechet_distance(a, b) < high
        assert (low, high) == bootstrap(a, b, draws=60)
        widths.append(high - low)
    assert widths[1] < 0.5 * widths[0]


@few
def test_the_interval_is_as_wide_as_other_draws_spread():
    """95 % of fresh draws lie in 3.92 of their own deviations; the bootstrap, which sees one draw, says the same."""
    others = [frechet_distance(draw(200, 6, s), draw(200, 6, s + 500, 0.5)) for s in range(400)]
    ends = [bootstrap(draw(200, 6, s), draw(200, 6, s + 500, 0.5), draws=200) for s in range(8)]
    width = np.mean([high - low for low, high in ends])
    assert width == pytest.approx(3.92 * np.std(others), rel=0.15)


@few
def test_the_interval_of_one_draw_covers_what_draws_come_to_on_average():
    """Laid around its own draw, the interval holds the mean of all draws in about 95 of 100 cases."""
    pairs = [(draw(100, 4, s), draw(100, 4, s + 500, 0.5)) for s in range(200)]
    mean = np.mean([frechet_distance(*pair) for pair in pairs])
    held = [low <= mean <= high for low, high in (bootstrap(*pair, draws=100) for pair in pairs)]
    assert 0.89 <= np.mean(held) <= 0.99


@few
def test_the_floor_compares_at_equal_n():
    real = draw(101, 10, 0)
    found = floor(real, draw(80, 10, 1))
    assert found["n"] == 50
    assert found["real_against_real"] == frechet_distance(real[0:100:2], real[1::2])
    assert found["fake_against_real"] == pytest.approx(found["real_against_real"], rel=0.5)
    assert floor(real, draw(80, 10, 1, 2.0))["fake_against_real"] > 5 * found["real_against_real"]


def test_unfit_features_are_refused():
    with pytest.raises(ValueError, match="2 clips or more"):
        kernel_distance(draw(1, 3, 0), draw(5, 3, 0))
    with pytest.raises(ValueError, match="of one network"):
        kernel_distance(draw(5, 3, 0), draw(5, 4, 0))
