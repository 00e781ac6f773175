"""Solver steps: from the network's estimate at `t` to the clip at `t_next`, both `(b f)`. Pure functions.

All of them step along `lambda = log(alpha / sigma)` of each frame, in the exact form of the linear part (DPM-Solver++,
equation 8): `x_next = sigma_next / sigma x_t + alpha_next (integral over the estimate of x_0)`. Their
history is per frame: `Step.valid_history` counts a frame's last rows in which it moved without a pause. A frame that
starts late has none, and a frame that waited has none either: meanwhile the others moved on, and so did its estimate.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from fvdm.choices import one_of
from fvdm.diffusion.process import Diffusion, Prediction, interpolate_log_variance


class HistoryEntry(NamedTuple):
    """An earlier row, as the solver left it.

    Attributes:
        t: timesteps `(b f)`.
        x_t: the clip `(b f c h w)`.
        x_0: the estimate of the clean clip there, `(b f c h w)`.
    """

    t: Tensor
    x_t: Tensor
    x_0: Tensor


class Step(NamedTuple):
    """What a solver takes a step from.

    Attributes:
        diffusion: the noise process.
        prediction: the network's estimates at `t`.
        x_t: the clip at `t`, float32 `(b f c h w)`.
        t: its timesteps `(b f)`.
        t_next: the timesteps it goes to, `(b f)`.
        noise: draws new standard normal `(b f c h w)` at each call.
        history: the rows before, newest first; as many as the solver asked for, fewer at the start.
        valid_history: int `(b f)`: how many entries of `history` are valid for the frame.
    """

    diffusion: Diffusion
    prediction: Prediction
    x_t: Tensor
    t: Tensor
    t_next: Tensor
    noise: Callable[[], Tensor]
    history: Sequence[HistoryEntry]
    valid_history: Tensor


@dataclass(frozen=True)
class Solver:
    """A way to take steps. Its result for frames that do not move is not used.

    Attributes:
        move: `Step` -> the clip at `t_next`, `(b f c h w)`.
        correct: `Step` -> a better `x_t`, now that there is an estimate at `t`; called before `move`. None: as it is.
        memory: how many rows of history it reads.
        spacing: the spacing of timesteps that suits it, by its name in `fvdm.diffusion.timesteps`.
    """

    move: Callable[[Step], Tensor]
    correct: Callable[[Step], Tensor] | None = None
    memory: int = 0
    spacing: str = "even"


def ddim(eta: float = 0.0) -> Solver:
    """DDIM (equation 12), of order 1; `eta` 0 is deterministic, 1 adds the noise of a DDPM step with fixed variance.

    Raises:
        ValueError: unless 0 <= eta <= 1.
    """
    if not 0.0 <= eta <= 1.0:
        raise ValueError(f"eta = {eta}: choose 0 (deterministic) to 1")

    def move(now: Step) -> Tensor:
        alpha, sigma = now.diffusion.levels(now.t)
        alpha_next, sigma_next = now.diffusion.levels(now.t_next)
        added = sigma**2 - (alpha / alpha_next * sigma_next) ** 2  # variance that the forward step adds
        spread = eta * sigma_next / sigma.clamp(min=1e-12) * added.clamp(min=0).sqrt()
        direction = (sigma_next**2 - spread**2).clamp(min=0).sqrt()
        x = alpha_next.float() * now.prediction.x_0 + direction.float() * now.prediction.eps
        return x + spread.float() * now.noise() if eta else x

    return Solver(move)


def ddpm() -> Solver:
    """Ancestral sampling (DDPM, algorithm 2) with the learned variance where the network gives one (IDDPM)."""

    def move(now: Step) -> Tensor:
        # A frame that does not move has no step to take; its posterior would be 0 / 0, so compute that of a step it
        # could take. sample() keeps its x_t.
        t = now.t.clamp(min=1)
        t_next = torch.where(now.t_next < t, now.t_next, t - 1)
        mean, lower, upper = now.diffusion.posterior(now.prediction.x_0, now.x_t, t, t_next)
        v = now.prediction.variance if now.prediction.variance is not None else torch.ones_like(lower)
        log_variance = interpolate_log_variance(v, lower, upper)
        last = (t_next == 0)[..., None, None, None]
        return mean + torch.where(last, 0.0, (0.5 * log_variance).exp() * now.noise())

    return Solver(move)


def dpmpp() -> Solver:
    """DPM-Solver++(2M) (Lu et al. 2022, algorithm 2), of order 2; deterministic.

    The step to `t = 0` and a frame's first step after a wait are of order 1, as there is no second point to use.
    """
    return Solver(_move_2m, memory=1, spacing="karras")


def unipc() -> Solver:
    """UniPC-2 with `B(h) = e^h - 1` (Zhao et al. 2023, algorithm 1): the step of DPM-Solver++(2M), and a correction.

    The estimate that is made at `t` anyway first corrects `x_t` itself, as the end of the step that led there, which
    raises the order to 3 at no further evaluation. The correction integrates the parabola through the last estimates.
    """
    return Solver(_move_2m, _correct, memory=2, spacing="karras")


SOLVERS: dict[str, Callable[[], Solver]] = {"ddim": ddim, "ddpm": ddpm, "dpm++": dpmpp, "unipc": unipc}


def solver(name: str, eta: float = 0.0) -> Solver:
    """The solver of that name.

    Raises:
        ValueError: if there is none (lists those there are), or it has no `eta`.
    """
    make = SOLVERS[one_of("solver", name, SOLVERS)]
    if eta and name != "ddim":
        raise ValueError(f"eta belongs to ddim; {name} has none")
    return ddim(eta) if name == "ddim" else make()


def _log_snr(diffusion: Diffusion, t: Tensor) -> Tensor:
    """Half the log of the signal-to-noise ratio, `lambda`: `(b f) -> (b f 1 1 1)`, infinite at the clean end."""
    alpha, sigma = diffusion.levels(t)
    return alpha.log() - sigma.log()


def _move_2m(now: Step) -> Tensor:
    alpha, sigma = now.diffusion.levels(now.t)
    alpha_next, sigma_next = now.diffusion.levels(now.t_next)
    ratio = sigma_next / sigma
    estimate = now.prediction.x_0
    if now.history:
        here, there, before = (_log_snr(now.diffusion, t) for t in (now.t, now.t_next, now.history[0].t))
        ahead = (there - here) / (2 * (here - before))  # Half a step ahead, in lengths of the step before.
        usable = (now.valid_history >= 1)[..., None, None, None] & ahead.isfinite()
        slope = torch.where(usable, ahead, 0.0).float()
        estimate = estimate + slope * (estimate - now.history[0].x_0)
    return ratio.float() * now.x_t + (alpha_next - alpha * ratio).float() * estimate


def _correct(now: Step) -> Tensor:
    """`x_t` as the end of the step from the row before, with the estimates at both ends and, where valid, one before.

    With z = 0 at the row before and z = 1 here, the estimate is read as `D(0) + c_1 z + c_2 z^2`; `psi_k` are the
    integrals of its powers.
    """
    if not now.history:
        return now.x_t
    first = now.history[0]
    alpha, sigma = now.diffusion.levels(now.t)
    _, sigma_first = now.diffusion.levels(first.t)
    here, there = _log_snr(now.diffusion, first.t), _log_snr(now.diffusion, now.t)
    h = there - here
    psi_0 = -torch.expm1(-h)
    psi_1 = 1 - psi_0 / h
    psi_2 = 1 - 2 * psi_1 / h
    end, weight = now.prediction.x_0 - first.x_0, psi_1
    curvature: Tensor | float = 0.0
    if len(now.history) > 1:
        z = (_log_snr(now.diffusion, now.history[1].t) - here) / h  # negative
        share = torch.where(
            (now.valid_history >= 2)[..., None, None, None] & z.isfinite(), (psi_1 - psi_2) / (1 - z), 0.0
        )
        weight = psi_1 - share
        curvature = torch.where(share > 0, share / z, 0.0).float() * (now.history[1].x_0 - first.x_0)
    x = (sigma / sigma_first).float() * first.x_t + (alpha * psi_0).float() * first.x_0
    x = x + alpha.float() * (weight.float() * end + curvature)
    usable = (now.valid_history >= 1)[..., None, None, None] & h.isfinite() & (h > 0)
    return torch.where(usable, x, now.x_t)
