"""Settings of the data that a run trains on."""

import math
from dataclasses import dataclass
from typing import Literal

from fvdm.config import in_range


@dataclass(frozen=True)
class DataConfig:
    """What is trained on.

    Attributes:
        path: folder of latent shards, or its URL, or URLs of tars with braces (`https://host/latents`,
            `s3://bucket/latents`, `pipe:ssh host cat /data/train-{000000..000007}.tar`).
        split: which split of the folder.
        frames: frames of a clip, >= 1; shorter videos are left out, with a warning.
        stride: take every stride-th frame, >= 1; in a shorter video the largest stride that fits.
        batch_size: clips per step over all ranks, >= 1.
        workers: processes per rank that read ahead; 0 reads in the training process.
        flip: flip half of the clips horizontally, where the shards hold the flipped copies.
        corrupt: what to do with a corrupt sample: `stop`, or `skip` and take another in its place.
        lanes: parts of the data that are read side by side, so that a node needs only its share of the shards; a
            divisor of the batch size, and a multiple of the number of ranks. 0 is one permutation of all videos. The
            default is the batch size for shards of format 2 or behind a URL, and 0 for local shards of format 1. A run
            that is resumed keeps its own.
        shuffle_window: shards over which a lane is shuffled, >= 1; more mix better, and need more room in the cache.
        cache: folder for shards fetched from a URL [$FVDM_CACHE or ~/.cache/fvdm/shards].
        cache_gb: most gigabytes of shards in that folder on each node; 0 is no bound.
    """

    path: str
    split: str = "train"
    frames: int = 16
    stride: int = 3
    batch_size: int = 8
    workers: int = 2
    flip: bool = True
    corrupt: Literal["stop", "skip"] = "stop"
    lanes: int | None = None
    shuffle_window: int = 4
    cache: str | None = None
    cache_gb: float = 0.0

    def __post_init__(self) -> None:
        """Raises ValueError for a setting out of its range."""
        some = (1, math.inf)
        any_number = (0, math.inf)
        in_range(self, "data", frames=some, stride=some, batch_size=some, workers=any_number)
        in_range(self, "data", shuffle_window=some, cache_gb=any_number)
        if self.lanes is not None:
            in_range(self, "data", lanes=any_number)
