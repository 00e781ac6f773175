"""Sampling: one loop over a timestep matrix, and the solver steps it is made of. Pure functions.

A step takes `t` and `t_next`, both `(b f)`. A frame whose timestep stands still does not move, to the bit; that is
all it takes to hold a given frame, start one late, or finish one early.
"""

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fvdm.diffusion import Diffusion, Model, Prediction, interpolate_log_variance
from fvdm.timesteps import check_schedule


class Step(NamedTuple):
    """What a solver knows when it takes a step.

    Attributes:
        diffusion: the noise process.
        prediction: the network's estimates at `t`.
        x_t: where the clip stands, float32 `(b f c h w)`.
        t: its timesteps `(b f)`.
        t_next: the timesteps it goes to, `(b f)`.
        noise: draws standard normal `(b f c h w)`, fresh at each call.
    """

    diffusion: Diffusion
    prediction: Prediction
    x_t: Tensor
    t: Tensor
    t_next: Tensor
    noise: Callable[[], Tensor]


Solver = Callable[[Step], Tensor]
"""Takes a step: returns the clip at `t_next`. What it says of frames that stand still is not used."""


def ddim(eta: float = 0.0) -> Solver:
    """DDIM (equation 12); `eta` 0 is deterministic, 1 adds the noise of a DDPM step with fixed variance.

    Raises:
        ValueError: unless 0 <= eta <= 1.
    """
    if not 0.0 <= eta <= 1.0:
        raise ValueError(f"eta = {eta}: choose 0 (deterministic) to 1")

    def step(now: Step) -> Tensor:
        diffusion, prediction, _, t, t_next, noise = now
        alpha, sigma = diffusion.levels(t)
        alpha_next, sigma_next = diffusion.levels(t_next)
        kept = (alpha / alpha_next) ** 2  # alpha_bar[t] / alpha_bar[t_next]
        spread = eta * sigma_next / sigma.clamp(min=1e-12) * (1 - kept).clamp(min=0).sqrt()
        direction = (sigma_next**2 - spread**2).clamp(min=0).sqrt()
        x = alpha_next.float() * prediction.x_0 + direction.float() * prediction.eps
        return x + spread.float() * noise() if eta else x

    return step


def ddpm() -> Solver:
    """Ancestral sampling (DDPM, algorithm 2) with the learned variance where the network gives one (IDDPM)."""

    def step(now: Step) -> Tensor:
        diffusion, prediction, x_t, t, t_next, noise = now
        # A standing frame has no step to take; its posterior would be 0 / 0, so compute that of a step it could
        # take. sample() keeps its x_t.
        t = t.clamp(min=1)
        t_next = torch.where(t_next < t, t_next, t - 1)
        mean, lower, upper = diffusion.posterior(prediction.x_0, x_t, t, t_next)
        v = prediction.variance if prediction.variance is not None else torch.ones_like(lower)
        log_variance = interpolate_log_variance(v, lower, upper)
        last = (t_next == 0)[..., None, None, None]
        return mean + torch.where(last, 0.0, (0.5 * log_variance).exp() * noise())

    return step


SOLVERS: dict[str, Callable[[], Solver]] = {"ddim": ddim, "ddpm": ddpm}


def generators(seeds: Sequence[int]) -> list[torch.Generator]:
    """One source of randomness per sample, on the CPU: a sample does not depend on its batch, nor on the device."""
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def draw_noise(shape: Sequence[int], generator: Sequence[torch.Generator], device: torch.device | str) -> Tensor:
    """Standard normal `(b f c h w)`, row k drawn from the k-th generator.

    Raises:
        ValueError: if there is not one generator per sample.
    """
    if len(generator) != shape[0]:
        raise ValueError(f"{shape[0]} samples need {shape[0]} generators, one each; {len(generator)} came")
    return torch.stack([torch.randn(tuple(shape[1:]), generator=g) for g in generator]).to(device)


def start(x_0: Tensor, schedule: Tensor, diffusion: Diffusion, generator: Sequence[torch.Generator]) -> Tensor:
    """The clip that sampling starts from: each frame of `x_0 (b f c h w)` noised to the schedule's first row.

    Frames at `t = 0` come back as they are, frames at `t = T` are pure noise, whatever stood in `x_0`.
    """
    t = schedule[0].to(x_0.device).expand(x_0.shape[:2])
    noise = draw_noise(x_0.shape, generator, x_0.device).to(x_0.dtype)
    pure = (t == diffusion.num_timesteps)[..., None, None, None]
    clean = (t == 0)[..., None, None, None]
    return torch.where(clean, x_0, torch.where(pure, noise, diffusion.q_sample(x_0, t, noise)))


