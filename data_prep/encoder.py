"""Encodes the videos of a plan: decoder processes feed one VAE, finished videos become parts, full shards are
sealed.

What is written does not depend on what else was in flight, nor on how often the run was interrupted; see
`data_prep/in_flight.py`.
"""

from collections import Counter, deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from data_prep.config import EncodeConfig, processes
from data_prep.decoding import Rejected, Restarted, Task, decode
from data_prep.in_flight import Encoder, Moments, VideoInFlight
from data_prep.manifest import write_empty_prompt
from data_prep.planning import ShardPlan
from data_prep.shards import Work, stamp_of
from fvdm.media.clips import Piece
from fvdm.media.memory import keep_freed_memory
from fvdm.media.videos import Info

if TYPE_CHECKING:
    from fvdm.media.text import TextEncoder
    from fvdm.media.vae import VAE

DEPTH = 8  # pieces in flight per thread that encodes: its next ones are there while finished videos are written
TICK = 1.0  # seconds between two looks at the progress while all threads encode


@dataclass
class EncodeProgress:
    """Counts of a run: videos encoded, frames encoded; `(name, reason)` of the videos rejected, `(name, note)` of what
    was done to others."""

    videos: int = 0
    frames: int = 0
    rejected: list[tuple[str, str]] = field(default_factory=list)
    notes: list[tuple[str, str]] = field(default_factory=list)


@dataclass(frozen=True)
class Models:
    """The VAE and, where captions are embedded, the text encoder."""

    vae: "VAE"
    text: "TextEncoder | None" = None


def open_models(config: EncodeConfig) -> Models:
    """The models of the settings, on their device and in their precision.

    Raises:
        ValueError: there is no such model, or this machine has no such device.
    """
    from fvdm.media.vae import load_vae

    check_device(config)
    device, dtype = str(config.device), getattr(torch, str(config.precision))
    vae = load_vae(config.vae, device=device, dtype=dtype)
    if not config.text_encoder:
        return Models(vae)
    from fvdm.media.text import load_text_encoder

    return Models(vae, load_text_encoder(config.text_encoder, device, dtype, config.max_tokens))


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
    models: Models,
    report: Callable[[EncodeProgress], None] = lambda progress: None,
) -> EncodeProgress:
    """Makes every shard of `shards` that is not complete yet; with `config.strict`, stops at a rejected video.

    Args:
        config: the settings, resolved.
        work: where parts and shards go.
        shards: those this job has to make.
        models: the encoders, on their device.
        report: called after every piece and every video, and about once a second.
    """
    videos = Path(config.videos)
    shard_of = {video: shard for shard in shards for video in work.missing(shard)}
    left = Counter(shard.name for shard in shard_of.values())
    work.folder.mkdir(exist_ok=True)
    if models.text is not None:
        write_empty_prompt(work.out, models.text, work.plan.spec)
    for shard in shards:
        if not left[shard.name]:
            work.assemble(shard)
    decoders, threads = processes(config)
    tasks = (Task(number, str(videos / work.plan.sources[number].name), work.plan.spec.read) for number in shard_of)
    items = decode(tasks, workers=max(1, min(decoders, len(shard_of))), timeout=config.timeout)
    with _threads(threads) as pool, closing(items):
        depth = threads + 1 if work.plan.spec.read.frames else DEPTH * threads
        in_flight = _InFlight(models, work, pool, depth, report)
        with closing(in_flight):
            for number, item in items:
                in_flight.take(number, item)
                if not in_flight.store(shard_of, left, strict=config.strict):
                    return in_flight.progress
            in_flight.wait_for_all()
            in_flight.store(shard_of, left, strict=config.strict)
    return in_flight.progress


class _InFlight:
    """The videos that are being decoded or encoded."""

    def __init__(
        self,
        models: Models,
        work: Work,
        pool: ThreadPoolExecutor,
        depth: int,
        report: Callable[[EncodeProgress], None],
    ) -> None:
        self.work, self.pool, self.depth, self.report = work, pool, depth, report
        self.encoder = Encoder(models.vae, models.text, work.plan)
        self.progress = EncodeProgress()
        self.videos: dict[int, VideoInFlight] = {}
        self.queued: deque[Moments] = deque()

    def take(self, number: int, item: object) -> None:
        """Takes what a decoder says of a video; waits while too many calls are in flight."""
        if isinstance(item, Restarted):
            if number in self.videos:
                self.videos.pop(number).close()
            return
        if number not in self.videos:
            self.videos[number] = VideoInFlight(number, self.work.plan, self.encoder, self.pool, self.work.folder)
        video = self.videos[number]
        if not isinstance(item, Piece):
            assert isinstance(item, Info | Rejected)
            video.end = video.end or item
            return
        call = video.take(item)
        if call is not None:
            self.queued.append(call)
            if len(self.queued) > self.depth:
                self._wait(self.queued.popleft())

    def _wait(self, call: Moments) -> None:
        while wait([call], timeout=TICK).not_done:
            self._report()

    def _report(self) -> None:
        self.progress.frames = self.encoder.frames
        self.report(self.progress)

    def wait_for_all(self) -> None:
        """Until all is encoded."""
        while self.queued:
            self._wait(self.queued.popleft())

    def store(self, shard_of: dict[int, ShardPlan], left: Counter[str], *, strict: bool) -> bool:
        """Stores the videos that have ended and are encoded, and seals shards that are full; False to stop."""
        for video in self.videos.values():
            video.collect()
        self._report()
        for number, video in list(self.videos.items()):
            if not video.ended:
                continue
            try:
                self._store(self.videos.pop(number), shard_of[number])
            finally:
                video.close()
            self._report()
            if strict and self.progress.rejected:
                return False
            left[shard_of[number].name] -= 1
            if not left[shard_of[number].name]:
                self.work.assemble(shard_of[number])
        return True

    def _store(self, video: VideoInFlight, shard: ShardPlan) -> None:
        name, end = video.source.name, video.store(self.work, shard)
        if isinstance(end, Rejected):
            stamp = None if end.unread else stamp_of(Path(self.work.plan.videos) / name)
            self.work.reject(shard, video.number, end.reason, stamp)
            self.progress.rejected.append((name, end.reason))
        else:
            self.progress.videos += 1
            self.progress.notes += [(name, note) for note in end.notes]

    def close(self) -> None:
        """Frees what is in flight."""
        for call in self.queued:
            call.cancel()
        for video in self.videos.values():
            video.close()


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
