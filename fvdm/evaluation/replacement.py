"""Conditioning a model that knows only one timestep per clip: what a timestep per frame is held against.

At every step the given frames are put back at the noise level of the others (replacement; Ho et al., "Video Diffusion
Models", 2022, section 3.1), and, in RePaint (Lugmayr et al., 2022), each step is taken back and repeated some times, so
that the drawn frames can agree with them.
"""

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor

from fvdm.diffusion.process import Denoiser, Diffusion
from fvdm.diffusion.sampling import draw_noise, generators, sample
from fvdm.diffusion.timesteps import full_sequence


@torch.no_grad()
def replacement(
    model: Denoiser,
    diffusion: Diffusion,
    clip: Tensor,
    given: Sequence[int],
    seeds: Sequence[int],
    steps: int = 50,
    repeats: int = 1,
    length: int = 0,
    y: Tensor | None = None,
) -> Tensor:
    """Draw the frames that are not given, by DDIM, all frames at one timestep; window by window for more frames.

    Args:
        model: the denoiser.
        diffusion: its noise process.
        clip: latents `(b f c h w)`; what stands in frames not given is ignored.
        given: indices of the given frames.
        seeds: one per sample.
        steps: sampling steps.
        repeats: times that each step is taken; 1 is plain replacement, RePaint takes more.
        length: frames wanted; 0 is f.
        y: class labels `(b)`.

    Returns:
        latents `(b length c h w)`; given frames are those of `clip`.
    """
    generator = generators(seeds)

    def draw(latents: Tensor, held: Sequence[int]) -> Tensor:
        rows = full_sequence(steps, latents.shape[1], diffusion.num_timesteps)
        held = list(held)
        x = draw_noise(latents.shape, generator, latents.device).to(latents.dtype)
        for now, then in itertools.pairwise(rows):
            for k in range(repeats):
                t = now.to(x.device).expand(x.shape[:2])
                noised = diffusion.q_sample(latents, t, draw_noise(x.shape, generator, x.device).to(x.dtype))
                x[:, held] = noised[:, held]
                x = sample(model, x, torch.stack([now, then]), diffusion, y=y)
                if k < repeats - 1:
                    x = _back(diffusion, x, int(then[0]), int(now[0]), draw_noise(x.shape, generator, x.device))
        x[:, held] = latents[:, held]
        return x

    video, shared = draw(clip, given), clip.shape[1] // 2
    while video.shape[1] < length:  # Each window starts from the last half of the one before.
        following = torch.zeros_like(clip)
        following[:, :shared] = video[:, -shared:]
        video = torch.cat([video, draw(following, range(shared))[:, shared:]], dim=1)
    return video[:, : length or clip.shape[1]]


def _back(diffusion: Diffusion, x: Tensor, t: int, later: int, noise: Tensor) -> Tensor:
    """The forward process from `t` to the `later` timestep (RePaint, equation 1)."""
    share = float(diffusion.alpha_bar[later] / diffusion.alpha_bar[t])
    return share**0.5 * x + (1 - share) ** 0.5 * noise.to(x.dtype)
