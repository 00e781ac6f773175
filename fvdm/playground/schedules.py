"""Schedules that are drawn by hand, and schedules as images. Pure functions.

A hand-drawn schedule has a row of numbers for each frame: the steps at which its timestep starts and stops to fall, and
the noise it starts from. The result is an ordinary schedule `(steps + 1, frames)`.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

GIVEN = np.array([54, 118, 214])  # RGB of frames that are given
MARGIN = 2  # pixels between two frames
LEAST_SIDE = 12  # pixels; a smaller image shows nothing


class FrameTimes(NamedTuple):
    """When one frame is denoised.

    Attributes:
        start: step before which the frame stays at its noise, 0 or more.
        stop: step at which the frame is clean, above `start`.
        noise: where the frame starts, in percent of T: 100 is pure noise, 0 holds the frame clean.
        given: whether the frame's content is given.
    """

    start: int
    stop: int
    noise: float
    given: bool


def from_frame_times(frames: Sequence[FrameTimes], steps: int, num_timesteps: int) -> Tensor:
    """The schedule in which each frame falls evenly from its noise to 0 between its steps.

    Args:
        frames: one entry per frame.
        steps: sampling steps.
        num_timesteps: T.

    Returns:
        int64 `(steps + 1, f)`; columns never rise.

    Raises:
        ValueError: names the frame whose numbers are out of range.
    """
    if not frames:
        raise ValueError("a schedule has at least one frame")
    columns = []
    for number, frame in enumerate(frames):
        if not 0 <= frame.start < frame.stop <= steps:
            raise ValueError(
                f"frame {number}: start {frame.start} and stop {frame.stop} must be 0 <= start < stop <= {steps}"
            )
        if not 0 <= frame.noise <= 100:
            raise ValueError(f"frame {number}: noise {frame.noise:g}% must be 0 to 100")
        if frame.noise < 100 and not frame.given:
            raise ValueError(f"frame {number} starts from {frame.noise:g}% noise, so it must be given")
        top = frame.noise / 100 * num_timesteps
        share = ((frame.stop - torch.arange(steps + 1)) / (frame.stop - frame.start)).clamp(0, 1)
        columns.append((share.double() * top).round().long())
    return torch.stack(columns, dim=1)


def frame_times(schedule: Tensor, given: Iterable[int], num_timesteps: int) -> list[FrameTimes]:
    """A schedule as numbers for `from_frame_times`; exact if it made the schedule and each frame falls at every row."""
    shown = set(given)
    steps = len(schedule) - 1
    found = []
    for number, column in enumerate(schedule.T.tolist()):
        falls = [k for k in range(steps) if column[k + 1] < column[k]]
        start, stop = (falls[0], falls[-1] + 1) if falls else (0, steps)
        found.append(FrameTimes(start, stop, 100 * column[0] / num_timesteps, number in shown))
    return found


def image(
    schedule: Tensor,
    given: Iterable[int],
    num_timesteps: int,
    images: Mapping[int, Tensor] | None = None,
    height: int = 240,
    width: int = 640,
) -> np.ndarray:
    """A schedule as an image: a column per frame, time goes down; white is noise, black is clean, blue is given.

    Below it stand the given images, where the columns are wide enough for them.

    Args:
        schedule: int `(s + 1, f)`.
        given: indices of the frames whose content is given.
        num_timesteps: T.
        images: of given frames, by their indices, uint8 `(3 h w)` each.
        height: of the schedule, in pixels.
        width: of the image, in pixels; at least a few pixels per frame are used.

    Returns:
        uint8 `(height', width', 3)`.
    """
    rows, frames = schedule.shape
    cell = max(2 * MARGIN + 2, width // frames)
    level = (schedule.double() / num_timesteps).clamp(0, 1).numpy()
    picked = level[np.minimum(np.arange(height) * rows // height, rows - 1)]  # (height f)
    canvas = np.full((height, frames * cell, 3), 255, dtype=np.uint8)
    shown = set(given)
    for frame in range(frames):
        grey = np.repeat(picked[:, frame, None], 3, axis=1) * 255
        colour = GIVEN + (255 - GIVEN) * picked[:, frame, None] if frame in shown else grey
        canvas[:, frame * cell + MARGIN : (frame + 1) * cell - MARGIN] = colour[:, None].round()
    canvas[[0, -1]] = 128
    side = cell - 2 * MARGIN
    if not images or side < LEAST_SIDE:
        return canvas
    row = np.full((MARGIN + side, *canvas.shape[1:]), 255, dtype=np.uint8)
    for frame, shown_image in images.items():
        small = F.interpolate(shown_image[None].float(), size=(side, side), mode="area")[0].permute(1, 2, 0)
        row[MARGIN:, frame * cell + MARGIN : (frame + 1) * cell - MARGIN] = small.round().byte().numpy()
    return np.concatenate([canvas, row])
