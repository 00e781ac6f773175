"""The paper's idea on one page: every frame of a clip has a timestep of its own.

`t` is `(b f)` and lives beside a clip `(b f c h w)`: the vectorized timestep variable, VTV (FVDM, equation 4).
`t = 0` is clean data, `t = T` (1000) pure noise.

Training draws `t` (`sample_timesteps`). Sampling lowers `t` along the rows of a schedule `(s + 1, f)`: row 0 holds
where each frame starts, the last row where it ends, and a column never rises. A task is such a schedule.
"""

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

from fvdm.choices import one_of
from fvdm.diffusion.config import NUM_TIMESTEPS


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
    own_t = torch.rand((b, 1), generator=generator, device=device) < p
    return torch.where(own_t, per_frame, per_frame[:, :1])


def evenly_spaced(steps: int, num_timesteps: int = NUM_TIMESTEPS) -> Tensor:
    """The paper's spacing: `steps` timesteps spread evenly over 1..T with both ends, then 0; falling.

    For 50 steps of 1000: 1000, 980, 959, ..., 42, 21, 1, 0.

    Returns:
        int64 `(steps + 1,)`.

    Raises:
        ValueError: unless 1 <= steps <= num_timesteps.
    """
    _check_steps(steps, num_timesteps)
    if steps == 1:
        return torch.tensor([num_timesteps, 0])
    levels = 1 + torch.linspace(0, num_timesteps - 1, steps, dtype=torch.float64).round().long()
    return torch.cat([levels.flip(0), torch.zeros(1, dtype=torch.long)])


def trailing(steps: int, num_timesteps: int = NUM_TIMESTEPS) -> Tensor:
    """T, then every T/steps-th below it, then 0: the last network evaluation is well above t = 1 (Lin et al. 2023).

    Returns:
        int64 `(steps + 1,)`.

    Raises:
        ValueError: unless 1 <= steps <= num_timesteps.
    """
    _check_steps(steps, num_timesteps)
    return torch.linspace(num_timesteps, 0, steps + 1, dtype=torch.float64).round().long()


