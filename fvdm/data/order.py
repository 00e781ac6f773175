"""The order of samples: pure arithmetic, apart from the code that moves bytes.

A run is a sequence of positions 0, 1, 2, ...; step k of batch size B is the positions k B to (k + 1) B. Which sample
stands at a position is a function of the seed, the number of lanes and the data alone. So the position is the whole
state of a run, and the batches are the same for every number of ranks and workers.

**One permutation** (`lanes=0`): position p is place p % n of epoch p // n, and each epoch is a permutation of all n
samples. Every node needs every shard.

**Lanes**: C lanes, a divisor of the batch size. The shards are shuffled once, and the line of their samples is cut into
C parts of equal length (up to one sample): lane c has n_c samples. (Of few samples there are fewer parts, which
neighbouring lanes read together.) Position p belongs to lane p % C; its index there is
i = p // C; it is place i % n_c of lane epoch i // n_c. In each lane epoch the lane's shards are permuted, and then its
samples are shuffled within a window of some shards. A rank reads whole, neighbouring lanes, so

- every sample comes once in each lane epoch, without padding;
- a node needs at most ceil(shards / nodes) + 1 shards in the whole run, of which a few are needed at a time;
- a shard that two neighbouring lanes share is the first or the last one of both in a lane epoch, so that both need it
  at the same time. Only the shards that two nodes share are fetched by both.

**Buckets** (shapes of samples): each bucket has its own order, and the number of a step alone says from which bucket it
is (`BucketSchedule`).

Every random choice has a stream of its own (`stream`). The random numbers are the raw output of Philox, which NumPy
keeps the same from version to version.
"""

from collections import OrderedDict
from dataclasses import dataclass
from enum import IntEnum
from typing import NamedTuple, Protocol

import numpy as np

LEAST = 64  # samples of a lane; with fewer, lanes share one part of the data
MAX_PERIOD = 1 << 16  # steps after which the schedule of buckets repeats, at most


class Stream(IntEnum):
    """What random numbers are drawn for; each has a seed stream of its own. The numbers are part of the order."""

    SHARDS = 0
    LANE = 1
    FRAMES = 2
    FLIP = 3
    POSTERIOR = 4
    CAPTION = 5


def stream(seed: int, kind: Stream, *key: int) -> np.random.Philox:
    """The random numbers for one purpose: independent for each (seed, kind, key), whatever the length of the key.

    A spawn key is kept apart from the entropy; `SeedSequence([s, e])` and `SeedSequence([s, e, 0])` would be equal.
    """
    return np.random.Philox(np.random.SeedSequence(seed, spawn_key=(int(kind), *key)))


class Sample(NamedTuple):
    """The sample at a position: lane epoch, shard, and which of the shard's usable samples it is, counted from 0."""

    epoch: int
    shard: int
    number: int


class Order(Protocol):
    """The samples of one bucket, at positions from 0 on."""

    def at(self, position: int, skip: int = 0) -> Sample:
        """The sample at a position, or the one that comes `skip` places later in the same epoch, which wraps around."""
        ...

    def ahead(self, positions: np.ndarray) -> list[tuple[int, int]]:
        """Shards that are needed from `positions` on, as (distance, shard), the nearest first.

        Args:
            positions: the next positions that a rank reads, one batch of them.

        Returns:
            Distances in samples of the whole bucket until the first use; each shard once.
        """
        ...


def epoch_order(seed: int, epoch: int, n: int) -> np.ndarray:
    """The order of `n` samples in one epoch: int64 (n), a permutation that depends on (seed, epoch, n) alone."""
    raw = np.random.Philox(np.random.SeedSequence([seed, epoch])).random_raw(n)
    return np.argsort(raw, kind="stable")


class PermutationOrder:
    """One permutation of all samples an epoch.

    Args:
        seed: of the order.
        counts: int (shards), usable samples of each shard.
    """

    def __init__(self, seed: int, counts: np.ndarray) -> None:
        """Computes a permutation when it is first asked for."""
        self.seed = seed
        self.ends = np.cumsum(counts)
        self.n = int(self.ends[-1])
        self._epochs: OrderedDict[int, np.ndarray] = OrderedDict()

    def at(self, position: int, skip: int = 0) -> Sample:
        """See Order."""
        epoch, place = divmod(position, self.n)
        sample = int(self._order(epoch)[(place + skip) % self.n])
        shard = int(np.searchsorted(self.ends, sample, side="right"))
        return Sample(epoch, shard, sample - int(self.ends[shard - 1] if shard else 0))

    def ahead(self, positions: np.ndarray) -> list[tuple[int, int]]:
        """See Order. What a permutation of all samples needs soon is all shards; only the next ones are listed."""
        first = int(positions.min())
        found: dict[int, int] = {}
        for position in range(first, first + min(self.n, 1024)):
            found.setdefault(self.at(position).shard, position - first)
        return [(distance, shard) for shard, distance in found.items()]

    def _order(self, epoch: int) -> np.ndarray:
        if epoch not in self._epochs:
            self._epochs[epoch] = epoch_order(self.seed, epoch, self.n)
            if len(self._epochs) > 2:
                self._epochs.popitem(last=False)
        return self._epochs[epoch]


