"""Scores against a ground truth, frame by frame. Of what is drawn only: given frames would flatter."""

from collections.abc import Sequence
from typing import Any

import torch
from einops import rearrange
from torch import Tensor


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


def _torchmetrics() -> Any:
    try:
        from torchmetrics.functional import image
    except ImportError:
        raise ValueError("PSNR and SSIM are those of torchmetrics: pip install torchmetrics") from None
    return image
