"""Settings of the data that a run trains on."""

import math
from dataclasses import dataclass
from typing import Literal

from fvdm.config import in_range


@dataclass(frozen=True)
class DataConfig:
    """What is trained on.

    Attributes:
        path: folder of latent shards, or its URL, or URLs of tars with braces, as WebDataset takes them
            (`s3://bucket/latents`, `pipe:ssh host cat /data/train-{000000..000007}.tar`).
        split: which split of the folder.
        frames: frames of a clip, >= 1; shorter videos are left out, with a warning.
        stride: take every stride-th frame, >= 1; in a shorter video the largest stride that fits.
        batch_size: clips per step over all ranks, >= 1.
        workers: processes per rank that read ahead; 0 reads in the training process.
        flip: mirror half of the clips, where the shards hold the mirrored twins.
        corrupt: what to do with a sample whose bytes are damaged: `stop`, or `skip` and take another in its
            place.
        cache: folder for shards fetched from a URL [$FVDM_CACHE or ~/.cache/fvdm/shards].
    """

    path: str
    split: str = "train"
    frames: int = 16
    stride: int = 3
    batch_size: int = 8
    workers: int = 2
    flip: bool = True
    corrupt: Literal["stop", "skip"] = "stop"
    cache: str | None = None

    def __post_init__(self) -> None:
        """Raises ValueError for a setting out of its range."""
        some = (1, math.inf)
        in_range(self, "data", frames=some, stride=some, batch_size=some, workers=(0, math.inf))