def leading(steps: int, num_timesteps: int = NUM_TIMESTEPS) -> Tensor:
    """1 and every (T // steps)-th above it, falling, then 0: as DDIM's code had it. It begins below T.

    Returns:
        int64 `(steps + 1,)`.

    Raises:
        ValueError: unless 1 <= steps <= num_timesteps.
    """
    _check_steps(steps, num_timesteps)
    levels = 1 + torch.arange(steps) * (num_timesteps // steps)
    return torch.cat([levels.flip(0), torch.zeros(1, dtype=torch.long)])


def karras(steps: int, noise: Tensor, rho: float = 7.0) -> Tensor:
    """Even in `(sigma / alpha) ** (1 / rho)`, the spacing of EDM (Karras et al. 2022, equation 5), at the nearest t.

    Args:
        steps: sampling steps.
        noise: `sigma / alpha` of t = 0..T, rising; may end with infinity.
        rho: 1 is even in sigma / alpha; larger values spend more steps at little noise.

    Returns:
        int64 `(steps + 1,)`: T first, 0 last, all distinct.

    Raises:
        ValueError: unless 1 <= steps <= T.
    """
    return _nearest(steps, _finite(noise) ** (1 / rho))


def log_snr(steps: int, noise: Tensor) -> Tensor:
    """Even in the logarithm of signal to noise, at the nearest t: steps of one length for multistep solvers (Lu 2022).

    Args:
        steps: sampling steps.
        noise: `sigma / alpha` of t = 0..T, rising; may end with infinity.

    Returns:
        int64 `(steps + 1,)`: T first, 0 last, all distinct.

    Raises:
        ValueError: unless 1 <= steps <= T.
    """
    return _nearest(steps, _finite(noise).log())


def shifted(steps: int, num_timesteps: int = NUM_TIMESTEPS, shift: float = 3.0) -> Tensor:
    """`trailing`, moved towards noise: u = t / T becomes `shift u / (1 + (shift - 1) u)` (Esser et al. 2024, eq. 23).

    The larger a frame, the more noise it takes to hide its large shapes; Wan samples with a shift of 3 (480p) or 5
    (720p). A shift of 1 is `trailing`.

    Returns:
        int64 `(steps + 1,)`: T first, 0 last, all distinct.

    Raises:
        ValueError: unless 1 <= steps <= T and shift > 0.
    """
    _check_steps(steps, num_timesteps)
    if not shift > 0:
        raise ValueError(f"a shift of {shift}: choose more than 0 (Wan's are 3 and 5; 1 is none)")
    u = torch.linspace(1, 0, steps + 1, dtype=torch.float64)
    levels = (num_timesteps * shift * u / (1 + (shift - 1) * u)).round().long().tolist()
    for k in range(1, steps + 1):  # neighbours that round to one t are spread: downwards, then up again from 0
        levels[k] = min(levels[k], levels[k - 1] - 1)
    return torch.tensor([max(level, steps - k) for k, level in enumerate(levels)])


def _finite(noise: Tensor) -> Tensor:
    """`sigma / alpha` with an end that can be divided: infinity counts as twice the level before."""
    noise = noise.double().clone()
    noise[-1] = torch.minimum(noise[-1], 2 * noise[-2])
    return noise


def _nearest(steps: int, scale: Tensor) -> Tensor:
    """Falling timesteps whose values on a rising `scale (T + 1)` are spread evenly, as near as integer t can be."""
    last = len(scale) - 1
    _check_steps(steps, last)
    if steps == 1:
        return torch.tensor([last, 0])
    targets = torch.linspace(scale[1].item(), scale[-1].item(), steps, dtype=torch.float64)
    rising = (1 + (scale[1:, None] - targets).abs().argmin(0)).tolist()
    # Neighbours that round to one t are spread: first upwards, then down again from T.
    for k in range(1, steps):
        rising[k] = max(rising[k], rising[k - 1] + 1)
    rising = [min(level, last - (steps - 1 - k)) for k, level in enumerate(rising)]
    return torch.tensor([0, *rising]).flip(0)


SPACINGS: dict[str, Callable[[int, Tensor, float], Tensor]] = {
    "even": lambda steps, noise, shift: evenly_spaced(steps, len(noise) - 1),
    "trailing": lambda steps, noise, shift: trailing(steps, len(noise) - 1),
    "leading": lambda steps, noise, shift: leading(steps, len(noise) - 1),
    "karras": lambda steps, noise, shift: karras(steps, noise),
    "log-snr": lambda steps, noise, shift: log_snr(steps, noise),
    "shift": lambda steps, noise, shift: shifted(steps, len(noise) - 1, shift),
}
"""Name -> `(steps, sigma / alpha of t = 0..T, shift) -> falling levels (steps + 1,)`. `even` is the paper's."""


def spaced(spacing: str, steps: int, noise: Tensor, shift: float = 3.0) -> Tensor:
    """The falling timesteps of one frame under a named spacing.

    Args:
        spacing: a name of `SPACINGS`.
        steps: sampling steps, 1 to T.
        noise: `sigma / alpha` of t = 0..T.
        shift: of the spacing `shift`.

    Returns:
        int64 `(steps + 1,)` that ends with 0.

    Raises:
        ValueError: if there is no such spacing (lists those there are), or steps are out of range.
    """
    return SPACINGS[one_of("spacing", spacing, SPACINGS)](steps, noise, shift)


def _check_steps(steps: int, num_timesteps: int) -> None:
    if not 1 <= steps <= num_timesteps:
        raise ValueError(f"{steps} sampling steps: choose between 1 and {num_timesteps}")


def together(levels: Tensor, frames: int) -> Tensor:
    """All frames follow `levels (s + 1,)` together: `(s + 1, frames)`.

    Raises:
        ValueError: if `frames` is less than 1.
    """
    if frames < 1:
        raise ValueError(f"{frames} frames: a clip has at least one")
    return levels[:, None].repeat(1, frames)


def full_sequence(steps: int, frames: int, num_timesteps: int = NUM_TIMESTEPS) -> Tensor:
    """Standard generation: all frames go together from pure noise to clean, with the paper's spacing.

    Returns:
        int64 `(steps + 1, frames)`.

    Raises:
        ValueError: if `steps` or `frames` is out of range.
    """
    return together(evenly_spaced(steps, num_timesteps), frames)


def staggered(levels: Tensor, start_rows: Sequence[int]) -> Tensor:
    """Frame i follows `levels (s + 1,)` from row `start_rows[i]` on: the pyramid of diffusion forcing.

    Args:
        levels: falling timesteps.
        start_rows: the row in which each frame takes its first step, 0 or more.

    Returns:
        int64 `(max(start_rows) + s + 1, f)`.
    """
    steps = len(levels) - 1
    rows = torch.arange(max(start_rows) + steps + 1)[:, None] - torch.tensor(list(start_rows))
    return levels[rows.clamp(0, steps)]


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
    """Refuse a schedule that no sampler can follow.

    Raises:
        ValueError: unless it is an integer `(s + 1, f)` within 0..T whose columns never rise.
    """
    if schedule.ndim != 2 or schedule.shape[0] < 2 or schedule.is_floating_point():
        raise ValueError(f"a schedule holds integers (steps + 1, frames), not {tuple(schedule.shape)}")
    if schedule.min() < 0 or schedule.max() > num_timesteps:
        raise ValueError(f"the schedule leaves the timesteps 0 to {num_timesteps}")
    if (schedule[1:] > schedule[:-1]).any():
        raise ValueError("the schedule rises: a frame's timestep may only fall or stay")


def format_schedule(schedule: Tensor, rows: int = 60) -> str:
    """A schedule as lines of text: every row where it has up to `rows`, else as many spread over its length."""
    count = len(schedule)
    chosen = range(count) if count <= rows else torch.linspace(0, count - 1, rows).round().long().tolist()
    width = len(str(int(schedule.max())))
    label = len(str(count - 1))
    return "\n".join(
        f"row {k:>{label}}  " + " ".join(f"{value:>{width}}" for value in schedule[k].tolist()) for k in chosen
    )
