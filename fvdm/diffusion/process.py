"""The diffusion process with a timestep per frame: noising, the network's target, and the loss. Pure functions.

`x_t = alpha[t] x_0 + sigma[t] noise` holds for each frame with its own `t` in 0..T. The tables have T + 1 entries;
entry 0 is clean data (`alpha = 1`, `sigma = 0`), so the official code's index i is our t = i + 1.

What the network estimates is one entry of `OBJECTIVES`; every solver reads it through `Diffusion.predict`.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from fvdm.diffusion.config import DiffusionConfig

Denoiser = Callable[[Tensor, Tensor, Tensor | None], Tensor]
"""`model(x_t (b f c h w), t (b f), y (b ...) or None) -> (b f c h w)`, or `2c` channels with learned variance."""


class Objective(NamedTuple):
    """What the network estimates, as formulas of a frame's `alpha` and `sigma`; everything broadcasts.

    Attributes:
        target: `(alpha, sigma, x_0, noise)` -> what should be estimated.
        x_0: `(alpha, sigma, x_t, estimate)` -> the clean clip.
        eps: `(alpha, sigma, x_t, estimate)` -> the noise.
        gain: `(alpha, sigma)` -> how far x_0 is off when the estimate is off by one.
    """

    target: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
    x_0: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
    eps: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
    gain: Callable[[Tensor, Tensor], Tensor]


OBJECTIVES: dict[str, Objective] = {
    "eps": Objective(
        target=lambda alpha, sigma, x_0, noise: noise,
        x_0=lambda alpha, sigma, x_t, estimate: (x_t - sigma * estimate) / alpha,
        eps=lambda alpha, sigma, x_t, estimate: estimate,
        gain=lambda alpha, sigma: sigma / alpha,
    ),
    "v": Objective(
        target=lambda alpha, sigma, x_0, noise: alpha * noise - sigma * x_0,
        x_0=lambda alpha, sigma, x_t, estimate: alpha * x_t - sigma * estimate,
        eps=lambda alpha, sigma, x_t, estimate: sigma * x_t + alpha * estimate,
        gain=lambda alpha, sigma: sigma,
    ),
    "flow": Objective(
        target=lambda alpha, sigma, x_0, noise: noise - x_0,
        x_0=lambda alpha, sigma, x_t, estimate: x_t - sigma * estimate,
        eps=lambda alpha, sigma, x_t, estimate: x_t + alpha * estimate,
        gain=lambda alpha, sigma: sigma,
    ),
}


class Prediction(NamedTuple):
    """What one network evaluation estimates of each frame; all `(b f c h w)`."""

    x_0: Tensor
    eps: Tensor
    variance: Tensor | None
    """Learned variance: -1 is the lower, +1 the upper end of its log range."""
    estimate: Tensor
    """The network's own output: see `DiffusionConfig.objective`."""


class _Posterior(NamedTuple):
    """q(x_next | x_t, x_0) of each frame: the coefficients of its mean, and the ends of its log-variance's range."""

    of_x_0: Tensor
    of_x_t: Tensor
    lower: Tensor
    upper: Tensor

    def mean(self, x_0: Tensor, x_t: Tensor) -> Tensor:
        return self.of_x_0 * x_0 + self.of_x_t * x_t


