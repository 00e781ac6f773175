"""The paper's idea on one page: every frame of a clip has a timestep of its own.

`t` is `(b f)` and lives beside a clip `(b f c h w)`: the vectorized timestep variable, VTV (FVDM, equation 4).
`t = 0` is clean data, `t = T` (1000) pure noise.

Training draws `t` (`sample_timesteps`). Sampling walks `t` down the rows of a matrix `(s + 1, f)`: row 0 says
where each frame starts, the last row where it ends, and a column never rises. A task is such a matrix.
"""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

NUM_TIMESTEPS = 1000


def sample_timesteps(
    shape: Sequence[int],
    p: float = 0.2,
    num_timesteps: int = NUM_TIMESTEPS,
    *,
    generator: torch.Generator | None = None,
    device: torch.device | str | None = None,
) -> Tensor:
    """Draw the timesteps of a training batch: the probabilistic sampling strategy, PTSS (FVDM, equation 11).

    Each clip flips its own coin: with probability `p` every frame draws a timestep, else one timestep is drawn
    and shared by the clip's frames.

    Args:
        shape: `(b, f)`.
        p: probability in [0, 1] that a clip has one timestep per frame; 0 is a scalar-timestep model.
        num_timesteps: T; timesteps are uniform on 1..T.
        generator: source of randomness; its device is used unless `device` is given.
        device: where the result lives.

    Returns:
        int64 `(b f)`.

    Raises:
        ValueError: if `p` is no probability or `shape` is not two positive numbers.
    """
    if not 0.0 <= p <= 1.0:
        raise ValueError(f"p = {p} is not a probability; choose 0 <= p <= 1 (the paper uses 0.2)")
    if len(shape) != 2 or min(shape) < 1:
        raise ValueError(f"timesteps need a shape (clips, frames), not {tuple(shape)}")
    if device is None and generator is not None:
        device = generator.device
    b, f = shape
    per_frame = torch.randint(1, num_timesteps + 1, (b, f), generator=generator, device=device)
    alone = torch.rand((b, 1), generator=generator, device=device) < p
    return torch.where(alone, per_frame, per_frame[:, :1])


def evenly_spaced(steps: int, num_timesteps: int = NUM_TIMESTEPS) -> Tensor:
    """The paper's spacing: `steps` timesteps spread evenly over 1..T with both ends, then 0; falling.

    For 50 steps of 1000: 1000, 980, 959, ..., 42, 21, 1, 0.

    Returns:
        int64 `(steps + 1,)`.

    Raises:
        ValueError: unless 1 <= steps <= num_timesteps.
    """
    if not 1 <= steps <= num_timesteps:
        raise ValueError(f"{steps} sampling steps: choose between 1 and {num_timesteps}")
    if steps == 1:
        return torch.tensor([num_timesteps, 0])
    levels = 1 + torch.linspace(0, num_timesteps - 1, steps, dtype=torch.float64).round().long()
    return torch.cat([levels.flip(0), torch.zeros(1, dtype=torch.long)])


def full_sequence(steps: int, frames: int, num_timesteps: int = NUM_TIMESTEPS) -> Tensor:
    """Standard generation: all frames walk together from pure noise to clean.

    Returns:
        int64 `(steps + 1, frames)`.

    Raises:
        ValueError: if `steps` or `frames` is out of range.
    """
    if frames < 1:
        raise ValueError(f"{frames} frames: a clip has at least one")
    return evenly_spaced(steps, num_timesteps)[:, None].repeat(1, frames)


def hold_clean(schedule: Tensor, frames: Iterable[int]) -> Tensor:
    """Hold the given frames at `t = 0` in every row: they are conditions, and leave the sampler bit-identical.

    `frames=[0]` is image-to-video, `[0, -1]` interpolation, `range(8)` the continuation of a clip.

    Args:
        schedule: `(s + 1, f)`; not changed.
        frames: indices of the given frames; negative ones count from the end.

    Raises:
        ValueError: if an index lies outside the clip.
    """
    held = schedule.clone()
    count = schedule.shape[1]
    for frame in frames:
        if not -count <= frame < count:
            raise ValueError(f"frame {frame} cannot be given: the clip has frames 0 to {count - 1}")
        held[:, frame] = 0
    return held


def check_schedule(schedule: Tensor, num_timesteps: int = NUM_TIMESTEPS) -> None:
    """Refuse a matrix that no sampler can walk.

    Raises:
        ValueError: unless it is an integer `(s + 1, f)` within 0..T whose columns never rise.
    """
    if schedule.ndim != 2 or schedule.shape[0] < 2 or schedule.is_floating_point():
        raise ValueError(f"a schedule is an integer matrix (steps + 1, frames), not {tuple(schedule.shape)}")
    if schedule.min() < 0 or schedule.max() > num_timesteps:
        raise ValueError(f"the schedule leaves the timesteps 0 to {num_timesteps}")
    if (schedule[1:] > schedule[:-1]).any():
        raise ValueError("the schedule rises: a frame's timestep may only fall or stand still")
