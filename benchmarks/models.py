"""Models to measure: a checkpoint, or one of random weights where only speed and the solvers' errors matter."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fvdm.diffusion.config import DiffusionConfig
from fvdm.diffusion.process import Diffusion
from fvdm.distributed import Ranks, seed_everything
from fvdm.generation.pipeline import Trained, load
from fvdm.media.vae import load_vae
from fvdm.models.backbone import Backbone
from fvdm.models.config import BACKENDS, BackboneConfig, Backend
from fvdm.models.loading import build, preset
from fvdm.training.config import EngineConfig
from fvdm.training.ema import EMA
from fvdm.training.engine import Engine, initialise

RANDOM = "random:"


def open_model(checkpoint: str, precision: str = "", attention: Backend = "auto", frames: int = 16) -> Trained:
    """A model in a precision and with an attention backend.

    Args:
        checkpoint: a run's folder or a checkpoint; or `random:` and a size, such as `random:T/2`, for one of random
            weights on 64-pixel clips of `frames` frames.
        precision: bf16 or fp32; empty takes bf16 on a GPU.
        attention: backend.
        frames: of a random model.

    Raises:
        ValueError: if there is no such checkpoint, size, precision or backend.
    """
    if attention not in BACKENDS or precision not in ("", "bf16", "fp32"):
        raise ValueError(
            f"attention {attention!r}, precision {precision!r}: choose one of {', '.join(BACKENDS)}, and bf16 or fp32"
        )
    if checkpoint.startswith(RANDOM):
        return _random(checkpoint.removeprefix(RANDOM), precision, attention, frames)
    trained = load(checkpoint, precision=precision)
    return replace(trained, model=_with(trained.model, attention))


def _random(size: str, precision: str, attention: Backend, frames: int) -> Trained:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    vae = load_vae("builtin", device)
    side = 64 // vae.factor
    config = replace(preset(size).fit((vae.channels, side, side), frames), attention=attention)
    low = (precision or ("bf16" if device.type == "cuda" else "fp32")) == "bf16"
    model = random_backbone(config, device, torch.bfloat16 if low else torch.float32).eval().requires_grad_(False)
    # The estimate of v keeps the latents of a network that knows nothing near unit variance.
    diffusion = Diffusion(DiffusionConfig(objective="v"))
    return Trained(model, diffusion, vae, (), 64, 1, 0, Path(f"random-{size.replace('/', '-')}"))


def network(name: str, size: int, frames: int, channels: int = 4) -> BackboneConfig:
    """A network by size and patch, for clips of `frames` latent frames of `channels x size x size`.

    Raises:
        ValueError: if there is no such size.
    """
    return preset(name).fit((channels, size, size), frames)


def zero_engine(config: BackboneConfig, ranks: Ranks, batch: int, **settings: Any) -> tuple[Engine, EMA]:
    """A new network under ZeRO-2, clipped from the first step, and its EMA. Collective.

    Args:
        config: of the network.
        ranks: this process among its peers.
        batch: global batch, in clips.
        settings: of the engine.
    """
    seed_everything(0)
    engine_config = EngineConfig(grad_clip_start=0, **settings)
    device = initialise(engine_config.timeout)
    engine = Engine(build(config).to(device), engine_config, batch, ranks)
    return engine, EMA(engine.masters)


def random_backbone(config: BackboneConfig, device: torch.device, dtype: torch.dtype) -> Backbone:
    """A network of random weights, the same on every device; those that are zero in a new one are random too."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = build(config)
        for weight in model.parameters():
            if not weight.any():  # A new network's output is zero: all solvers, and all devices, would agree.
                nn.init.normal_(weight, std=0.02)
    return model.to(device, dtype)


def _with(model: Backbone, attention: Backend) -> Backbone:
    """The same weights with another attention backend."""
    if attention == model.config.attention:
        return model
    weight = next(model.parameters())
    other = build(replace(model.config, attention=attention)).to(weight.device, weight.dtype)
    other.load_state_dict(model.state_dict())
    return other.eval().requires_grad_(False)
