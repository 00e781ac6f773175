"""Settings of the playground."""

import math
from dataclasses import dataclass

from fvdm.config import in_range
from fvdm.generation.config import ModelConfig


@dataclass(frozen=True, kw_only=True)
class LimitsConfig:
    """What visitors of the page may ask for.

    Attributes:
        max_steps: largest number of sampling steps that the page accepts.
        max_frames: longest video that the page accepts, in frames.
        max_waiting: requests that may wait in the queue; further ones are refused.
    """

    max_steps: int = 100
    max_frames: int = 64
    max_waiting: int = 16


@dataclass(frozen=True)
class PlayConfig(LimitsConfig, ModelConfig):
    """The page, and the model behind it.

    Attributes:
        checkpoint: a run's folder, a checkpoint, a folder of `fvdm convert`, or `example`, which ships with this.
        host: address to listen on; only this machine can reach 127.0.0.1.
        port: port to listen on; 0 takes a free one.
        open_browser: open the page in a browser.
    """

    checkpoint: str = "example"
    host: str = "127.0.0.1"
    port: int = 7860
    open_browser: bool = False

    def __post_init__(self) -> None:
        """Raises ValueError for a setting out of its range."""
        some = (1, math.inf)
        in_range(self, port=(0, 65535), max_steps=(1, 1000), max_frames=some, max_waiting=some)
