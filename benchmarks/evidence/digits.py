"""Where a moving digit is in a video, and how far that is from a path that it could have taken. Pure."""

import numpy as np
import torch
from torch import Tensor

from data_prep.moving_digits import SPEEDS

DARK = 48  # brightness, 0 to 255, below which a pixel is no digit but what the VAE leaves of black


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
        size: side of the image, of which the digit takes half.
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
