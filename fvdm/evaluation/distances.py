"""What to say beside a Fréchet distance: how sure it is, what it would be of ever more clips, and a kernel distance.

All take features `(n d)`, one row a clip, and compute in float64; subsets are drawn from a seed.
"""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np

from fvdm.evaluation.fvd import frechet_distance

DEGREE = 3  # of the polynomial kernel


def kernel_distance(a: np.ndarray, b: np.ndarray) -> float:
    """Kernel video distance: the unbiased squared MMD with the kernel (x . y / d + 1)^3.

    Bińkowski et al., "Demystifying MMD GANs" (2018), equation 4, on the features of clips. Unlike the Fréchet
    distance its expectation does not depend on the number of clips; it may be below zero where the sets agree.

    Args:
        a: features `(n d)`.
        b: features `(m d)`.

    Raises:
        ValueError: if a set holds fewer than 2 clips, or the dimensions differ.
    """
    if min(len(a), len(b)) < 2 or a.shape[1] != b.shape[1]:
        raise ValueError(
            f"features of shapes {a.shape} and {b.shape} have no kernel distance: give 2 clips or more on "
            "each side, of one network"
        )
    x, y = np.asarray(a, np.float64), np.asarray(b, np.float64)

    def kernel(u: np.ndarray, v: np.ndarray) -> np.ndarray:
        return (u @ v.T / u.shape[1] + 1) ** DEGREE

    def within(u: np.ndarray) -> float:
        gram = kernel(u, u)
        return float(gram.sum() - np.trace(gram)) / (len(u) * (len(u) - 1))

    return within(x) + within(y) - 2 * float(kernel(x, y).mean())


def extrapolate(
    a: np.ndarray, b: np.ndarray, *, ddof: int = 0, sizes: int = 8, draws: int = 4, seed: int = 0
) -> tuple[float, float]:
    """The Fréchet distance for infinitely many clips: the line through distances at growing n, against 1 / n, at 0.

    Chong and Forsyth, "Effectively Unbiased FID and Inception Score" (2020), with several draws a size.

    Args:
        a: features `(n d)`.
        b: features `(m d)`.
        ddof: as in `frechet_distance`.
        sizes: numbers of clips, spread evenly in 1 / n between a quarter and all of the smaller set.
        draws: subsets per size.
        seed: of the subsets.

    Returns:
        The distance, and its standard error from the residuals of the line.

    Raises:
        ValueError: if a set holds fewer than 16 clips.
    """
    n = min(len(a), len(b))
    if n < 16:
        raise ValueError(f"{n} clips are too few to extrapolate from: give 16 or more on each side")
    rng = np.random.default_rng(seed)
    counts = np.unique(np.round(1 / np.linspace(4 / n, 1 / n, sizes)).astype(int))
    points = []
    with quiet():
        for count in counts:
            for _ in range(draws):
                x, y = (z[rng.choice(len(z), count, replace=False)] for z in (a, b))
                points.append((1 / count, frechet_distance(x, y, ddof=ddof)))
    inverse, distances = np.array(points).T
    design = np.stack([np.ones_like(inverse), inverse], axis=1)
    fit = np.linalg.lstsq(design, distances, rcond=None)[0]
    variance = ((distances - design @ fit) ** 2).sum() / (len(points) - 2)
    return float(fit[0]), float(np.sqrt(variance * np.linalg.inv(design.T @ design)[0, 0]))


def bootstrap(
    a: np.ndarray, b: np.ndarray, *, ddof: int = 0, draws: int = 100, level: float = 0.95, seed: int = 0
) -> tuple[float, float]:
    """An interval for the Fréchet distance at this n: how far it would move with other clips of the same sources.

    Clips are drawn again with replacement. That itself raises the distance, so the spread of the draws is laid
    around the distance, instead of taking the draws' own percentiles.

    Args:
        a: features `(n d)`.
        b: features `(m d)`.
        ddof: as in `frechet_distance`.
        draws: number of resamplings.
        level: coverage.
        seed: of the resamplings.

    Returns:
        Lower and upper end, >= 0.
    """
    rng = np.random.default_rng(seed)
    with quiet():
        distance = frechet_distance(a, b, ddof=ddof)
        values = np.zeros(draws)
        for k in range(draws):
            x, y = (z[rng.integers(0, len(z), len(z))] for z in (a, b))
            values[k] = frechet_distance(x, y, ddof=ddof)
    low, high = distance + np.quantile(values, [(1 - level) / 2, (1 + level) / 2]) - values.mean()
    return max(float(low), 0.0), max(float(high), 0.0)


def floor(real: np.ndarray, fake: np.ndarray, *, ddof: int = 0) -> dict[str, float]:
    """What is the least that can be asked: real against real, and the fake at that same number of clips.

    Every other real clip against the rest, so half as many clips a side as the distance itself has. Both
    numbers are at the same n, so they compare with each other, not with the distance at full n.

    Args:
        real: features `(n d)`, n >= 4.
        fake: features `(m d)`.
    """
    count = min(len(real) // 2, len(fake))
    one, other = real[0::2][:count], real[1::2][:count]
    with quiet():
        return {
            "n": float(count),
            "real_against_real": frechet_distance(one, other, ddof=ddof),
            "fake_against_real": frechet_distance(one, fake[:count], ddof=ddof),
        }


@contextmanager
def quiet() -> Iterator[None]:
    """Within, subsets may be small without a warning each."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="the Fréchet distance")
        yield
