"""Denoisers to test samplers with: one that knows the answer, an exact one of Gaussian data, a random network."""

from dataclasses import replace

import torch

from fvdm.diffusion.process import Diffusion
from fvdm.models import build, preset
from tests.latte import randomised

DIFFUSION = Diffusion()


def clean(shape=(3, 8, 4, 4, 4), seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def oracle(x_0, diffusion=DIFFUSION):
    """A denoiser that knows the answer: the noise that is really in x_t, and the lowest variance."""

    def model(x_t, t, y=None):
        alpha, sigma = diffusion.levels(t)
        eps = ((x_t.double() - alpha * x_0.double()) / sigma.clamp(min=1e-9)).float()
        estimate = diffusion.target(x_0, t, eps)
        if not diffusion.config.learned_variance:
            return estimate
        return torch.cat([estimate, torch.full_like(estimate, -1.0)], dim=2)

    return model


def disturbed(diffusion=DIFFUSION, **changes):
    """The exact denoiser of unit Gaussian data, disturbed by a random network: samples are of the size of latents."""
    net = randomised(build(replace(preset("T/2"), size=4, frames=8, **changes))).eval()

    def model(x, t, y=None):
        alpha, sigma = (level.float() for level in diffusion.levels(t))
        out, v = net(x, t, y).chunk(2, dim=2)
        spread = (alpha**2 + sigma**2).sqrt()
        eps = sigma * x / spread**2 + 0.3 * alpha / spread * out
        x_0 = (x - sigma * eps) / alpha.clamp(min=1e-4)
        return torch.cat([diffusion.target(x_0, t, eps), v.clamp(-1, 1)], dim=2)

    model.null = net.null
    return model
