"""What one forward pass of the network evaluates: guidance by condition and by history, and noise on given frames.

Each function wraps a model. Whether a row of the schedule is guided is read from the schedule, which stays on the CPU,
so that no step waits for the device.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from fvdm.diffusion.process import Denoiser, Diffusion

RowDenoiser = Callable[[Tensor, Tensor, Tensor | None, Tensor], Tensor]
"""A denoiser that also takes the row of the schedule `(f)`, on the CPU: `(x_t, t, y, row) -> estimate`."""


@dataclass(frozen=True)
class Guidance:
    """How the estimate is pushed towards its conditions. The defaults push nothing.

    Attributes:
        scale: classifier-free guidance (Ho and Salimans, equation 6); 1 is the conditional model itself.
        history: the same with the clean frames as condition (Song et al. 2025): the estimate is pushed away from that
            of a model that sees noise in their place; 1 is none.
        interval: timesteps (lowest, highest) of a frame between which it is guided (Kynkäänniemi et al. 2024).
        rescale: 0 to 1: how far the estimate of each frame gets the standard deviation back that it had without
            guidance (Lin et al. 2023, section 3.4).
    """

    scale: float = 1.0
    history: float = 1.0
    interval: tuple[int, int] | None = None
    rescale: float = 0.0

    def __post_init__(self) -> None:
        """Refuse numbers out of range."""
        if not 0.0 <= self.rescale <= 1.0:
            raise ValueError(f"guidance rescale {self.rescale}: choose 0 (none) to 1")
        if self.interval is not None and self.interval[0] > self.interval[1]:
            raise ValueError(f"guidance interval {self.interval}: give the lower timestep first")


def null_condition(model: Denoiser, y: Tensor) -> Tensor:
    """The condition that says nothing, in the shape of `y (b ...)`: the model's own, as only it knows.

    Raises:
        ValueError: if the model does not say what it is.
    """
    null = getattr(model, "null", None)
    found: Tensor | None = None if null is None else null(len(y))
    if found is None:
        raise ValueError(
            "guidance needs the condition that says nothing: call a model that has the method null, such as a backbone "
            "of fvdm.models, or pass a negative condition"
        )
    return found.to(y.device)


def guided(
    model: Denoiser, guidance: Guidance, diffusion: Diffusion, noise: Callable[[], Tensor], null: Tensor | None = None
) -> RowDenoiser:
    """A model whose estimate is guided; the learned variance stays that of the conditional model.

    The network evaluates all conditions as one batch, and only in rows where a frame is inside the interval.

    Args:
        model: denoiser.
        guidance: the scales.
        diffusion: its noise process.
        noise: draws what stands in place of the clean frames for `guidance.history`, `(b f c h w)`.
        null: the condition that the estimate is pushed away from, shaped as `y`; needed with `guidance.scale`.
    """
    if guidance.scale == guidance.history == 1.0:
        return lambda x, t, y, row: model(x, t, y)
    hidden = noise() if guidance.history != 1.0 else None

    def evaluate(x: Tensor, t: Tensor, y: Tensor | None, row: Tensor) -> Tensor:
        by_condition, by_history = guidance.scale != 1.0, hidden is not None and bool((row == 0).any())
        if not _inside(row, guidance.interval).any() or not (by_condition or by_history):
            return model(x, t, y)
        inside, seen = _inside(t, guidance.interval), (t == 0)[..., None, None, None]
        xs, ts, ys = [x], [t], [y]
        if by_condition:
            assert null is not None, "guidance has something to push away from"
            xs, ts, ys = [*xs, x], [*ts, t], [*ys, null]
        if by_history and hidden is not None:
            xs.append(torch.where(seen, hidden.to(x.dtype), x))
            ts, ys = [*ts, torch.where(t == 0, diffusion.num_timesteps, t)], [*ys, y]
        labels = None if y is None else torch.cat([label for label in ys if label is not None])
        full, *others = model(torch.cat(xs), torch.cat(ts), labels).chunk(len(xs))
        c = x.shape[2]
        plain = full[:, :, :c]
        scales = [guidance.scale] * by_condition + [guidance.history] * by_history
        pushed = plain
        for scale, other in zip(scales, others, strict=True):
            pushed = pushed + (scale - 1) * (plain - other[:, :, :c])
        pushed = _rescaled(pushed, plain, guidance.rescale)
        return torch.cat([torch.where(inside[..., None, None, None], pushed, plain), full[:, :, c:]], dim=2)

    return evaluate


def _inside(t: Tensor, interval: tuple[int, int] | None) -> Tensor:
    """Which frames are guided."""
    return (t > 0) if interval is None else (t > 0) & (t >= interval[0]) & (t <= interval[1])


def _rescaled(pushed: Tensor, plain: Tensor, rescale: float) -> Tensor:
    if not rescale:
        return pushed
    ratio = plain.flatten(2).std(2) / pushed.flatten(2).std(2).clamp(min=1e-12)
    return pushed * (1 + rescale * (ratio - 1))[..., None, None, None]


def noisy_given(model: Denoiser, diffusion: Diffusion, level: int | Tensor, noise: Callable[[], Tensor]) -> Denoiser:
    """A model that sees clean frames with a little noise, at the timestep of that noise: it forgives their flaws.

    Diffusion forcing (Chen et al. 2024, section 3.3) so steadies long videos, whose conditions are the model's own
    frames. The clip itself is not touched: given frames stay bit-identical.

    Args:
        model: denoiser.
        diffusion: its noise process.
        level: timestep that frames at t = 0 are shown at, one for all or int `(f)` for each; 0 is none.
        noise: draws standard normal `(b f c h w)`.

    Raises:
        ValueError: unless 0 <= level <= T.
    """
    levels = torch.as_tensor(level)
    for found in (int(levels.min()), int(levels.max())):
        if not 0 <= found <= diffusion.num_timesteps:
            raise ValueError(f"noise of level {found} on given frames: choose 0 (none) to {diffusion.num_timesteps}")
    if not levels.any():
        return model
    noise_once = noise()
    levels = levels.to(noise_once.device)

    def evaluate(x: Tensor, t: Tensor, y: Tensor | None) -> Tensor:
        own = levels.expand_as(t)
        shown = torch.where(t == 0, own, t)
        copies = len(x) // len(noise_once)  # Guidance evaluates several copies of a clip.
        noised = diffusion.q_sample(x, own, noise_once.repeat(copies, 1, 1, 1, 1).to(x.dtype))
        return model(torch.where((t == 0)[..., None, None, None], noised, x), shown, y)

    return evaluate
