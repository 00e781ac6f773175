"""Settings of the playground."""

import math
from dataclasses import dataclass
from typing import Literal

from fvdm.config import in_range


@dataclass(frozen=True)
class PlayConfig:
    """The page, and the model behind it.

    Attributes:
        checkpoint: a run's folder, a checkpoint, a folder of `fvdm convert`, or `example`, which ships with this.
        weights: ema (the average) or model (the weights themselves).
        base: base model of a LoRA, where it is no longer where it was in training; a path, or wan: and a hub name.
        vae: VAE by name or path; empty takes the one the model was trained with.
        text_encoder: text encoder by name or path; empty takes the one the model was trained with.
        device: where to run, such as cuda or cpu; empty takes a GPU if there is one.
        precision: bf16 or fp32; empty takes bf16 on a GPU, fp32 on the CPU.
        host: address to listen on; only this machine can reach 127.0.0.1.
        port: port to listen on; 0 takes a free one.
        max_steps: largest number of sampling steps that the page accepts.
        max_frames: longest video that the page accepts, in frames.
        max_waiting: requests that may wait in the queue; further ones are refused.
        open_browser: open the page in a browser.
    """

    checkpoint: str = "example"
    weights: Literal["ema", "model"] = "ema"
    base: str = ""
    vae: str = ""
    text_encoder: str = ""
    device: str = ""
    precision: Literal["", "bf16", "fp32"] = ""
    host: str = "127.0.0.1"
    port: int = 7860
    max_steps: int = 100
    max_frames: int = 64
    max_waiting: int = 16
    open_browser: bool = False

    def __post_init__(self) -> None:
        """Raises ValueError for a setting out of its range."""
        some = (1, math.inf)
        in_range(self, port=(0, 65535), max_steps=(1, 1000), max_frames=some, max_waiting=some)
