"""What generating needs, once it is loaded."""

from dataclasses import dataclass
from pathlib import Path

import torch

from fvdm.diffusion.process import Diffusion
from fvdm.generation.prompts import PromptEncoder
from fvdm.media.frames import FrameMap
from fvdm.media.vae import VAE
from fvdm.models.backbone import Backbone


@dataclass(frozen=True)
class Components:
    """A trained model with everything that is needed to use it.

    Attributes:
        model: on its device, in eval mode.
        diffusion: its noise process.
        vae: turns its latents into images.
        classes: names of its classes; empty without.
        size: height of a frame in pixels: its side, if it is a square.
        stride: the clips it was trained on take every stride-th frame.
        step: optimizer steps it was trained for; 0 where that is not known.
        folder: where it came from.
        text: embeds prompts; None for a model that takes no text.
        shift: of the spacing `shift`, unless the settings name another.
    """

    model: Backbone
    diffusion: Diffusion
    vae: VAE
    classes: tuple[str, ...]
    size: int
    stride: int
    step: int
    folder: Path
    text: PromptEncoder | None = None
    shift: float = 3.0

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return self.model.device

    @property
    def frame_size(self) -> tuple[int, int]:
        """Height and width of a frame in pixels."""
        _, height, width = self.model.config.latent_shape
        return height * self.vae.factor, width * self.vae.factor

    @property
    def window(self) -> int:
        """Latent frames that the model takes at once."""
        return self.model.config.frames

    @property
    def frame_map(self) -> FrameMap:
        """From frames of the video to latent frames."""
        return self.vae.frame_map
