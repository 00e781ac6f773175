"""Fréchet video distance: I3D features of clips, their float64 statistics, and the distance.

Unterthiner et al., "Towards Accurate Generative Models of Video" (2018): the squared Fréchet distance between
the Gaussians that fit the 400 logits of real and of generated clips.
"""

import math
import warnings
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from fvdm.evaluation.i3d import FEATURES, I3D, MIN_FRAMES, SIDE, load_i3d

__all__ = ["Statistics", "features", "frechet_distance", "load_i3d"]

COMPARABLE = 2048  # clips behind a published distance
Resize = Literal["direct", "short-side"]


@torch.no_grad()
def features(net: I3D, video: Tensor, batch: int = 8, resize: Resize = "direct") -> Tensor:
    """I3D features of clips: the logits averaged over time, before any softmax.

    Computed in true float32, whatever the autocast or TF32 settings around it, by deterministic algorithms.

    Args:
        net: from `load_i3d`.
        video: uint8 `(b f 3 h w)`, RGB, f >= 9, of any size and on any device.
        batch: clips that go through the network at once; bounds the memory. On a CPU they go side by side, a thread
            each, so that a clip's features depend neither on it nor on the number of threads.
        resize: bilinear, without antialiasing; `direct` takes the whole image to 224 x 224 (TATS,
            cd-fvd), `short-side` its shorter side to 224 and then the centre (StyleGAN-V, VideoGPT). Square
            images come out the same.

    Returns:
        float32 `(b 400)`, on the network's device.

    Raises:
        ValueError: if the video has another dtype or shape or under 9 frames, or for a bad batch or resize.
    """
    if video.dtype != torch.uint8 or video.ndim != 5 or video.shape[2] != 3 or 0 in video.shape[1:]:
        raise ValueError(
            f"a video of {video.dtype} {tuple(video.shape)} has no I3D features: it must be RGB clips, "
            "uint8 (b f 3 h w), 0 to 255"
        )
    if video.shape[1] < MIN_FRAMES:
        raise ValueError(
            f"clips of {video.shape[1]} frames are too short for the I3D, which halves time three times and "
            f"then averages two steps: give {MIN_FRAMES} or more (repeated frames would change the distance)"
        )
    if batch < 1 or resize not in ("direct", "short-side"):
        raise ValueError(f"batch={batch}, resize={resize!r}: give batch >= 1, and direct or short-side")
    device = net.logits.weight.device
    parts = [torch.empty((0, FEATURES), device=device)]
    with _full_precision(device):
        if device.type == "cpu":
            return torch.cat([*parts, *_each_alone(net, video, batch, resize)])
        for begin in range(0, len(video), batch):
            parts.append(net(_prepare(video[begin : begin + batch].to(device), resize)))
    return torch.cat(parts)