def _noised(x_0: Tensor, noise: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
    return alpha.to(x_0.dtype) * x_0 + sigma.to(x_0.dtype) * noise


class Diffusion:
    """The noise table and everything that is a formula of it."""

    def __init__(self, config: DiffusionConfig | None = None) -> None:
        self.config = config or DiffusionConfig()
        self.objective = OBJECTIVES[self.config.objective]
        self.alpha_bar = self._table()  # alpha ** 2, (T + 1)
        self._on: dict[torch.device, Tensor] = {}

    def _table(self) -> Tensor:
        c = self.config
        if c.objective == "flow":
            return torch.linspace(1, 0, c.num_timesteps + 1, dtype=torch.float64).square()
        betas = torch.linspace(c.beta_start, c.beta_end, c.num_timesteps, dtype=torch.float64)
        return torch.cat([torch.ones(1, dtype=torch.float64), torch.cumprod(1 - betas, 0)])

    @property
    def num_timesteps(self) -> int:
        """T: timesteps run from 0 (clean) to T (noise)."""
        return self.config.num_timesteps

    def _table_on(self, device: torch.device) -> Tensor:
        """`alpha_bar` of 0..T on a device, to which it is copied once."""
        if device not in self._on:
            self._on[device] = self.alpha_bar.to(device)
        return self._on[device]

    def _alpha_bar(self, t: Tensor) -> Tensor:
        """`alpha_bar[t]` as float64, `(b f) -> (b f 1 1 1)`."""
        return self._table_on(t.device)[t][..., None, None, None]

    def _power(self, alpha_bar: Tensor) -> Tensor | float:
        """`alpha ** 2 + sigma ** 2`: 1 where the process preserves variance; less on the straight line of a flow."""
        return alpha_bar + (1 - alpha_bar.sqrt()) ** 2 if self.config.objective == "flow" else 1.0

    def levels(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """`alpha` and `sigma` of each frame: `(b f) -> (b f 1 1 1)`, float64."""
        return self._levels(self._alpha_bar(t))

    def _levels(self, alpha_bar: Tensor) -> tuple[Tensor, Tensor]:
        return alpha_bar.sqrt(), (self._power(alpha_bar) - alpha_bar).sqrt()

    def noise_levels(self) -> Tensor:
        """`sigma / alpha` of t = 0..T, float64 `(T + 1,)`; it rises, and ends with infinity for a flow."""
        alpha, sigma = self.levels(torch.arange(self.num_timesteps + 1)[None])
        return (sigma / alpha).flatten()

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
        return _noised(x_0, noise, *self.levels(t))

    def predict(self, output: Tensor, x_t: Tensor, t: Tensor) -> Prediction:
        """Read the network's output: float32 estimates of the clean clip and of the noise.

        A frame at `t = 0` is its own estimate.
        """
        return self._predict(output.float(), x_t.float(), *self.levels(t))

    def _predict(self, output: Tensor, x_t: Tensor, alpha: Tensor, sigma: Tensor) -> Prediction:
        estimate, variance = output.chunk(2, dim=2) if self.config.learned_variance else (output, None)
        alpha, sigma = alpha.float(), sigma.float()
        x_0 = self.objective.x_0(alpha, sigma, x_t, estimate)
        return Prediction(x_0, self.objective.eps(alpha, sigma, x_t, estimate), variance, estimate)

    def target(self, x_0: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        """What the network should estimate of each frame, float32 `(b f c h w)`."""
        alpha, sigma = (level.float() for level in self.levels(t))
        return self.objective.target(alpha, sigma, x_0.float(), noise.float())

    def weight(self, t: Tensor) -> Tensor:
        """Weight of each frame's squared error, `(b f) -> (b f)` float32: 1, or that of `DiffusionConfig.min_snr`."""
        if not self.config.min_snr:
            return torch.ones_like(t, dtype=torch.float32)
        alpha, sigma = (level.flatten(1) for level in self.levels(t.clamp(1, self.num_timesteps)))
        # At T a flow has no signal left: an SNR of 0, which it would have to divide by.
        snr = (alpha / sigma).square().clamp(min=1e-12)
        return (snr.clamp(max=self.config.min_snr) * self.objective.gain(alpha, sigma).square()).float()

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
        found = self._posterior(self._alpha_bar(t), self._alpha_bar(t_next))
        return found.mean(x_0, x_t), found.lower, found.upper

    def _posterior(self, now: Tensor, then: Tensor) -> "_Posterior":
        """The posterior of frames that step from `alpha_bar` `now` to `then`, `(b f 1 1 1)` each."""
        beta, noise_now, noise_then = self._step(now, then)
        first, second = self._table_on(now.device)[1], self._table_on(now.device)[2]
        floor_beta, noise_second, noise_first = self._step(second, first)
        floor = noise_first / noise_second * floor_beta
        variance = torch.where(then < 1, beta * noise_then / noise_now, floor)
        return _Posterior(
            (then.sqrt() * beta / noise_now).float(),
            ((now / then).sqrt() * noise_then / noise_now).float(),
            variance.log().float(),
            beta.log().float(),
        )

    def _step(self, now: Tensor, then: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Noise variance that the forward step from `then` to `now` adds; and the variances at `now` and at `then`."""
        power_now, power_then = self._power(now), self._power(then)
        return power_now - now / then * power_then, power_now - now, power_then - then

    def training_losses(
        self, model: Denoiser, x_0: Tensor, t: Tensor, y: Tensor | None = None, noise: Tensor | None = None
    ) -> Tensor:
        """Loss of each frame: squared error of the estimate, plus the variational term that trains the variance.

        The variational term (IDDPM, L_vlb; in bits per dimension) holds the estimate fixed, and is chosen per
        frame: the decoder's likelihood where the frame is at its last step, `t = 1`, the divergence elsewhere.
        A frame at `t = 0` has nothing to predict and its loss is 0.

        Args:
            model: called as `model(x_t, t, y)`.
            x_0: clean latents `(b f c h w)`.
            t: int `(b f)` in 0..T.
            y: condition `(b ...)`, such as class labels; only the model looks into it.
            noise: standard normal, shaped as `x_0`; drawn from the default generator when not given.

        Returns:
            float32 `(b f)`.

        Raises:
            ValueError: if `t` is not one timestep per frame.
        """
        noise = torch.randn_like(x_0) if noise is None else noise
        check_timesteps(x_0, t)
        alpha_bar = self._alpha_bar(t)  # read once: every formula below is of it
        alpha, sigma = self._levels(alpha_bar)
        x_t = _noised(x_0, noise, alpha, sigma)
        prediction = self._predict(model(x_t, t, y).float(), x_t.float(), alpha, sigma)
        target = self.objective.target(alpha.float(), sigma.float(), x_0.float(), noise.float())
        loss = (prediction.estimate - target).square().flatten(2).mean(2)
        if self.config.min_snr:
            loss = loss * self.weight(t)
        if prediction.variance is not None:
            loss = loss + self._variational(prediction, x_0.float(), x_t.float(), t, alpha_bar)
        return torch.where(t > 0, loss, 0.0)

    def _variational(self, prediction: Prediction, x_0: Tensor, x_t: Tensor, t: Tensor, alpha_bar: Tensor) -> Tensor:
        assert prediction.variance is not None
        # A clean frame has no step behind it: it takes that of t = 1, so that no gradient is 0 / 0.
        now = torch.where(t[..., None, None, None] > 0, alpha_bar, self._table_on(t.device)[1])
        posterior = self._posterior(now, self._alpha_bar((t - 1).clamp(min=0)))
        t = t.clamp(min=1)
        lower = posterior.lower
        true_mean, mean = posterior.mean(x_0, x_t), posterior.mean(prediction.x_0.detach(), x_t)
        log_variance = interpolate_log_variance(prediction.variance, lower, posterior.upper)
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
