"""Latent shards -> batches, in an order that can be resumed to the sample.

WebDataset is the format on disk; the order is our own. Position `p` of a run is a number of samples: epoch
`p // n`, and place `p % n` in that epoch's permutation of all `n` videos of all shards. Batch `k` is the
positions `k * batch_size` to `(k + 1) * batch_size`, of which each rank takes its slice, so

- every video comes once an epoch, whatever the ranks, the workers and the sizes of the shards; a batch may
  straddle two epochs, so nothing is dropped and no rank waits for another;
- the position is the whole state: resume at `start=batch.consumed`, with any number of ranks.

What is random about a sample (which frames, mirrored or not, the noise of the VAE's posterior) is drawn from
a seed of its own: (seed, epoch, video).
"""

import atexit
import logging
import multiprocessing
import multiprocessing.util
import signal
from collections.abc import Iterator
from functools import lru_cache, partial
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from fvdm.data.config import DataConfig
from fvdm.data.location import CorruptShardError
from fvdm.data.shards import LatentShards

log = logging.getLogger(__name__)
ATTEMPTS = 100  # neighbours tried in place of a corrupt sample


class Batch(NamedTuple):
    """One rank's part of a step.

    Attributes:
        x_0: float32 (b f c h w), normalised latents.
        y: int64 (b), class labels; None where the shards have none.
        keys: key of each sample.
        consumed: samples used up by all ranks from the start of the run to the end of this batch: the
            position to put into the checkpoint.
        skipped: corrupt samples of this batch in whose place others came.
    """

    x_0: Tensor
    y: Tensor | None
    keys: list[str]
    consumed: int
    skipped: int


def batches(
    shards: LatentShards,
    config: DataConfig,
    *,
    rank: int = 0,
    world_size: int = 1,
    seed: int = 0,
    start: int = 0,
    device: torch.device | str | None = None,
) -> Iterator[Batch]:
    """Yields this rank's batches for ever, from position `start` on.

    Args:
        shards: what to read.
        config: how.
        rank: 0 <= rank < world_size.
        world_size: number of ranks; must divide config.batch_size.
        seed: of the order and of all that is random about a sample.
        start: samples consumed so far by all ranks: `Batch.consumed` of the last batch.
        device: where the batch goes; for CUDA through pinned memory.

    Raises:
        ValueError: the batch cannot be divided among the ranks, no video is long enough, or (from the
            iterator) a corrupt shard.
        OSError: (from the iterator) disk, network or server do not give a shard, after several tries.
    """
    if config.batch_size % world_size:
        raise ValueError(
            f"data.batch_size {config.batch_size} cannot be shared by {world_size} ranks: make it a multiple."
        )
    clips = _Clips(shards, config, seed)
    cuda = device is not None and torch.device(device).type == "cuda"
    loader = DataLoader(
        clips,
        batch_sampler=_Positions(config.batch_size, rank, world_size, start),
        num_workers=config.workers,
        collate_fn=_collate,
        worker_init_fn=_ignore_signals,
        pin_memory=cuda,
        prefetch_factor=4 if config.workers else None,
    )
    return _on_device(loader, device, start, config.batch_size)


def _on_device(
    loader: "DataLoader[Any]", device: torch.device | str | None, start: int, batch_size: int
) -> Iterator[Batch]:
    skipped = 0
    for step, batch in enumerate(_read(loader), start=1):
        if isinstance(batch, Exception):
            raise batch
        x_0, y, keys, passed = batch
        for reason in passed:
            skipped += 1
            log.warning("sample skipped, %d so far: %s", skipped, reason)
        if device is not None:
            x_0 = x_0.to(device, non_blocking=True)
            y = None if y is None else y.to(device, non_blocking=True)
        yield Batch(x_0, y, keys, start + step * batch_size, len(passed))


def _read(loader: "DataLoader[Any]") -> Iterator[Any]:
    try:
        yield from loader
    except (ConnectionError, EOFError) as error:  # Of the pipe between the processes: no trouble with a disk.
        raise RuntimeError("a process that reads ahead was killed: lower data.workers if memory is short") from error


class _Positions:
    """Batch sampler: the positions that one rank reads, batch after batch, without end."""

    def __init__(self, batch_size: int, rank: int, world_size: int, start: int) -> None:
        self.batch_size = batch_size
        self.share = batch_size // world_size
        self.first = start + rank * self.share

    def __iter__(self) -> Iterator[list[int]]:
        first = self.first
        while True:
            yield list(range(first, first + self.share))
            first += self.batch_size