def _each_alone(net: I3D, video: Tensor, batch: int, resize: Resize) -> list[Tensor]:
    """Clips side by side, each on one thread: the last digits depend neither on the threads nor on the batch."""
    threads = torch.get_num_threads()
    at_once = max(1, min(batch, threads, len(video)))
    try:
        with ThreadPoolExecutor(at_once, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            return list(pool.map(lambda clip: net(_prepare(clip[None].cpu(), resize)), video))
    finally:
        torch.set_num_threads(threads)  # New threads would take over what the last of these has set.


def _prepare(clips: Tensor, resize: Resize) -> Tensor:
    """Clips, uint8 `(b f 3 h w)`, as the network takes them: float32 `(b 3 f 224 224)` in [-1, 1]."""
    b, _, _, h, w = clips.shape
    shorter = min(h, w)
    size = (SIDE, SIDE) if resize == "direct" else (-(-h * SIDE // shorter), -(-w * SIDE // shorter))
    x = rearrange(clips, "b f c h w -> (b f) c h w").float()
    x = F.interpolate(x, size=size, mode="bilinear", align_corners=False, antialias=False)
    top, left = (size[0] - SIDE) // 2, (size[1] - SIDE) // 2
    x = x[..., top : top + SIDE, left : left + SIDE] / 127.5 - 1
    return rearrange(x, "(b f) c h w -> b c f h w", b=b)


@contextmanager
def _full_precision(device: torch.device) -> Iterator[None]:
    """No autocast, TF32 or bf16 inside float32 convolutions, and no choice of algorithm by timing."""
    cudnn: Any = torch.backends.cudnn
    mkldnn: Any = torch.backends.mkldnn
    changed: list[tuple[Any, str, Any]] = [(cudnn, "benchmark", False), (cudnn, "deterministic", True)]
    if hasattr(cudnn, "conv"):
        changed += [(cudnn.conv, "fp32_precision", "ieee"), (mkldnn.conv, "fp32_precision", "ieee")]
    else:
        changed.append((cudnn, "allow_tf32", False))
    before = [getattr(owner, name) for owner, name, _ in changed]
    try:
        for owner, name, value in changed:
            setattr(owner, name, value)
        with torch.autocast(device.type, enabled=False):
            yield
    finally:
        for (owner, name, _), value in zip(changed, before, strict=True):
            setattr(owner, name, value)


class Statistics:
    """Count, mean and scatter of a stream of features, in float64 on the CPU.

    The scatter is kept about the running mean (Chan, Golub and LeVeque, 1979), so that no digits are lost to
    a large mean. Ranks combine theirs by gathering `state` and merging it in the order of the ranks.

    Attributes:
        n: how many features were seen.
        mean: `(d)`.
        scatter: `(d d)`, the sum of (x - mean)(x - mean)^T.
    """

    def __init__(self, dimension: int = FEATURES) -> None:
        self.n = 0
        self.mean = torch.zeros(dimension, dtype=torch.float64)
        self.scatter = torch.zeros((dimension, dimension), dtype=torch.float64)

    def update(self, x: Tensor | np.ndarray) -> None:
        """Take in features `(b d)`; ValueError if they are not of `d` finite numbers each."""
        x = _as_features(x)
        if x.shape[1] != len(self.mean):
            raise ValueError(f"features of {x.shape[1]} numbers do not fit statistics of {len(self.mean)}")
        if len(x) > 0:
            part = Statistics(len(self.mean))
            part.n, part.mean = len(x), x.mean(dim=0)
            part.scatter = (x - part.mean).T @ (x - part.mean)
            self.merge(part)

    def merge(self, other: "Statistics") -> None:
        """Take in what another has seen; ValueError if its features are of another dimension."""
        if len(other.mean) != len(self.mean):
            raise ValueError(f"statistics of {len(other.mean)} numbers do not fit those of {len(self.mean)}")
        n = self.n + other.n
        if other.n:
            step = other.mean - self.mean
            self.mean = self.mean + step * (other.n / n)
            self.scatter = self.scatter + other.scatter + torch.outer(step, step) * (self.n * other.n / n)
        self.n = n

    def covariance(self, ddof: int = 0) -> Tensor:
        """`(d d)`: the scatter / (n - ddof); ValueError where nothing is left to divide by."""
        if self.n <= ddof:
            raise ValueError(f"{self.n} clips have no covariance with ddof={ddof}: give more clips")
        return self.scatter / (self.n - ddof)

    @property
    def state(self) -> Tensor:
        """All of it as one float64 tensor `(1 + d + d * d)`, to be sent or stored."""
        count = torch.tensor([self.n], dtype=torch.float64)
        return torch.cat([count, self.mean, self.scatter.flatten()])

    @classmethod
    def from_state(cls, state: Tensor) -> "Statistics":
        """What `state` was, from any device; ValueError for a tensor of another shape."""
        dimension = (math.isqrt(max(4 * state.numel() - 3, 0)) - 1) // 2
        if state.ndim != 1 or len(state) != 1 + dimension + dimension**2:
            raise ValueError(f"a tensor {tuple(state.shape)} is no state of statistics: give what `state` is")
        self = cls(dimension)
        count, mean, scatter = state.detach().cpu().double().split([1, dimension, dimension**2])
        self.n, self.mean = int(count), mean.clone()
        self.scatter = scatter.reshape(dimension, dimension).clone()
        return self


Sample = Tensor | np.ndarray | Statistics


def frechet_distance(a: Sample, b: Sample, ddof: int = 0) -> float:
    """Squared Fréchet (2-Wasserstein) distance of the Gaussians that fit two sets of features.

    With covariances written as products of factors, C = F F^T, the trace of sqrt(C_a C_b) is the sum of the
    singular values of F_a^T F_b: finite and real however few the clips are, where a matrix square root of the
    singular product is neither.

    Args:
        a: features `(n d)`, or their `Statistics`. Given as features, they are never squared: more digits.
        b: the same of the other set; n may differ.
        ddof: covariances are divided by n - ddof: 0 as in StyleGAN-V (the paper), 1 as in TATS and VideoGPT.

    Returns:
        The distance, >= 0. Warns when a set has fewer clips than published distances take (2048), or fewer
        than d: the distance falls as n grows, so such values compare at equal n only.

    Raises:
        ValueError: if a set holds fewer than 2 clips, other dimensions than the other's, NaN or infinity.
    """
    (n_a, mean_a, factor_a), (n_b, mean_b, factor_b) = (_gaussian(x, ddof) for x in (a, b))
    if len(mean_a) != len(mean_b):
        raise ValueError(
            f"features of {len(mean_a)} and {len(mean_b)} numbers have no distance: use one network for both"
        )
    fewest, needed = min(n_a, n_b), max(COMPARABLE, len(mean_a))
    if fewest < needed:
        warnings.warn(
            f"the Fréchet distance of {n_a} against {n_b} clips is not comparable with published ones, of "
            f"{needed} clips or more: compare it only at equal n",
            stacklevel=2,
        )
    cross = torch.linalg.svdvals(factor_a.T @ factor_b).sum()
    spread = factor_a.square().sum() + factor_b.square().sum() - 2 * cross
    return max(float((mean_a - mean_b).square().sum() + spread), 0.0)


def _gaussian(sample: Sample, ddof: int) -> tuple[int, Tensor, Tensor]:
    """Count, mean `(d)` and factor `(d r)` of the covariance, which is factor @ factor.T; r <= n, d."""
    if isinstance(sample, Statistics):
        n, mean = sample.n, sample.mean
    else:
        x = _as_features(sample)
        n, mean = len(x), x.mean(dim=0)
    if n < 2 or n <= ddof:
        raise ValueError(f"a Fréchet distance needs at least {max(2, ddof + 1)} clips on each side, not {n}")
    if isinstance(sample, Statistics):
        values, vectors = torch.linalg.eigh(sample.covariance(ddof))
        noise = values.abs().max() * len(values) * torch.finfo(torch.float64).eps
        return n, mean, vectors * torch.where(values > noise, values, 0).sqrt()
    factor = (x - mean) / math.sqrt(n - ddof)
    return n, mean, (torch.linalg.qr(factor, mode="r").R if n > len(mean) else factor).T


def _as_features(x: Tensor | np.ndarray) -> Tensor:
    """Features as float64 `(n d)` on the CPU; ValueError if they are no such table of finite numbers."""
    x = (torch.tensor(x) if isinstance(x, np.ndarray) else x).detach().cpu().double()
    if x.ndim != 2 or x.shape[1] == 0:
        raise ValueError(f"features of shape {tuple(x.shape)} are no table: give (n, d), one row per clip")
    broken = (~x.isfinite().all(dim=1)).nonzero()
    if len(broken):
        raise ValueError(f"the features of clip {int(broken[0])} hold NaN or infinity: look at that clip")
    return x
