"""Encodes the videos of a plan: decoder processes feed one VAE, finished videos become parts, full shards are
sealed.

Each video is encoded in chunks of a fixed number of frames from its start, together with their flipped copies. What
is written therefore does not depend on what else was in flight, nor on how often the run was interrupted. The moments
of a video in flight are in a temporary file, so memory does not grow with its length.
"""

from collections import Counter, deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from data_prep.config import EncodeConfig, processes
from data_prep.decoding import Rejected, Restarted, Task, decode
from data_prep.planning import EncodePlan, ShardPlan
from data_prep.samples import VideoMoments
from data_prep.shards import Work, stamp_of
from fvdm.media.memory import keep_freed_memory
from fvdm.media.videos import Info, Preprocess

if TYPE_CHECKING:
    from fvdm.media.vae import VAE


DEPTH = 8  # chunks in flight per thread that encodes: its next ones are there while finished videos are written
Chunk = Future["np.ndarray | None"]


@dataclass
class EncodeProgress:
    """Counts of a run: videos encoded, frames encoded, and `(name, reason)` of the videos rejected."""

    videos: int = 0
    frames: int = 0
    rejected: list[tuple[str, str]] = field(default_factory=list)


class _Video:
    """A video in flight: its chunks that are being encoded, in order, and the moments of those that are done."""

    def __init__(self, copies: int, folder: Path) -> None:
        self.chunks: deque[Chunk] = deque()
        self.moments = VideoMoments(copies, folder)
        self.finite = True
        self.end: Info | Rejected | None = None  # once it was read to its end

    def collect(self, everything: bool = False) -> int:
        """Takes in the chunks that are encoded, or waits for all; returns the number of their frames."""
        frames = 0
        while self.chunks and (everything or self.chunks[0].done()):
            chunk = self.chunks.popleft().result()
            if chunk is None:
                self.finite = False
            else:
                self.moments.append(chunk)
                frames += chunk.shape[1]
        return frames


def open_vae(config: EncodeConfig) -> "VAE":
    """The VAE of the settings, on its device and in its precision.

    Raises:
        ValueError: there is no such VAE, or this machine has no such device.
    """
    from fvdm.media.vae import load_vae

    check_device(config)
    return load_vae(config.vae, device=str(config.device), dtype=getattr(torch, str(config.precision)))


