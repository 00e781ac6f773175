"""Loss against compute: the power law that the losses of a training run follow, and what more compute would give."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

FLOORS = 200  # values of the floor that are tried
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
    best: tuple[float, PowerLaw] | None = None
    for floor in y.min() * (1 - np.geomspace(1e-6, 1, FLOORS)):  # Close to the least loss, where the law is steep.
        slope, intercept = np.polyfit(x, np.log(y - floor), 1)
        law = PowerLaw(float(floor), float(np.exp(intercept)), float(-slope))
        error = float(np.square(np.log(floor + np.exp(intercept + slope * x)) - np.log(y)).sum())
        if law.exponent > 0 and (best is None or error < best[0]):
            best = error, law
    return best[1] if best else None
