"""Scores of benchmarks/evidence.py: where a digit flies, what a cleaner neighbour is worth, and intervals. Pure."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from data_prep.moving_digits import SPEEDS
from fvdm.diffusion.process import Denoiser, Diffusion
from fvdm.evaluation.distances import kernel_distance, quiet
from fvdm.evaluation.fvd import frechet_distance

DARK = 48  # brightness, 0 to 255, below which a pixel is no digit but what the VAE leaves of black
LEVELS = (0, 250, 500, 750)  # timesteps of the smallest neighbour
OWN = (250, 500, 750, 1000)  # timesteps of the frame itself


class Draw(NamedTuple):
    """Which clips a statistic is taken of, `(n)` indices.

    Attributes:
        clips: of what is measured; everything that belongs to a clip moves with its index.
        real: of the real clips that it is compared with: the same, unless these are another number of other clips.
    """

    clips: np.ndarray
    real: np.ndarray


Statistic = Callable[[Draw], float]


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
    of a pixel or two. A digit that stands still has flown no such path, but is nearer to a slow one than a digit that
    flies astray: the residual rewards standing still, so a frozen frame belongs beside it.

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
def neighbour_table(model: Denoiser, diffusion: Diffusion, x_0: Tensor, seed: int, y: Tensor | None = None) -> Tensor:
    """What a frame's estimate is worth, by its own timestep and that of its cleanest neighbour.

    One frame of each clip stands at its own timestep, the frame after it at the smallest, all others above that.

    Args:
        model: the denoiser.
        diffusion: its noise process.
        x_0: clean latents `(b f c h w)`, f > 2.
        seed: of the frames, timesteps and noise, drawn on the CPU: equal seeds compare models, on any device.
        y: classes `(b)` of a class-conditional model; the null class hides them.

    Returns:
        float64 `(b own smallest 3)`, where the latents are: mean squared error of the estimate of the clean frame; that
        of the neighbour, if it were copied; and the share of the way from the truth to the neighbour that the estimate
        lies on (1 is a copy, 0 is none).
    """
    b, f = x_0.shape[:2]
    generator = torch.Generator().manual_seed(seed)
    rows = torch.arange(b)
    frame = torch.randint(0, f - 1, (b,), generator=generator)
    noise = torch.randn(x_0.shape, generator=generator).to(x_0.device)
    share = torch.rand((b, f), generator=generator).to(x_0.device)
    rows, frame = rows.to(x_0.device), frame.to(x_0.device)
    truth, neighbour = x_0[rows, frame], x_0[rows, frame + 1]
    way = neighbour - truth
    copied = way.square().flatten(1).mean(1)
    cells = []
    for own in OWN:
        for least in LEVELS:
            t = (least + share * (diffusion.num_timesteps - least)).round().long()
            t[rows, frame], t[rows, frame + 1] = own, least
            x_t = diffusion.q_sample(x_0, t, noise)
            estimate = diffusion.predict(model(x_t, t, y), x_t, t).x_0[rows, frame]
            off = estimate - truth
            along = (off * way).flatten(1).sum(1) / way.square().flatten(1).sum(1).clamp(min=1e-6)
            cells.append(torch.stack([off.square().flatten(1).mean(1), copied, along], dim=1).double())
    return torch.stack(cells, dim=1).unflatten(1, (len(OWN), len(LEVELS)))


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

    def again() -> Draw:
        index = rng.integers(0, clips, clips)
        return Draw(index, rng.integers(0, real, real) if real else index)

    value = statistic(everything(clips, real))
    values = np.array([statistic(again()) for _ in range(draws)])
    low, high = value + np.quantile(values, [0.025, 0.975]) - values.mean()
    return value, float(low), float(high)


def everything(clips: int, real: int = 0) -> Draw:
    """All clips once, for a statistic itself; see `interval`."""
    return Draw(np.arange(clips), np.arange(real or clips))


def fvd_mean(real: np.ndarray, fakes: Sequence[np.ndarray], ddof: int = 0) -> Statistic:
    """Mean Fréchet distance of several trainings' clips `(n 400)` from real ones `(m 400)`, for `interval`."""

    def statistic(draw: Draw) -> float:
        with quiet():
            return float(np.mean([frechet_distance(real[draw.real], fake[draw.clips], ddof=ddof) for fake in fakes]))

    return statistic


def kvd_of(real: np.ndarray, fakes: Sequence[np.ndarray]) -> Statistic:
    """Mean kernel distance of several trainings' clips from real ones, for `interval`."""
    return lambda draw: float(np.mean([kernel_distance(real[draw.real], fake[draw.clips]) for fake in fakes]))


def difference(a: Statistic, b: Statistic) -> Statistic:
    """`a - b` on the same clips."""
    return lambda draw: a(draw) - b(draw)


def mean_of(tables: Sequence[np.ndarray]) -> Statistic:
    """Mean of several trainings' scores of clips `(n ...)`, for `interval`."""
    rows = np.stack([table.reshape(len(table), -1).mean(1) for table in tables]).mean(0)
    return lambda draw: float(rows[draw.clips].mean())
