"""The diffusion process with a timestep per frame: noising, the network's target, and the loss. Pure functions.

`x_t = alpha[t] x_0 + sigma[t] noise` holds for each frame with its own `t` in 0..T. The tables have T + 1 entries;
entry 0 is clean data (`alpha = 1`, `sigma = 0`), so the official code's index i is our t = i + 1.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from fvdm.timesteps import NUM_TIMESTEPS

Model = Callable[[Tensor, Tensor, Tensor | None], Tensor]
"""`model(x_t (b f c h w), t (b f), y (b) or None) -> (b f c h w)`, or `2c` channels with learned variance."""


@dataclass(frozen=True)
class DiffusionConfig:
    """The noise process and the objective. The defaults are the paper's.

    Attributes:
        num_timesteps: T, the number of noise levels.
        beta_start: the first beta of the linear schedule; the discrete form of beta(0) = 0.1.
        beta_end: the last beta of the linear schedule; the discrete form of beta(T) = 20.
        objective: what the network estimates: eps, the noise (the paper's), or v, `alpha eps - sigma x_0` (Salimans and
            Ho), from which short runs learn the whole picture sooner.
        learned_variance: the network also predicts where the reverse variance lies in its range (IDDPM).
    """

    num_timesteps: int = NUM_TIMESTEPS
    beta_start: float = 1e-4
    beta_end: float = 0.02
    objective: Literal["eps", "v"] = "eps"
    learned_variance: bool = True


class Prediction(NamedTuple):
    """What one network evaluation says of each frame; all `(b f c h w)`."""

    x_0: Tensor
    eps: Tensor
    variance: Tensor | None
    """Learned variance: -1 is the lower, +1 the upper end of its log range."""
    estimate: Tensor
    """What the network was asked for: see `DiffusionConfig.objective`."""


class Diffusion:
    """The noise table and everything that is a formula of it."""

    def __init__(self, config: DiffusionConfig | None = None) -> None:
        self.config = config or DiffusionConfig()
        betas = torch.linspace(
            self.config.beta_start, self.config.beta_end, self.config.num_timesteps, dtype=torch.float64
        )
        one = torch.ones(1, dtype=torch.float64)
        self.alpha_bar = torch.cat([one, torch.cumprod(1 - betas, 0)])  # (T + 1)
        self._on: dict[torch.device, Tensor] = {}

    @property
    def num_timesteps(self) -> int:
        """T: timesteps run from 0 (clean) to T (noise)."""
        return self.config.num_timesteps

    def _alpha_bar(self, t: Tensor) -> Tensor:
        """`alpha_bar[t]` as float64, `(b f) -> (b f 1 1 1)`; the table is copied once to each device."""
        if t.device not in self._on:
            self._on[t.device] = self.alpha_bar.to(t.device)
        return self._on[t.device][t][..., None, None, None]

    def levels(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """`alpha` and `sigma` of each frame: `(b f) -> (b f 1 1 1)`, float64."""
        alpha_bar = self._alpha_bar(t)
        return alpha_bar.sqrt(), (1 - alpha_bar).sqrt()

    def q_sample(self, x_0: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        """Noise each frame to its own timestep (FVDM, equation 5); at `t = 0` the frame comes back bit-identical.

        Args:
            x_0: clean latents `(b f c h w)`.
            t: int `(b f)` in 0..T.
            noise: standard normal, shaped as `x_0`.

        Raises:
            ValueError: if `t` is not one timestep per frame.
        """
        check_timesteps(x_0, t)
        alpha, sigma = self.levels(t)
        return alpha.to(x_0.dtype) * x_0 + sigma.to(x_0.dtype) * noise

    def predict(self, output: Tensor, x_t: Tensor, t: Tensor) -> Prediction:
        """Read the network's output: float32 estimates of the clean clip and of the noise.

        A frame at `t = 0` is its own estimate.
        """
        output, x_t = output.float(), x_t.float()
        estimate, variance = output.chunk(2, dim=2) if self.config.learned_variance else (output, None)
        alpha, sigma = (level.float() for level in self.levels(t))
        if self.config.objective == "v":
            return Prediction(alpha * x_t - sigma * estimate, sigma * x_t + alpha * estimate, variance, estimate)
        return Prediction((x_t - sigma * estimate) / alpha, estimate, variance, estimate)

    def target(self, x_0: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        """What the network should estimate of each frame, float32 `(b f c h w)`."""
        if self.config.objective == "eps":
            return noise.float()
        alpha, sigma = (level.float() for level in self.levels(t))
        return alpha * noise.float() - sigma * x_0.float()

    def posterior(self, x_0: Tensor, x_t: Tensor, t: Tensor, t_next: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Mean of q(x_next | x_t, x_0), and the log of its variance and of the forward step's (DDPM, equation 7).

        Where `t_next = 0` the variance is zero; the log is then that of the step before last, as in IDDPM.

        Args:
            x_0: `(b f c h w)`.
            x_t: `(b f c h w)`.
            t: `(b f)`, above `t_next`.
            t_next: `(b f)`.

        Returns:
            mean `(b f c h w)`; lower and upper log-variance `(b f 1 1 1)`, the ends of the learned range.
        """
        now, then = self._alpha_bar(t), self._alpha_bar(t_next)
        beta = 1 - now / then
        mean = (then.sqrt() * beta / (1 - now)).float() * x_0
        mean = mean + ((now / then).sqrt() * (1 - then) / (1 - now)).float() * x_t
        first, second = self._alpha_bar(torch.ones_like(t)), self._alpha_bar(torch.full_like(t, 2))
        floor = (1 - first) / (1 - second) * (1 - second / first)
        variance = torch.where(then < 1, beta * (1 - then) / (1 - now), floor)
        return mean, variance.log().float(), beta.log().float()

    def training_losses(
        self, model: Model, x_0: Tensor, t: Tensor, y: Tensor | None = None, noise: Tensor | None = None
    ) -> Tensor:
        """Loss of each frame: squared error of the estimate, plus the variational term that trains the variance.

        The variational term (IDDPM, L_vlb; in bits per dimension) holds the estimate fixed, and is chosen per
        frame: the decoder's likelihood where the frame is at its last step, `t = 1`, the divergence elsewhere.
        A frame at `t = 0` has nothing to predict and its loss is 0.

        Args:
            model: called as `model(x_t, t, y)`.
            x_0: clean latents `(b f c h w)`.
            t: int `(b f)` in 0..T.
            y: class labels `(b)`.
            noise: standard normal, shaped as `x_0`; drawn from the default generator when not given.

        Returns:
            float32 `(b f)`.

        Raises:
            ValueError: if `t` is not one timestep per frame.
        """
        noise = torch.randn_like(x_0) if noise is None else noise
        x_t = self.q_sample(x_0, t, noise)
        prediction = self.predict(model(x_t, t, y), x_t, t)
        loss = (prediction.estimate - self.target(x_0, t, noise)).square().flatten(2).mean(2)
        if prediction.variance is not None:
            loss = loss + self._variational(prediction, x_0.float(), x_t.float(), t)
        return torch.where(t > 0, loss, 0.0)

    def _variational(self, prediction: Prediction, x_0: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        assert prediction.variance is not None
        t = t.clamp(min=1)
        true_mean, lower, upper = self.posterior(x_0, x_t, t, t - 1)
        mean, _, _ = self.posterior(prediction.x_0.detach(), x_t, t, t - 1)
        log_variance = interpolate_log_variance(prediction.variance, lower, upper)
        divergence = normal_kl(true_mean, lower, mean, log_variance).flatten(2).mean(2)
        likelihood = discretized_log_likelihood(x_0, mean, 0.5 * log_variance).flatten(2).mean(2)
        return torch.where(t == 1, -likelihood, divergence) / math.log(2)


def check_timesteps(x: Tensor, t: Tensor) -> None:
    """Refuse a `t` that is not one timestep per frame.

    Raises:
        ValueError: unless `t.shape == x.shape[:2]`.
    """
    if x.ndim != 5 or t.shape != x.shape[:2]:
        raise ValueError(
            f"x {tuple(x.shape)} must be (b f c h w) and t {tuple(t.shape)} must be (b f): one timestep per frame; "
            "for the same timestep everywhere use t[:, None].expand(-1, frames)"
        )


def interpolate_log_variance(v: Tensor, lower: Tensor, upper: Tensor) -> Tensor:
    """Log-variance between the posterior's and the forward step's (IDDPM, equation 15); `v` in -1..1."""
    return lower + (v + 1) / 2 * (upper - lower)


def normal_kl(mean_1: Tensor, log_variance_1: Tensor, mean_2: Tensor, log_variance_2: Tensor) -> Tensor:
    """KL divergence of two diagonal Gaussians, elementwise, in nats."""
    ratio = log_variance_1 - log_variance_2
    return 0.5 * (ratio.exp() - 1 - ratio + (mean_1 - mean_2).square() * (-log_variance_2).exp())


def discretized_log_likelihood(x: Tensor, mean: Tensor, log_std: Tensor) -> Tensor:
    """Log-probability of `x` under a Gaussian, in bins of 2 / 255 that are open at -1 and 1 (DDPM, equation 13)."""
    inverse = torch.exp(-log_std)
    above = torch.special.ndtr((x - mean + 1 / 255) * inverse)
    below = torch.special.ndtr((x - mean - 1 / 255) * inverse)
    above = torch.where(x > 0.999, 1.0, above)
    below = torch.where(x < -0.999, 0.0, below)
    return (above - below).clamp(min=1e-12).log()