@dataclass(frozen=True)
class LaneEpoch:
    """One pass over a lane.

    Attributes:
        shard: int32 (n_c), shard of the sample at each place.
        number: int32 (n_c), which of the shard's usable samples it is.
        shards: int (k), the lane's shards.
        first: int (k), place of each shard's first sample.
        last: int (k), place of its last one.
    """

    shard: np.ndarray
    number: np.ndarray
    shards: np.ndarray
    first: np.ndarray
    last: np.ndarray


class LaneOrder:
    """Lanes over the shards of one bucket; see the module's text.

    Args:
        seed: of the order.
        counts: int (shards), usable samples of each shard; some may be 0.
        lanes: C, >= 1.
        window: shards over which a lane is shuffled, >= 0.
        bucket: number of the bucket; part of the seed.
        least: samples of a lane; parts of the line are of equal length up to one sample, or 1 / least of it.
    """

    def __init__(
        self, seed: int, counts: np.ndarray, lanes: int, window: float, bucket: int = 0, least: int = LEAST
    ) -> None:
        """Shuffles the shards and cuts their line."""
        self.seed, self.bucket = seed, bucket
        used = np.flatnonzero(counts)
        raw = stream(seed, Stream.SHARDS, bucket).random_raw(len(used))
        self.line = used[np.argsort(raw, kind="stable")]
        self.counts = np.asarray(counts, dtype=np.int64)
        self.ends = np.cumsum(self.counts[self.line])
        self.n = int(self.ends[-1])
        self.lanes = lanes
        # In a bucket of few samples neighbouring lanes read one part of the line together: parts of 2 and of 3 samples
        # would be an epoch of different length each.
        parts = max(1, self.n // least)
        self.share = next(share for share in range(1, lanes + 1) if lanes % share == 0 and lanes // share <= parts)
        self.window = window * self.n / len(used)
        self._epochs: OrderedDict[tuple[int, int], LaneEpoch] = OrderedDict()

    @property
    def parts(self) -> int:
        """Number of parts into which the line of samples is cut: C, or a divisor of C for a bucket of few samples."""
        return self.lanes // self.share

    def bounds(self, lane: int) -> tuple[int, int]:
        """Where on the line of samples a lane begins and ends."""
        return lane * self.n // self.parts, (lane + 1) * self.n // self.parts

    def place(self, position: int) -> tuple[int, int, int]:
        """(lane, lane epoch, place) of a position."""
        turn, column = divmod(position, self.lanes)
        lane, offset = divmod(column, self.share)
        begin, end = self.bounds(lane)
        return lane, *divmod(turn * self.share + offset, end - begin)

    def at(self, position: int, skip: int = 0) -> Sample:
        """See Order."""
        lane, epoch, place = self.place(position)
        order = self.epoch(lane, epoch)
        place = (place + skip) % len(order.shard)
        return Sample(epoch, int(order.shard[place]), int(order.number[place]))

    def ahead(self, positions: np.ndarray) -> list[tuple[int, int]]:
        """See Order. Of each lane: what is left of this lane epoch, then the shards of the next one."""
        found: dict[int, int] = {}
        nearest: dict[int, tuple[int, int]] = {}
        for position in positions.tolist():
            lane, epoch, place = self.place(position)
            nearest[lane] = min(nearest.get(lane, (epoch, place)), (epoch, place))
        for lane, (epoch, place) in nearest.items():
            now, later = self.epoch(lane, epoch), self.epoch(lane, epoch + 1)
            left = now.last >= place
            distances = np.concatenate([np.maximum(now.first[left] - place, 0), len(now.shard) - place + later.first])
            for distance, shard in zip(distances, np.concatenate([now.shards[left], later.shards]), strict=True):
                found[int(shard)] = min(found.get(int(shard), 1 << 62), int(distance) * self.parts)
        return sorted((distance, shard) for shard, distance in found.items())

    def shards_of(self, lanes: range) -> set[int]:
        """All shards that some of the run's C lanes read, in the whole run."""
        found: set[int] = set()
        for lane in {column // self.share for column in lanes}:
            found |= set(self._pieces(lane)[0].tolist())
        return found

    def _pieces(self, lane: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Of the shards on a lane, in the order of the line: which, number of the first sample, samples."""
        begin, end = self.bounds(lane)
        first = int(np.searchsorted(self.ends, begin, side="right"))
        last = int(np.searchsorted(self.ends, end, side="left")) + 1
        starts = self.ends[first:last] - self.counts[self.line[first:last]]
        low, high = np.maximum(starts, begin), np.minimum(self.ends[first:last], end)
        return self.line[first:last], low - starts, high - low

    def epoch(self, lane: int, epoch: int) -> LaneEpoch:
        """One pass over a lane."""
        if (lane, epoch) not in self._epochs:
            self._epochs[lane, epoch] = self._shuffle(lane, epoch)
            if len(self._epochs) > 2 * self.parts + 1:
                self._epochs.popitem(last=False)
        self._epochs.move_to_end((lane, epoch))
        return self._epochs[lane, epoch]

    def _shuffle(self, lane: int, epoch: int) -> LaneEpoch:
        shards, start, size = self._pieces(lane)
        k, n = len(shards), int(size.sum())
        raw = stream(self.seed, Stream.LANE, self.bucket, lane, epoch).random_raw(k + 2 * n)
        uniform = (raw >> np.uint64(11)).astype(np.float64) * 2.0**-53
        rank = uniform[:k].copy()
        # The shards that are shared with the neighbours come first and last, in the neighbours as well.
        if k > 1:
            front = (lane + epoch) % 2 == 0
            rank[-1] = -1.0 if front else 2.0
            rank[0] = 2.0 if front else -1.0
        order = np.argsort(rank, kind="stable")
        begin = np.empty(k, dtype=np.int64)
        begin[order] = np.cumsum(size[order]) - size[order]
        piece = np.repeat(np.arange(k), size)
        spread, jitter = uniform[k : k + n], uniform[k + n :] - 0.5
        key = begin[piece] + size[piece] * spread + self.window * jitter
        places = np.argsort(key, kind="stable")
        number = (np.arange(n) - np.repeat(np.cumsum(size) - size, size) + np.repeat(start, size))[places]
        at = piece[places]
        first, last = np.full(k, n), np.full(k, -1)
        np.minimum.at(first, at, np.arange(n))
        np.maximum.at(last, at, np.arange(n))
        return LaneEpoch(shards[at].astype(np.int32), number.astype(np.int32), shards, first, last)


class BucketSchedule:
    """From which bucket each step is: the one that is furthest behind its share of the samples.

    The shares are rounded to numbers of steps in a period of about one epoch, at least one step for each bucket. Within
    a period the bucket with the largest deficit is next, so a bucket is never off its share by more than one step.

    Args:
        sizes: usable samples of each bucket, >= 1.
        batch_size: samples of a step.
    """

    def __init__(self, sizes: list[int], batch_size: int) -> None:
        """Computes one period."""
        total = sum(sizes)
        period = max(len(sizes), min(MAX_PERIOD, -(-total // batch_size))) if len(sizes) > 1 else 1
        exact = np.array(sizes, dtype=np.float64) * period / total
        steps = np.maximum(1, np.floor(exact)).astype(np.int64)
        remainder = period - int(steps.sum())
        if remainder > 0:  # to those that lost most by rounding
            steps[np.argsort(steps - exact, kind="stable")[:remainder]] += 1
        self.steps = steps
        self.period = int(steps.sum())
        done = np.zeros(len(sizes), dtype=np.int64)
        self.bucket = np.empty(self.period, dtype=np.int32)
        self.before = np.empty(self.period, dtype=np.int64)
        share = steps / self.period
        for k in range(self.period):
            bucket = int(np.argmax(share * (k + 1) - done))
            self.bucket[k], self.before[k] = bucket, done[bucket]
            done[bucket] += 1

    def counts(self, step: int) -> np.ndarray:
        """int64 (buckets): how many steps before `step` are from each bucket."""
        turn, k = divmod(step, self.period)
        return turn * self.steps + np.bincount(self.bucket[:k], minlength=len(self.steps))

    def __call__(self, step: int) -> tuple[int, int]:
        """Bucket of a step, and number of earlier steps from that bucket."""
        turn, k = divmod(step, self.period)
        bucket = int(self.bucket[k])
        return bucket, turn * int(self.steps[bucket]) + int(self.before[k])


def rank_positions(start: int, batch_size: int, lanes: int, rank: int, world_size: int) -> np.ndarray:
    """The positions of one step that a rank reads: int64 (batch_size / world_size), ascending.

    Args:
        start: first position of the step.
        batch_size: positions of a step; a multiple of `lanes` and of `world_size`.
        lanes: C, a multiple of `world_size`: the rank reads its C / world_size neighbouring lanes. 0 for one
            permutation, where a rank reads neighbouring positions.
        rank: 0 <= rank < world_size.
        world_size: number of ranks.
    """
    positions = np.arange(start, start + batch_size)
    if not lanes:
        share = batch_size // world_size
        return positions[rank * share : (rank + 1) * share]
    return positions[positions % lanes // (lanes // world_size) == rank]
