"""Scores against a ground truth, frame by frame. Of what is drawn only: given frames would flatter."""

from collections.abc import Sequence
from typing import Any

import torch
from einops import rearrange
from torch import Tensor

from fvdm.diffusion.process import Denoiser, Diffusion

LEVELS = (0, 250, 500, 750)  # timesteps of the cleanest neighbour of a frame
OWN = (250, 500, 750, 1000)  # timesteps of the frame itself


def psnr(made: Tensor, truth: Tensor) -> Tensor:
    """Peak signal-to-noise ratio of every frame, float64 `(b f)`, in dB; at most 100 where frames are equal.

    Args:
        made: uint8 `(b f 3 h w)`.
        truth: the same.

    Raises:
        ValueError: if their shapes differ.
    """
    if made.shape != truth.shape:
        raise ValueError(f"videos {tuple(made.shape)} have no scores against {tuple(truth.shape)}: give equal shapes")
    image = _torchmetrics()
    pairs = zip(made.flatten(0, 1).double(), truth.flatten(0, 1).double(), strict=True)
    values = [image.peak_signal_noise_ratio(a[None], b[None], data_range=255.0) for a, b in pairs]
    return torch.stack(values).clamp(max=100.0).view(made.shape[:2])


def ssim(made: Tensor, truth: Tensor) -> Tensor:
    """Structural similarity (Wang et al., 2004) of every frame, float64 `(b f)`, -1 to 1.

    Args:
        made: uint8 `(b f 3 h w)`, 11 pixels wide or more.
        truth: the same.

    Raises:
        ValueError: if their shapes differ.
    """
    if made.shape != truth.shape:
        raise ValueError(f"videos {tuple(made.shape)} have no scores against {tuple(truth.shape)}: give equal shapes")
    a, b = (rearrange(video, "b f c h w -> (b f) c h w").double() for video in (made, truth))
    values = _torchmetrics().structural_similarity_index_measure(a, b, data_range=255.0, reduction="none")
    return values.view(made.shape[:2])


def feature_distance(made: Tensor, truth: Tensor) -> Tensor:
    """Euclidean distance of the I3D features `(b 400)` of clips and their truth, `(b)`.

    A perceptual distance of whole clips. It stands where others put LPIPS, whose weights no package carries.
    """
    return (made.double() - truth.double()).norm(dim=1)


def drawn(frames: int, given: Sequence[int]) -> list[int]:
    """The frames of a clip that are not given."""
    return [frame for frame in range(frames) if frame not in set(given)]


@torch.no_grad()
def neighbour_table(model: Denoiser, diffusion: Diffusion, x_0: Tensor, seed: int, y: Tensor | None = None) -> Tensor:
    """What a frame's estimate is worth, by its own timestep and that of its cleanest neighbour.

    One frame of each clip stands at its own timestep, the frame after it at the smallest, all others above that.

    Args:
        model: the denoiser.
        diffusion: its noise process.
        x_0: clean latents `(b f c h w)`, f > 2.
        seed: of the frames, timesteps and noise, drawn on the CPU: equal seeds compare models, on any device.
        y: classes `(b)` of a class-conditional model; the null class hides them.

    Returns:
        float64 `(b own smallest 3)`, where the latents are: mean squared error of the estimate of the clean frame; that
        of the neighbour, if it were copied; and the share of the way from the truth to the neighbour that the estimate
        lies on (1 is a copy, 0 is none).
    """
    b, f = x_0.shape[:2]
    generator = torch.Generator().manual_seed(seed)
    rows = torch.arange(b)
    frame = torch.randint(0, f - 1, (b,), generator=generator)
    noise = torch.randn(x_0.shape, generator=generator).to(x_0.device)
    share = torch.rand((b, f), generator=generator).to(x_0.device)
    rows, frame = rows.to(x_0.device), frame.to(x_0.device)
    truth, neighbour = x_0[rows, frame], x_0[rows, frame + 1]
    way = neighbour - truth
    copied = way.square().flatten(1).mean(1)
    cells = []
    for own in OWN:
        for least in LEVELS:
            t = (least + share * (diffusion.num_timesteps - least)).round().long()
            t[rows, frame], t[rows, frame + 1] = own, least
            x_t = diffusion.q_sample(x_0, t, noise)
            estimate = diffusion.predict(model(x_t, t, y), x_t, t).x_0[rows, frame]
            off = estimate - truth
            along = (off * way).flatten(1).sum(1) / way.square().flatten(1).sum(1).clamp(min=1e-6)
            cells.append(torch.stack([off.square().flatten(1).mean(1), copied, along], dim=1).double())
    return torch.stack(cells, dim=1).unflatten(1, (len(OWN), len(LEVELS)))


def _torchmetrics() -> Any:
    try:
        from torchmetrics.functional import image
    except ImportError:
        raise ValueError("PSNR and SSIM are those of torchmetrics: pip install torchmetrics") from None
    return image