def guided(model: Model, guidance: float, null_class: int) -> Model:
    """Classifier-free guidance (Ho and Salimans, equation 6) on the estimate, not on the variance; in one forward.

    Args:
        model: conditional denoiser.
        guidance: scale; 1 is the conditional model itself, for which nothing is wrapped.
        null_class: the label that stands for no class.
    """
    if guidance == 1.0:
        return model

    def both(x: Tensor, t: Tensor, y: Tensor | None) -> Tensor:
        assert y is not None
        labels = torch.cat([y, torch.full_like(y, null_class)])
        with_class, without = model(torch.cat([x, x]), torch.cat([t, t]), labels).chunk(2)
        c = x.shape[2]
        eps = torch.lerp(without[:, :, :c], with_class[:, :, :c], guidance)
        return torch.cat([eps, with_class[:, :, c:]], dim=2)

    return both


@torch.no_grad()
def sample(
    model: Model,
    x: Tensor,
    schedule: Tensor,
    diffusion: Diffusion,
    *,
    y: Tensor | None = None,
    guidance: float = 1.0,
    null_class: int = 0,
    solver: Solver | None = None,
    generator: Sequence[torch.Generator] = (),
    progress: Callable[[Sequence[int]], Iterator[int]] = iter,
) -> Tensor:
    """Walk a clip down the rows of a timestep matrix.

    Args:
        model: the denoiser, called as `model(x_t, t, y)`.
        x: `(b f c h w)`, noised to the schedule's first row (see `start`); given frames hold their clean latents.
        schedule: int `(s + 1, f)` on the CPU; columns never rise.
        diffusion: the noise process the model was trained with.
        y: class labels `(b)`.
        guidance: classifier-free guidance scale; 1 is none.
        null_class: the label that stands for no class; needed with guidance.
        solver: `ddim()` or `ddpm()`; DDIM with eta 0 when not given.
        generator: one per sample, for solvers that add noise.
        progress: wraps the sequence of steps, such as `tqdm`.

    Returns:
        `(b f c h w)`. A frame whose column stands still is bit-identical to that of `x`.

    Raises:
        ValueError: if the schedule does not fit the clip, or guidance is asked for without labels.
    """
    check_schedule(schedule, diffusion.num_timesteps)
    if schedule.shape[1] != x.shape[1]:
        raise ValueError(f"the schedule is for {schedule.shape[1]} frames, the clip has {x.shape[1]}")
    if guidance != 1.0 and y is None:
        raise ValueError(f"guidance {guidance} needs class labels; use guidance 1 with an unconditional model")
    step = solver or ddim()
    denoise = guided(model, guidance, null_class)
    moving = (schedule[1:] < schedule[:-1]).any(1).tolist()
    rows = schedule.to(x.device)
    for i in progress([k for k, moves in enumerate(moving) if moves]):
        t, t_next = (rows[k].expand(x.shape[:2]) for k in (i, i + 1))
        prediction = diffusion.predict(denoise(x, t, y), x, t)
        noise = functools.partial(draw_noise, x.shape, generator, x.device)
        x_next = step(Step(diffusion, prediction, x.float(), t, t_next, noise))
        x = torch.where((t_next < t)[..., None, None, None], x_next.to(x.dtype), x)
    return x


def extend(draw: Callable[[Tensor, Sequence[int]], Tensor], first: Tensor, frames: int, overlap: int) -> Tensor:
    """Long video as a sliding window (FVDM, section 2.4): each window continues the last `overlap` frames.

    Args:
        draw: `(clip (b window c h w), held) -> (b window c h w)`; holds the clip's `held` frames, draws the rest.
        first: the first window, `(b window c h w)`.
        frames: total length; 16 + 14 x 8 = 128 in the paper.
        overlap: frames that a window shares with the one before.

    Returns:
        `(b frames c h w)`.

    Raises:
        ValueError: unless 1 <= overlap < window.
    """
    window = first.shape[1]
    if not 1 <= overlap < window:
        raise ValueError(f"an overlap of {overlap} frames: choose 1 to {window - 1}, the model's window less one")
    video = first
    while video.shape[1] < frames:
        clip = torch.zeros_like(first)
        clip[:, :overlap] = video[:, -overlap:]
        video = torch.cat([video, draw(clip, range(overlap))[:, overlap:]], dim=1)
    return video[:, :frames]
