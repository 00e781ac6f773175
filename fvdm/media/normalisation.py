"""How latents are scaled to unit variance, and drawn from the posterior of a VAE."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Normalisation:
    """Makes latents of unit variance: `scaled = (z - shift) * scale`.

    Attributes:
        shift: per channel, or one for all.
        scale: per channel, or one for all.
    """

    shift: tuple[float, ...]
    scale: tuple[float, ...]

    def apply(self, z: Tensor) -> Tensor:
        """Scale latents `(... c h w)`."""
        return (z - self._like(self.shift, z)) * self._like(self.scale, z)

    def invert(self, scaled: Tensor) -> Tensor:
        """The latents that `apply` made into these, `(... c h w)`."""
        return scaled / self._like(self.scale, scaled) + self._like(self.shift, scaled)

    @staticmethod
    def _like(values: tuple[float, ...], z: Tensor) -> Tensor:
        return torch.tensor(values, dtype=z.dtype, device=z.device)[:, None, None]

    def to_dict(self) -> dict[str, list[float]]:
        """For JSON."""
        return {"shift": list(self.shift), "scale": list(self.scale)}

    @classmethod
    def from_dict(cls, values: dict[str, list[float]]) -> "Normalisation":
        """What `to_dict` returned."""
        return cls(tuple(values["shift"]), tuple(values["scale"]))


def sample_latents(moments: Tensor, normalisation: Normalisation, noise: Tensor | None) -> Tensor:
    """Scaled latents from the VAE's posterior.

    Args:
        moments: mean and log-variance `(... 2c h w)`, as `VAE.encode` returns them.
        normalisation: of the VAE.
        noise: standard normal `(... c h w)`; None takes the mean.

    Returns:
        `(... c h w)`.
    """
    mean, log_variance = moments.chunk(2, dim=-3)
    z = mean if noise is None else mean + (0.5 * log_variance).exp() * noise
    return normalisation.apply(z)
