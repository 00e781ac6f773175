"""Statistics of measured clips with their intervals: what would they be if other clips had been drawn? Pure."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from fvdm.evaluation.distances import kernel_distance, quiet
from fvdm.evaluation.fvd import frechet_distance


class Resample(NamedTuple):
    """Which clips a statistic is taken of, `(n)` indices.

    Attributes:
        clips: of what is measured; everything that belongs to a clip moves with its index.
        real: of the real clips that it is compared with: the same, unless these are another number of other clips.
    """

    clips: np.ndarray
    real: np.ndarray


Statistic = Callable[[Resample], float]


def interval(statistic: Statistic, clips: int, draws: int, seed: int = 0, real: int = 0) -> tuple[float, float, float]:
    """A number, and where it lies with 95 % if other clips had been drawn (bootstrap).

    Drawing with replacement shifts a Fréchet distance, so the spread is laid around the number, as in
    `fvdm.evaluation.distances.bootstrap`.

    Args:
        statistic: which clips -> the number.
        clips: how many there are.
        draws: resamplings.
        seed: of these.
        real: how many real clips they are compared with, drawn apart; 0 where each clip has its own.
    """
    rng = np.random.default_rng(seed)

    def again() -> Resample:
        index = rng.integers(0, clips, clips)
        return Resample(index, rng.integers(0, real, real) if real else index)

    value = statistic(everything(clips, real))
    values = np.array([statistic(again()) for _ in range(draws)])
    low, high = value + np.quantile(values, [0.025, 0.975]) - values.mean()
    return value, float(low), float(high)


def everything(clips: int, real: int = 0) -> Resample:
    """All clips once, for a statistic itself; see `interval`."""
    return Resample(np.arange(clips), np.arange(real or clips))


def fvd_mean(real: np.ndarray, fakes: Sequence[np.ndarray], ddof: int = 0) -> Statistic:
    """Mean Fréchet distance of several training runs' clips `(n 400)` from real ones `(m 400)`, for `interval`."""

    def statistic(draw: Resample) -> float:
        with quiet():
            return float(np.mean([frechet_distance(real[draw.real], fake[draw.clips], ddof=ddof) for fake in fakes]))

    return statistic


def kvd_of(real: np.ndarray, fakes: Sequence[np.ndarray]) -> Statistic:
    """Mean kernel distance of several training runs' clips from real ones, for `interval`."""
    return lambda draw: float(np.mean([kernel_distance(real[draw.real], fake[draw.clips]) for fake in fakes]))


def difference(a: Statistic, b: Statistic) -> Statistic:
    """`a - b` on the same clips."""
    return lambda draw: a(draw) - b(draw)


def mean_of(tables: Sequence[np.ndarray]) -> Statistic:
    """Mean of several training runs' scores of clips `(n ...)`, for `interval`."""
    rows = np.stack([table.reshape(len(table), -1).mean(1) for table in tables]).mean(0)
    return lambda draw: float(rows[draw.clips].mean())
