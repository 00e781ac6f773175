"""Networks and clips of the acceptance program, the same on every device."""

import gc
import time
from collections.abc import Callable
from statistics import median
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from benchmarks import models

if TYPE_CHECKING:
    from benchmarks.acceptance.config import AcceptanceConfig
    from fvdm.models.backbone import Backbone
    from fvdm.models.config import BackboneConfig

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def network(name: str, config: "AcceptanceConfig") -> "BackboneConfig":
    """A network by name, on clips of the program's frames and size."""
    return models.network(name, config.size, config.frames)


def build(shape: "BackboneConfig", device: str, precision: str) -> "Backbone":
    """A network of random weights, none of them zero."""
    return models.random_backbone(shape, torch.device(device), DTYPES[precision])


def clip(shape: "BackboneConfig", clips: int) -> tuple[Tensor, Tensor]:
    """Latents `(b f c h w)` and a timestep per frame `(b f)`, on the CPU."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(clips, *shape.clip_shape, generator=generator)
    return x, torch.randint(1, 1001, x.shape[:2], generator=generator)


def synchronize(device: str) -> None:
    """Wait for the GPU."""
    if device == "cuda":
        torch.cuda.synchronize()


def seconds(function: Callable[[], object], device: str, rounds: int) -> float:
    """Median time of a call, after one call that warms up."""
    times = []
    for _ in range(rounds + 1):
        synchronize(device)
        start = time.perf_counter()
        function()
        synchronize(device)
        times.append(time.perf_counter() - start)
    return median(times[1:])


def free() -> None:
    """Give cached memory back, before something large is built or measured."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