def check_device(config: EncodeConfig) -> None:
    """Refuses a device that this machine does not have.

    Raises:
        ValueError: with the reason.
    """
    try:
        torch.empty(0, device=config.device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ValueError(
            f"--device {config.device}: this machine has no such device, or cannot use it ({reason})."
        ) from None


def encode_shards(
    config: EncodeConfig,
    work: Work,
    shards: list[ShardPlan],
    vae: "VAE",
    report: Callable[[EncodeProgress], None] = lambda progress: None,
) -> EncodeProgress:
    """Makes every shard of `shards` that is not complete yet; with `config.strict`, stops at a rejected video.

    Args:
        config: the settings, resolved.
        work: where parts and shards go.
        shards: those this job has to make.
        vae: the encoder, on its device.
        report: called after every chunk and every video.
    """
    videos = Path(config.videos)
    shard_of = {video: shard for shard in shards for video in work.missing(shard)}
    left = Counter(shard.name for shard in shard_of.values())
    for shard in shards:
        if not left[shard.name]:
            work.assemble(shard)
    work.folder.mkdir(exist_ok=True)
    progress, in_flight = EncodeProgress(), _InFlight(vae, work.plan, work.folder)

    def store(everything: bool) -> bool:
        """Stores the videos whose chunks are encoded, or all that have ended; False to stop."""
        progress.frames += in_flight.collect(everything)
        report(progress)
        for number, video in in_flight.take_ended():
            shard = shard_of[number]
            _store(work, videos, shard, number, video, progress)
            report(progress)
            if config.strict and progress.rejected:
                return False
            left[shard.name] -= 1
            if not left[shard.name]:
                work.assemble(shard)
        return True

    decoders, encoders = processes(config)
    tasks = _tasks(videos, work.plan, list(shard_of))
    items = decode(tasks, workers=max(1, min(decoders, len(shard_of))), timeout=config.timeout)
    with _threads(encoders) as pool, closing(items):
        for number, item in items:
            in_flight.take(number, item, pool, DEPTH * encoders)
            if not store(everything=False):
                return progress
        store(everything=True)
    return progress


class _InFlight:
    """The videos that are being decoded or encoded."""

    def __init__(self, vae: "VAE", plan: EncodePlan, folder: Path) -> None:
        self.vae, self.folder = vae, folder
        self.flip, self.dtype = bool(plan.settings["preprocess"]["flip"]), str(plan.settings["dtype"])
        self.videos: dict[int, _Video] = {}
        self.queued: deque[Chunk] = deque()

    def take(self, number: int, item: object, pool: ThreadPoolExecutor, depth: int) -> None:
        """Takes what a decoder says of a video; waits while `depth` chunks are in flight."""
        if isinstance(item, Restarted):
            if number in self.videos:
                self.videos.pop(number).moments.close()
            return
        if number not in self.videos:
            self.videos[number] = _Video(2 if self.flip else 1, self.folder)
        video = self.videos[number]
        if not isinstance(item, np.ndarray):
            assert isinstance(item, Info | Rejected)
            video.end = item
            return
        if len(self.queued) >= depth:
            self.queued.popleft().result()
        video.chunks.append(pool.submit(_encode, self.vae, item, self.flip, self.dtype))
        self.queued.append(video.chunks[-1])

    def collect(self, everything: bool) -> int:
        """Takes in the chunks that are encoded, or waits for all; returns the number of their frames."""
        return sum(video.collect(everything) for video in self.videos.values())

    def take_ended(self) -> Iterator[tuple[int, _Video]]:
        """The videos that were read to their end and are encoded."""
        for number, video in list(self.videos.items()):
            if video.end is not None and not video.chunks:
                try:
                    yield number, self.videos.pop(number)
                finally:
                    video.moments.close()


@contextmanager
def _threads(encoders: int) -> Iterator[ThreadPoolExecutor]:
    """Threads that call the VAE.

    On a CPU each uses one core: that is up to twice as fast as one call on all cores, and the last bits of a
    latent do not depend on how many cores a job has. On a GPU there is one thread.
    """
    keep_freed_memory()
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    pool = ThreadPoolExecutor(encoders, initializer=torch.set_num_threads, initargs=(1,))
    try:
        yield pool
    finally:
        pool.shutdown(cancel_futures=True)
        torch.set_num_threads(before)


def _tasks(videos: Path, plan: EncodePlan, missing: list[int]) -> Iterator[Task]:
    preprocess = Preprocess.from_dict(plan.settings["preprocess"])
    for video in missing:
        path = str(videos / plan.sources[video].name)
        yield Task(video, path, plan.settings["size"], preprocess, plan.settings["chunk"])


def _encode(vae: "VAE", frames: np.ndarray, flip: bool, dtype: str) -> np.ndarray | None:
    """Moments of a chunk, as stored: uint8 (n 3 s s) -> (1 or 2, n, 2c, h, w), the second half flipped.

    None where a number is not finite, or too large for the stored type.
    """
    pixels = torch.from_numpy(frames)
    if flip:
        pixels = torch.cat([pixels, pixels.flip(-1)])
    moments = vae.encode(pixels).cpu()
    stored = moments.to(getattr(torch, dtype))
    if not torch.isfinite(stored).all():
        return None
    array = stored.view(torch.uint16).numpy() if dtype == "bfloat16" else stored.numpy()
    return array.reshape(2 if flip else 1, -1, *moments.shape[1:])


def _store(work: Work, videos: Path, shard: ShardPlan, number: int, video: _Video, progress: EncodeProgress) -> None:
    """Keeps a video that was read to its end, or the reason why it cannot be used."""
    source, end = work.plan.sources[number], video.end
    if isinstance(end, Info) and not video.finite:
        end = Rejected(f"the VAE's latents are not finite in {work.plan.settings['dtype']}")
    if isinstance(end, Info):
        work.keep(shard, number, video.moments.sample(number, source, end.fps))
        progress.videos += 1
    elif end is not None:
        work.reject(shard, number, end.reason, None if end.unread else stamp_of(videos / source.name))
        progress.rejected.append((source.name, end.reason))
