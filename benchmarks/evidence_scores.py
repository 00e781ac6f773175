"""Scores of benchmarks/evidence.py: where a digit flies, what a cleaner neighbour is worth, and intervals. Pure."""

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from data_prep.moving_digits import SPEEDS
from fvdm.diffusion import Diffusion, Model
from fvdm.distances import quiet
from fvdm.fvd import frechet_distance

DARK = 48  # brightness, 0 to 255, below which a pixel is no digit but what the VAE leaves of black
LEVELS = (0, 250, 500, 750)  # timesteps of the smallest neighbour
OWN = (250, 500, 750, 1000)  # timesteps of the frame itself
Statistic = Callable[[np.ndarray], float]


def centres(video: Tensor) -> np.ndarray:
    """Centre of brightness of every frame, float64 `(b f 2)`, x and y in pixels; the middle where all is dark.

    Args:
        video: uint8 `(b f 3 h w)`.
    """
    light = (video.double().mean(dim=2) - DARK).clamp(min=0)  # (b f h w)
    total = light.sum(dim=(2, 3))
    found = []
    for axis, other in ((3, 2), (2, 3)):
        places = torch.arange(video.shape[axis + 1], dtype=torch.float64) + 0.5
        mean = (light.sum(dim=other) * places).sum(dim=2) / total
        found.append(torch.where(total > 0, mean, video.shape[axis + 1] / 2))
    return torch.stack(found, dim=2).numpy()


def distance_from_path(where: np.ndarray, truth: np.ndarray) -> np.ndarray:
    """How far each centre is from where the digit truly was, float64 `(b f)`, in pixels; both `(b f 2)`."""
    return np.linalg.norm(where - truth, axis=2)


def path_residual(where: np.ndarray, size: int) -> np.ndarray:
    """How far a digit is from the nearest path that it could have flown, float64 `(b)`: root mean square, in pixels.

    Such a path is straight, of one speed between those of the slowest and the fastest digit, and bounces off the walls:
    each axis is a triangle wave. All starts and speeds are tried, on a grid so fine that a perfect path leaves a tenth
    of a pixel or two. A digit that stands still has flown no such path.

    Args:
        where: centres `(b f 2)`.
        size: side of the picture, of which the digit takes half.
    """
    room, frames = size / 2, where.shape[1]
    slowest, fastest = (size / divisor for divisor in SPEEDS)
    starts = np.arange(0, 2 * room, 0.5)
    speeds = np.linspace(0, fastest, 61)
    straight = starts[:, None, None] + speeds[:, None] * np.arange(frames)  # (starts speeds f)
    waves = (room - np.abs(straight % (2 * room) - room)).reshape(-1, frames)
    errors = []
    for axis in range(2):
        path = where[:, :, axis] - size / 4
        each = (path**2).sum(1)[:, None] - 2 * path @ waves.T + (waves**2).sum(1)
        errors.append(each.reshape(len(where), len(starts), -1).min(axis=1))  # (b speeds)
    together = errors[0][:, :, None] + errors[1][:, None, :]
    speed = np.hypot(speeds[:, None], speeds[None])
    together[:, (speed < 0.95 * slowest) | (speed > 1.05 * fastest)] = np.inf
    return np.sqrt(together.min(axis=(1, 2)).clip(0) / frames)


@torch.no_grad()
def neighbour_table(model: Model, diffusion: Diffusion, x_0: Tensor, seed: int) -> np.ndarray:
    """What a frame's estimate is worth, by its own timestep and that of its cleanest neighbour.

    One frame of each clip stands at its own timestep, the frame after it at the smallest, all others above that.

    Args:
        model: the denoiser.
        diffusion: its noise process.
        x_0: clean latents `(b f c h w)`, f > 2.
        seed: of the frames, timesteps and noise: equal seeds compare models.

    Returns:
        float64 `(b own smallest 3)`: mean squared error of the estimate of the clean frame; that of the neighbour,
        if it were copied; and the share of the way from the truth to the neighbour that the estimate lies on (1 is
        a copy, 0 is none).
    """
    b, f = x_0.shape[:2]
    generator = torch.Generator().manual_seed(seed)
    rows = torch.arange(b)
    frame = torch.randint(0, f - 1, (b,), generator=generator)
    noise = torch.randn(x_0.shape, generator=generator)
    share = torch.rand((b, f), generator=generator)
    truth, neighbour = x_0[rows, frame], x_0[rows, frame + 1]
    way = neighbour - truth
    copied = way.square().flatten(1).mean(1)
    table = np.zeros((b, len(OWN), len(LEVELS), 3))
    for i, own in enumerate(OWN):
        for j, least in enumerate(LEVELS):
            t = (least + share * (diffusion.num_timesteps - least)).round().long()
            t[rows, frame], t[rows, frame + 1] = own, least
            x_t = diffusion.q_sample(x_0, t, noise)
            estimate = diffusion.predict(model(x_t, t, None), x_t, t).x_0[rows, frame]
            off = estimate - truth
            along = (off * way).flatten(1).sum(1) / way.square().flatten(1).sum(1).clamp(min=1e-6)
            table[:, i, j] = torch.stack([off.square().flatten(1).mean(1), copied, along], dim=1).double().numpy()
    return table


def interval(statistic: Statistic, clips: int, draws: int, seed: int = 0) -> tuple[float, float, float]:
    """A number, and where it lies with 95 % if other clips had been drawn (bootstrap).

    Drawing with replacement shifts a Fréchet distance, so the spread is laid around the number, as in
    `fvdm.distances.bootstrap`.

    Args:
        statistic: indices of clips `(n)` -> the number; everything that belongs to a clip moves with its index.
        clips: how many there are.
        draws: resamplings.
        seed: of these.
    """
    rng = np.random.default_rng(seed)
    value = statistic(np.arange(clips))
    values = np.array([statistic(rng.integers(0, clips, clips)) for _ in range(draws)])
    low, high = value + np.quantile(values, [0.025, 0.975]) - values.mean()
    return value, float(low), float(high)


def fvd_mean(real: np.ndarray, fakes: Sequence[np.ndarray], ddof: int = 0) -> Statistic:
    """Mean Fréchet distance of several trainings' clips `(n 400)` from real ones, for `interval`."""

    def statistic(index: np.ndarray) -> float:
        with quiet():
            return float(np.mean([frechet_distance(real[index], fake[index], ddof=ddof) for fake in fakes]))

    return statistic


def difference(a: Statistic, b: Statistic) -> Statistic:
    """`a - b` on the same clips."""
    return lambda index: a(index) - b(index)


def mean_of(tables: Sequence[np.ndarray]) -> Statistic:
    """Mean of several trainings' scores of clips `(n ...)`, for `interval`."""
    rows = np.stack([table.reshape(len(table), -1).mean(1) for table in tables]).mean(0)
    return lambda index: float(rows[index].mean())
