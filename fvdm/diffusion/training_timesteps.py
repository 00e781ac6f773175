"""How training samples t: rules for the frames of a clip, and levels of noise, beside the paper's PTSS.

A rule says how the frames' timesteps depend on each other; it samples each clip on the uniform scale 1..T. A level maps
that scale, monotonically, to the levels of noise that training sees most. Both are one line of a table below.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from fvdm.diffusion.config import NUM_TIMESTEPS, TimestepsConfig
from fvdm.diffusion.timesteps import sample_timesteps


def sample_training_timesteps(
    shape: Sequence[int],
    p: float = 0.2,
    config: TimestepsConfig | None = None,
    num_timesteps: int = NUM_TIMESTEPS,
    *,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Sample the timesteps of a training batch. With the default settings they are those of `sample_timesteps`.

    Args:
        shape: `(b, f)`.
        p: probability in [0, 1] that a clip's frames differ as the rule says; else they share one timestep.
        config: rule and level.
        num_timesteps: T.
        generator: source of randomness, on the CPU.

    Returns:
        int64 `(b f)` in 1..T.

    Raises:
        ValueError: if `p` is no probability or `shape` is not two positive numbers.
    """
    config = config or TimestepsConfig()
    if config.rule == "ptss":
        t = sample_timesteps(shape, p, num_timesteps, generator=generator)
    else:
        shared = sample_timesteps(shape, 0.0, num_timesteps, generator=generator)
        own = torch.stack([RULES[config.rule](shape[1], config, num_timesteps, generator) for _ in range(shape[0])])
        t = torch.where(torch.rand((shape[0], 1), generator=generator) < p, own, shared)
    if config.level == "uniform":
        return t
    u = LEVELS[config.level]((t.double() - 0.5) / num_timesteps, config)
    return (u * num_timesteps).ceil().long().clamp(1, num_timesteps)


def chunks(frames: int, config: TimestepsConfig, num_timesteps: int, generator: torch.Generator | None) -> Tensor:
    """One timestep for each chunk of `config.chunk` frames, independent of the others: int64 `(f)`.

    The last chunk may be shorter. Chunks are the unit of autoregressive video diffusion (MAGI-1, 2025); chunks of one
    frame are PTSS.
    """
    count = -(-frames // config.chunk)
    t = torch.randint(1, num_timesteps + 1, (count,), generator=generator)
    return t.repeat_interleave(config.chunk)[:frames]


def nondecreasing(
    frames: int, config: TimestepsConfig, num_timesteps: int, generator: torch.Generator | None
) -> Tensor:
    """Timesteps that never fall from a frame to the next: int64 `(f)`.

    AR-Diffusion's FoPP scheduler (Sun et al. 2025, section 3.3): a frame and its timestep are uniform; given them, all
    non-decreasing sequences of the frames before, and of those after, are equally likely.
    """
    frame = int(torch.randint(frames, (), generator=generator))
    t = int(torch.randint(1, num_timesteps + 1, (), generator=generator))
    before = _sorted_levels(1, t, frame, generator)
    after = _sorted_levels(t, num_timesteps, frames - frame - 1, generator)
    return torch.cat([before, torch.tensor([t]), after])


def _sorted_levels(low: int, high: int, count: int, generator: torch.Generator | None) -> Tensor:
    """One of all non-decreasing sequences of `count` integers in low..high, each equally likely: int64 `(count)`.

    Sequences that may repeat become sets that may not when the k-th number is raised by k, and the other way round.
    """
    places = torch.randperm(high - low + count, generator=generator)[:count].sort().values
    return low + places - torch.arange(count)


RULES: dict[str, Callable[[int, TimestepsConfig, int, torch.Generator | None], Tensor]] = {
    "chunk": chunks,
    "nondecreasing": nondecreasing,
}
"""Name -> `(frames, config, T, generator) -> t (f)`, beside `ptss`, which is `sample_timesteps`."""

LEVELS: dict[str, Callable[[Tensor, TimestepsConfig], Tensor]] = {
    # Esser et al. 2024 (Stable Diffusion 3), equation 23; Wan trains and samples with a shift of 3 (480p) or 5 (720p).
    "shift": lambda u, config: config.shift * u / (1 + (config.shift - 1) * u),
    # The same, section 3.1: the logit of t / T is normal, so that the middle levels come most often.
    "logit-normal": lambda u, config: torch.sigmoid(config.logit_mean + config.logit_std * torch.special.ndtri(u)),
}
"""Name -> monotone map of `t / T` in (0, 1), beside `uniform`, which leaves it. A uniform t gets the distribution."""
