"""Loss against compute: the power law that the losses of a training run follow, and what more compute would give."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

FLOORS = 200  # values of the floor that are tried in a round
ROUNDS = 3  # each between the neighbours of the best value of the round before
FEWEST = 4  # points; the law has three parameters


class PowerLaw(NamedTuple):
    """`floor + scale * compute ** -exponent`, the form of Hoffmann et al. (2022), equation 2, in one variable.

    Attributes:
        floor: the loss that no compute goes below.
        scale: of what is above it, at one unit of compute.
        exponent: how fast that falls.
    """

    floor: float
    scale: float
    exponent: float

    def __call__(self, compute: float) -> float:
        """The loss after so much compute."""
        return self.floor + self.scale * compute**-self.exponent


def fit_power_law(compute: Sequence[float], loss: Sequence[float]) -> PowerLaw | None:
    """The law nearest to some losses: a straight line of logarithms for each floor, of these the least error.

    Args:
        compute: above 0, in any unit.
        loss: above 0.

    Returns:
        The law; None where there are fewer than four points, or where the loss does not fall.
    """
    x, y = np.log(np.asarray(compute, float)), np.asarray(loss, float)
    if len(x) < FEWEST or len(set(x)) < FEWEST:
        return None
    gaps = np.geomspace(1e-6, 1, FLOORS)  # Of the floor below the least loss; dense near it: the law is steep there.
    for _ in range(ROUNDS):
        laws = [_line(x, y, y.min() * (1 - gap)) for gap in gaps]
        best = int(np.argmin([error for error, _ in laws]))
        law = laws[best][1]
        gaps = np.linspace(gaps[max(0, best - 1)], gaps[min(FLOORS - 1, best + 1)], FLOORS)
    return law if law.exponent > 0 else None


def _line(x: np.ndarray, y: np.ndarray, floor: float) -> tuple[float, PowerLaw]:
    """The straight line of log(y - floor) over x, as a law; its squared error in log(y) comes first."""
    slope, intercept = np.polyfit(x, np.log(y - floor), 1)
    error = np.square(np.log(floor + np.exp(intercept + slope * x)) - np.log(y)).sum()
    return float(error), PowerLaw(float(floor), float(np.exp(intercept)), float(-slope))
