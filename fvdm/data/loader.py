"""Latent shards -> batches, in an order that can be resumed to the sample.

WebDataset is the format on disk; the order is that of `fvdm.data.order`: which sample stands at position p of a run
follows from the seed and the data alone. Batch k is the positions `k * batch_size` to `(k + 1) * batch_size`, of which
each rank takes its share, so

- every sample comes once an epoch, whatever the ranks, the workers and the sizes of the shards; a batch may straddle
  two epochs, so nothing is dropped and no rank waits for another;
- the position is the whole state: resume at `start=batch.consumed`, with any number of ranks.

What is random about a sample (which frames, flipped or not, which caption, the noise of the VAE's posterior) has a seed
for each (seed, epoch, sample).
"""

import atexit
import logging
import multiprocessing.util
import os
import secrets
import signal
import weakref
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from fvdm.data.cache import ReadCounters
from fvdm.data.config import DataConfig
from fvdm.data.location import CorruptShardError
from fvdm.data.order import Stream, rank_positions, stream
from fvdm.data.prefetch import Prefetcher
from fvdm.data.sequence import Place, SampleSequence
from fvdm.data.shards import LatentShards

log = logging.getLogger(__name__)
_workers: "weakref.WeakSet[Any]" = weakref.WeakSet()  # processes that read ahead for this one
ATTEMPTS = 100  # neighbours tried in place of a corrupt sample


class Batch(NamedTuple):
    """One rank's part of a step.

    Attributes:
        x_0: float32 (b f c h w), normalised latents.
        y: what the network is conditioned on: int64 (b), class labels; or float32 (b n e), text embeddings, padded with
            zeros to the most tokens of a caption; None where the shards have neither.
        keys: key of each sample.
        positions: position of each sample in the run.
        consumed: samples used up by all ranks from the start of the run to the end of this batch: the
            position to put into the checkpoint.
        skipped: corrupt samples of this batch in whose place others came.
        read: what the process that read the batch fetched since its last one.
    """

    x_0: Tensor
    y: Tensor | None
    keys: list[str]
    positions: list[int]
    consumed: int
    skipped: int
    read: ReadCounters


