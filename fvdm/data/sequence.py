"""Which sample stands at each position of a run: the order of `fvdm.data.order` over real shards."""

import logging
from typing import NamedTuple

import numpy as np

from fvdm.data import former
from fvdm.data.config import DataConfig
from fvdm.data.order import BucketSchedule, LaneOrder, Order, PermutationOrder, rank_positions
from fvdm.data.shards import LatentShards

log = logging.getLogger(__name__)
KEPT_SHARDS = 4096  # shards whose rows are kept in memory


def resolve_lanes(config: DataConfig, shards: LatentShards, step_size: int) -> int:
    """Lanes of a new run: as set; else none for local shards of format 1, else as many as a step has samples.

    Local shards of format 1 keep the order that they have had, so that their runs stay the same to the bit.
    """
    if config.lanes is not None:
        return config.lanes
    local = isinstance(shards.manifest, former.Manifest) and not shards.location.remote
    return 0 if local else step_size


class Place(NamedTuple):
    """The sample at a position: bucket, lane epoch (or epoch), and row of the table of samples."""

    bucket: int
    epoch: int
    row: int


class SampleSequence:
    """The samples of a run by position.

    Args:
        shards: the samples.
        config: clip length, lanes and shuffle window.
        seed: of the order.
        step_size: samples of an optimizer step.

    Raises:
        ValueError: no sample is long enough, or lanes, batch and buckets do not fit.
    """

    def __init__(self, shards: LatentShards, config: DataConfig, seed: int, step_size: int) -> None:
        """Counts the usable samples of each shard."""
        self.shards, self.config, self.step_size = shards, config, step_size
        self.lanes = resolve_lanes(config, shards, step_size)
        counts = shards.usable(config.frames)
        usable = int(counts.sum())
        if not usable:
            raise ValueError(
                f"None of the {len(shards)} videos in {config.path!r} has {config.frames} frames; the longest "
                f"has {shards.frames.max()}: lower data.frames."
            )
        if short := len(shards) - usable:
            log.warning("%d of %d videos are shorter than %d frames, left out", short, len(shards), config.frames)
        self.buckets = np.flatnonzero(counts.sum(axis=1)).tolist()
        self._check()
        self.orders: list[Order] = [
            LaneOrder(seed, counts[bucket], self.lanes, config.shuffle_window, bucket)
            if self.lanes
            else PermutationOrder(seed, counts[bucket])
            for bucket in self.buckets
        ]
        self.schedule = BucketSchedule([int(counts[bucket].sum()) for bucket in self.buckets], step_size)
        self._rows: dict[tuple[int, int], np.ndarray] = {}

    def _check(self) -> None:
        if self.lanes and self.step_size % self.lanes:
            raise ValueError(
                f"data.batch_size {self.step_size} must be a multiple of data.lanes {self.lanes}: a step takes as many "
                "samples from each lane."
            )
        if not self.lanes and len(self.buckets) > 1:
            raise ValueError(
                f"The shards in {self.config.path!r} have {len(self.buckets)} buckets, and data.lanes 0 is for one: "
                "leave data.lanes out."
            )

    def _row(self, bucket: int, shard: int, number: int) -> int:
        if (bucket, shard) not in self._rows:
            if len(self._rows) == KEPT_SHARDS:
                self._rows.clear()
            self._rows[bucket, shard] = self.shards.rows(shard, bucket, self.config.frames)
        return int(self._rows[bucket, shard][number])

    def at(self, position: int, skip: int = 0) -> Place:
        """The sample at a position, or the one that comes `skip` places later in the same epoch."""
        step, offset = divmod(position, self.step_size)
        number, before = self.schedule(step)
        sample = self.orders[number].at(before * self.step_size + offset, skip)
        bucket = self.buckets[number]
        return Place(bucket, sample.epoch, self._row(bucket, sample.shard, sample.number))

    def ahead(self, step: int, rank: int, world_size: int) -> list[tuple[int, int]]:
        """Shards that a rank needs from a step on, as (distance in samples of the run, shard), the nearest first."""
        nearest: dict[int, int] = {}
        for number, before in enumerate(self.schedule.counts(step).tolist()):
            positions = rank_positions(before * self.step_size, self.step_size, self.lanes, rank, world_size)
            scale = self.schedule.period / int(self.schedule.steps[number])
            for distance, shard in self.orders[number].ahead(positions):
                nearest[shard] = min(nearest.get(shard, 1 << 62), int(distance * scale))
        return sorted((distance, shard) for shard, distance in nearest.items())