class _Clips(Dataset[Any]):
    """The clip at each position of a run."""

    def __init__(self, shards: LatentShards, config: DataConfig, seed: int) -> None:
        self.shards, self.config, self.seed = shards, config, seed
        self.normalisation = shards.normalisation
        self.usable = np.flatnonzero(shards.frames >= config.frames)
        self.order = lru_cache(maxsize=2)(partial(epoch_order, seed, n=len(self.usable)))
        if not len(self.usable):
            raise ValueError(
                f"None of the {len(shards)} videos in {config.path!r} has {config.frames} frames; the longest "
                f"has {shards.frames.max()}: lower data.frames."
            )
        if short := len(shards) - len(self.usable):
            log.warning("%d of %d videos are shorter than %d frames, left out", short, len(shards), config.frames)

    def __getitem__(self, position: int) -> tuple[Tensor, int, str, list[str]] | Exception:
        """Latents (f c h w), label, key, why samples were passed over; or what stops the run.

        That is returned: raised, a loader's worker would wrap it in its own traceback.
        """
        epoch, place = divmod(position, len(self.usable))
        order = self.order(epoch=epoch)
        passed: list[str] = []
        for attempt in range(ATTEMPTS):
            video = int(self.usable[order[(place + attempt) % len(order)]])
            try:
                return *self.clip(video, epoch), passed
            except CorruptShardError as error:
                if self.config.corrupt == "stop":
                    return error
                passed.append(str(error))
            except (OSError, ValueError) as error:
                return error
        return CorruptShardError(f"{ATTEMPTS} corrupt samples in a row, at last: {passed[-1]}")

    def clip(self, video: int, epoch: int) -> tuple[Tensor, int, str]:
        """The clip that is drawn from one video in one epoch: latents (f c h w), label, key."""
        from fvdm.media.vae import sample_latents

        c, h, w = self.shards.latent_shape
        random = np.random.Generator(np.random.Philox(np.random.SeedSequence([self.seed, epoch, video])))
        frames = draw_frames(int(self.shards.frames[video]), self.config.frames, self.config.stride, random)
        flip = bool(random.random() < 0.5) and self.config.flip and self.shards.manifest.flip
        generator = torch.Generator().manual_seed(int(random.integers(2**63)))
        noise = torch.randn(len(frames), c, h, w, generator=generator)
        moments = torch.from_numpy(self.shards.read(video, frames, flip=flip))
        x_0 = sample_latents(moments, self.normalisation, noise)
        return x_0, int(self.shards.labels[video]), self.shards.keys[video]

    def __getstate__(self) -> dict[str, Any]:
        """A worker makes its own cache of orders."""
        return {**self.__dict__, "order": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """See __getstate__."""
        self.__dict__.update(state)
        self.order = lru_cache(maxsize=2)(partial(epoch_order, self.seed, n=len(self.usable)))


def epoch_order(seed: int, epoch: int, n: int) -> np.ndarray:
    """The order of `n` samples in one epoch: int64 (n), a permutation that depends on (seed, epoch, n) alone.

    Made of the raw stream of a counter-based generator, which numpy keeps the same from version to version.
    """
    raw = np.random.Philox(np.random.SeedSequence([seed, epoch])).random_raw(n)
    return np.argsort(raw, kind="stable")


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


def _collate(samples: list[Any]) -> tuple[Tensor, Tensor | None, list[str], list[str]] | Exception:
    """Stacks samples; an error among them takes the place of the batch."""
    trouble = next((sample for sample in samples if isinstance(sample, Exception)), None)
    if trouble is not None:
        return trouble
    x_0, labels, keys, passed = zip(*samples, strict=True)
    y = None if labels[0] < 0 else torch.tensor(labels)
    return torch.stack(x_0), y, list(keys), [reason for reasons in passed for reason in reasons]


def _ignore_signals(worker: int) -> None:
    """A job's signals are for the training process, which ends its workers; they end too when it is gone."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)


@atexit.register
def _end_workers() -> None:
    """End what still reads ahead when this process ends by an exception, whose traceback keeps the workers alive.

    multiprocessing would ask them by SIGTERM, which they ignore, and wait for ever. Registered after its own hook (see
    the import), this one runs before it.
    """
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # PyTorch's handler would report the killed workers as an error.
    for child in multiprocessing.active_children():
        if child.daemon:
            child.kill()