def batches(
    shards: LatentShards,
    config: DataConfig,
    *,
    rank: int = 0,
    world_size: int = 1,
    seed: int = 0,
    start: int = 0,
    step_size: int | None = None,
    local_world_size: int = 1,
    device: torch.device | str | None = None,
) -> Iterator[Batch]:
    """Yields this rank's batches forever, from position `start` on.

    Args:
        shards: what to read.
        config: how; `batch_size` is what all ranks take at once.
        rank: 0 <= rank < world_size.
        world_size: number of ranks; must divide config.batch_size.
        seed: of the order and of everything that is random about a sample.
        start: samples consumed so far by all ranks: `Batch.consumed` of the last batch. With several buckets, a start
            in the middle of a step means the next step.
        step_size: samples of an optimizer step, a multiple of config.batch_size [config.batch_size].
        local_world_size: ranks of this node, which share the cache of fetched shards.
        device: where the batch goes; for CUDA through pinned memory.

    Raises:
        ValueError: the batch cannot be divided among the ranks, no video is long enough, or (from the
            iterator) a corrupt shard.
        OSError: (from the iterator) disk, network or server do not give a shard, after several tries.
    """
    step_size = step_size or config.batch_size
    sequence = SampleSequence(shards, config, seed, step_size)
    for number, name in ((config.batch_size, "batch_size"), (sequence.lanes, "lanes")):
        if number % world_size:
            raise ValueError(f"data.{name} {number} cannot be shared by {world_size} ranks: make it a multiple.")
    if len(sequence.buckets) > 1:
        start = -(-start // step_size) * step_size
    clips = _Clips(shards, config, seed, sequence, rank, world_size, local_world_size)
    cuda = device is not None and torch.device(device).type == "cuda"
    loader = DataLoader(
        clips,
        batch_sampler=_Positions(config.batch_size, sequence, rank, world_size, start),
        num_workers=config.workers,
        collate_fn=_as_it_is,
        worker_init_fn=_ignore_signals,
        pin_memory=cuda,
        prefetch_factor=4 if config.workers else None,
    )
    return _on_device(loader, clips, device, start, config.batch_size)


def _on_device(
    loader: "DataLoader[Any]", clips: "_Clips", device: torch.device | str | None, start: int, batch_size: int
) -> Iterator[Batch]:
    skipped = 0
    try:
        for step, part in enumerate(_read(loader), start=1):
            if isinstance(part, Exception):
                raise part
            for reason in part.skipped:
                skipped += 1
                log.warning("sample skipped, %d since this start: %s", skipped, reason)
            x_0, y = part.x_0, part.y
            if device is not None:
                x_0 = x_0.to(device, non_blocking=True)
                y = None if y is None else y.to(device, non_blocking=True)
            consumed = start + step * batch_size
            yield Batch(x_0, y, part.keys, part.positions, consumed, len(part.skipped), part.read)
    finally:
        clips.close()


def _read(loader: "DataLoader[Any]") -> Iterator[Any]:
    iterator = iter(loader)
    workers = getattr(iterator, "_workers", [])
    if workers and not _workers:
        atexit.register(_end_workers)  # after multiprocessing's own hook, so this one runs before it
    _workers.update(workers)
    try:
        yield from iterator
    except (ConnectionError, EOFError) as error:  # of the pipe between the processes, not of a disk
        raise RuntimeError("a process that reads ahead was killed: lower data.workers if memory is short") from error


class _Positions:
    """Batch sampler: the positions that one rank reads, batch after batch, without end."""

    def __init__(self, batch_size: int, sequence: SampleSequence, rank: int, world_size: int, start: int) -> None:
        self.share = batch_size // world_size
        self.lanes, self.rank, self.world_size, self.start = sequence.lanes, rank, world_size, start
        # One permutation is shared out batch by batch, lanes step by step.
        self.unit = sequence.step_size if sequence.lanes else batch_size

    def __iter__(self) -> Iterator[list[int]]:
        first = self.start
        while True:
            own = rank_positions(first, self.unit, self.lanes, self.rank, self.world_size)
            for part in range(0, len(own), self.share):
                yield own[part : part + self.share].tolist()
            first += self.unit


@dataclass
class _Part:
    """What a process that reads ahead hands over: see Batch. A plain class, whose tensors DataLoader need not know."""

    x_0: Tensor
    y: Tensor | None
    keys: list[str]
    positions: list[int]
    skipped: list[str] = field(default_factory=list)
    read: ReadCounters = field(default_factory=ReadCounters)

    def pin_memory(self) -> "_Part":
        """For DataLoader: the batch in pinned memory, from which a GPU copies asynchronously."""
        self.x_0 = self.x_0.pin_memory()
        self.y = None if self.y is None else self.y.pin_memory()
        return self


class _Clips(Dataset[Any]):
    """The clips at positions of a run."""

    def __init__(
        self,
        shards: LatentShards,
        config: DataConfig,
        seed: int,
        sequence: SampleSequence,
        rank: int,
        world_size: int,
        local_world_size: int,
    ) -> None:
        self.shards, self.config, self.seed, self.sequence = shards, config, seed, sequence
        self.rank, self.world_size, self.local_world_size = rank, world_size, local_world_size
        self.normalisation = shards.normalisation
        self.prefetcher: Prefetcher | None = None
        self.label = secrets.token_hex(4)

    def __getitems__(self, positions: list[int]) -> _Part | Exception:
        """One batch; or what stops the run. (If it were raised, a worker would wrap it in its own traceback.)"""
        if self.shards.location.remote:
            self._prefetch(positions[0] // self.sequence.step_size)
        skipped: list[str] = []
        try:
            clips = [self._clip_or_next(position, skipped) for position in positions]
        except (OSError, ValueError) as error:
            return error
        x_0, y, keys = zip(*clips, strict=True)
        read = self.shards.location.cache.counters.take()
        return _Part(torch.stack(x_0), None if y[0] is None else torch.stack(y), list(keys), positions, skipped, read)

    def _prefetch(self, step: int) -> None:
        if self.prefetcher is None:
            sequence, rank, world_size = self.sequence, self.rank, self.world_size
            self.prefetcher = Prefetcher(
                self.shards.location,
                self.shards.shards,
                lambda step: sequence.ahead(step, rank, world_size),
                self.label,
                self.local_world_size,
            )
            # At the end of a process that reads ahead, which runs no other hooks.
            multiprocessing.util.Finalize(self, self.prefetcher.close, exitpriority=1)
        self.prefetcher.advance(step)
        if self.shards.location.cache.limit:
            self.shards.close_all_but(self.prefetcher.window)

    def close(self) -> None:
        """Ends what reads ahead in this process."""
        if self.prefetcher is not None:
            self.prefetcher.close()

    def _clip_or_next(self, position: int, skipped: list[str]) -> tuple[Tensor, Tensor | None, str]:
        """The clip at a position; where it is corrupt and may be skipped, the next one that is not."""
        for attempt in range(ATTEMPTS):
            place = self.sequence.at(position, attempt)
            try:
                return self.clip(place)
            except CorruptShardError as error:
                if self.config.corrupt == "stop":
                    raise
                skipped.append(str(error))
        raise CorruptShardError(f"{ATTEMPTS} corrupt samples in a row, at last: {skipped[-1]}")

    def clip(self, place: Place) -> tuple[Tensor, Tensor | None, str]:
        """The clip that is drawn from one sample in one epoch: latents (f c h w), condition, key."""
        from fvdm.media.vae import sample_latents

        sample, shards = place.row, self.shards
        available, c, h, w = shards.shape(sample)
        draw = self._draw_by_lanes if self.sequence.lanes else self._draw_by_permutation
        frames, flip, noise_seed, caption = draw(place, available)
        generator = torch.Generator().manual_seed(noise_seed)
        noise = torch.randn(len(frames), c, h, w, generator=generator)
        moments = torch.from_numpy(shards.read(sample, frames, flip=flip))
        x_0 = sample_latents(moments, self.normalisation, noise)
        return x_0, self._condition(sample, caption), shards.samples.value("key", sample)

    def _condition(self, sample: int, caption: int) -> Tensor | None:
        text = self.shards.manifest.text
        if text is not None:
            embedding = torch.from_numpy(self.shards.embedding(sample, caption))
            return torch.nn.functional.pad(embedding, (0, 0, 0, text.max_tokens - len(embedding)))
        label = self.shards.samples.number("label", sample)
        return None if label < 0 else torch.tensor(label)

    def _draw_by_lanes(self, place: Place, available: int) -> tuple[np.ndarray, bool, int, int]:
        """Frames, flip, seed of the posterior's noise, caption; each from its own stream."""
        key = (place.epoch, place.row)
        frames = self._frames(place, available, np.random.Generator(stream(self.seed, Stream.FRAMES, *key)))
        stored = self.config.flip and self.shards.manifest.flip
        flip = stored and bool(stream(self.seed, Stream.FLIP, *key).random_raw() >> 63)
        noise_seed = int(stream(self.seed, Stream.POSTERIOR, *key).random_raw() >> 1)
        caption = 0
        if self.shards.manifest.text is not None:
            captions = max(1, len(self.shards.samples.value("tokens", place.row)))
            caption = int(np.random.Generator(stream(self.seed, Stream.CAPTION, *key)).integers(captions))
        return frames, flip, noise_seed, caption

    def _draw_by_permutation(self, place: Place, available: int) -> tuple[np.ndarray, bool, int, int]:
        """As `_draw_by_lanes`, from one stream for each sample: as it was before there were lanes."""
        random = np.random.Generator(np.random.Philox(np.random.SeedSequence([self.seed, place.epoch, place.row])))
        frames = self._frames(place, available, random)
        flip = bool(random.random() < 0.5) and self.config.flip and self.shards.manifest.flip
        noise_seed = int(random.integers(2**63))
        captions = 1
        if self.shards.manifest.text is not None:
            captions = max(1, len(self.shards.samples.value("tokens", place.row)))
        return frames, flip, noise_seed, int(random.integers(captions))

    def _frames(self, place: Place, available: int, random: np.random.Generator) -> np.ndarray:
        if self.shards.manifest.buckets[place.bucket].frames == 1:
            return np.zeros(1, dtype=np.int64)
        if self.shards.manifest.causal:
            return np.arange(self.config.frames)
        return draw_frames(available, self.config.frames, self.config.stride, random)


def draw_frames(available: int, frames: int, stride: int, random: np.random.Generator) -> np.ndarray:
    """Frame numbers of a clip: int64 (frames), evenly spaced, at a random offset; the last frame can be
    drawn.

    Args:
        available: frames of the video, >= frames.
        frames: frames of the clip.
        stride: spacing; where the video is too short for it, the largest that fits.
        random: of the sample.
    """
    if frames > 1:
        stride = max(1, min(stride, (available - 1) // (frames - 1)))
    span = (frames - 1) * stride + 1
    offset = int(random.integers(0, available - span + 1))
    return offset + stride * np.arange(frames)


def _as_it_is(part: Any) -> Any:
    """The dataset makes whole batches itself."""
    return part


def _ignore_signals(worker: int) -> None:
    """A job's signals are for the training process, which ends its workers; they end too when it is gone."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)


def _end_workers() -> None:
    """End what still reads ahead when this process ends by an exception, whose traceback keeps the workers alive.

    multiprocessing would ask them by SIGTERM, which they ignore, and wait forever. Other processes of the host program
    are left alone.
    """
    own = [worker for worker in _workers if getattr(worker, "_parent_pid", None) == os.getpid() and worker.is_alive()]
    if own:
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # PyTorch's handler would report the killed workers as an error.
    for worker in own:
        worker.kill()
