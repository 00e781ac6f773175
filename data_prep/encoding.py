"""Encodes the videos of a plan: decoder processes feed one VAE, finished videos become parts, full shards are
sealed.

A whole video is encoded in pieces of a fixed number of frames, a clip from its own first frame; both together with
their flipped copies. What is stored therefore depends neither on what else is in flight, nor on how often the run was
interrupted. Pixels and moments that wait are in temporary files, so memory does not grow with the length of a video or
of a clip.
"""

import os
from collections import Counter, deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

from data_prep.config import EncodeConfig
from data_prep.decoding import Rejected, Restarted, Task, decode
from data_prep.encoder import Encoder, Models
from data_prep.manifest import bucket_of
from data_prep.planning import EncodePlan, ShardPlan
from data_prep.samples import Array, Part, VideoMoments, clip_key
from data_prep.shards import Work, stamp_of
from fvdm.data.format import Clip, Window
from fvdm.media.clips import Piece
from fvdm.media.memory import keep_freed_memory
from fvdm.media.videos import Info

DEPTH = 8  # pieces in flight per thread that encodes: its next ones are there while finished videos are written
TICK = 1.0  # seconds between two looks at the progress while all threads encode
PIXELS = 64 * 2**20  # bytes of a clip's pixels that stay in memory before they go to a file

Moments = Future["np.ndarray | None"]
Embeddings = Future["list[np.ndarray] | None"]


@dataclass
class EncodeProgress:
    """Counts of a run: videos encoded, frames encoded; `(name, reason)` of the videos rejected, `(name, note)` of what
    was done to others."""

    videos: int = 0
    frames: int = 0
    rejected: list[tuple[str, str]] = field(default_factory=list)
    notes: list[tuple[str, str]] = field(default_factory=list)


class _ClipInFlight:
    """A clip, or a whole video: its calls of the VAE, in order, and the moments of those that are done."""

    def __init__(self, piece: Piece, copies: int, folder: Path) -> None:
        self.piece = piece._replace(frames=np.empty(0, np.uint8))
        self.frames, self.complete, self.finite = 0, False, True
        self.calls: deque[Moments] = deque()
        self.moments = VideoMoments(copies, folder)
        self.pixels = Array(folder, PIXELS)

    def collect(self, everything: bool) -> None:
        """Takes in what is encoded; with `everything`, waits for it."""
        while self.calls and (everything or self.calls[0].done()):
            moments = self.calls.popleft().result()
            self.finite = self.finite and moments is not None
            if moments is not None:
                self.moments.append(moments)

    def close(self) -> None:
        wait(self.calls)
        self.moments.close()
        self.pixels.close()


class VideoInFlight:
    """A video: its clips in flight, and the samples of those that are done.

    Attributes:
        number: of the video in the plan.
        end: once it was read to its end: what is known of it, or why it cannot be used.
    """

    def __init__(self, number: int, plan: EncodePlan, encoder: Encoder, pool: ThreadPoolExecutor, folder: Path) -> None:
        """Begins with its captions; `folder` is where temporary files are."""
        self.number, self.source, self.spec = number, plan.sources[number], plan.spec
        self.texts = plan.captions[number] if plan.captions else ()
        self.embeddings: Embeddings | None = None
        if encoder.text is not None and self.texts:
            self.embeddings = pool.submit(encoder.captions, self.texts)
        self.encoder, self.pool, self.folder = encoder, pool, folder
        self.clips: deque[_ClipInFlight] = deque()
        self.end: Info | Rejected | None = None
        self.part = Part(folder)

    def take(self, piece: Piece) -> Moments | None:
        """Takes the next frames of a clip; returns the call that encodes them, if one begins."""
        clip = next((clip for clip in self.clips if clip.piece.clip == piece.clip), None)
        if clip is None:
            clip = _ClipInFlight(piece, 2 if self.spec.flip else 1, self.folder)
            self.clips.append(clip)
        clip.frames, clip.complete = clip.frames + len(piece.frames), piece.last
        if not self.spec.read.frames:
            clip.calls.append(self.pool.submit(self.encoder.piece, piece.frames))
            return clip.calls[-1]
        clip.pixels.append(piece.frames)
        if not piece.last:
            return None
        clip.calls.append(self.pool.submit(self.encoder.clip, clip.pixels, clip.moments))
        return clip.calls[-1]

    def collect(self, everything: bool = False) -> None:
        """Takes in what is encoded, clip after clip; with `everything`, waits for it."""
        for clip in self.clips:
            clip.collect(everything)
        while self.clips and self.clips[0].complete and not self.clips[0].calls:
            self._add(self.clips.popleft())

    @property
    def ended(self) -> bool:
        """It was read to its end, and is encoded."""
        return self.end is not None and not any(clip.calls for clip in self.clips)

    def store(self, work: Work, shard: ShardPlan) -> Info | Rejected:
        """Keeps what the video has become, or the reason why it cannot be used, which it returns."""
        assert self.end is not None
        if isinstance(self.end, Info) and not self.spec.read.frames:
            for clip in self.clips:
                if self.spec.format == 1 and clip.finite:
                    work.keep(shard, self.number, clip.moments.sample(self.number, self.source, self.end.fps))
                    return self.end
                self._add(clip)
        if isinstance(self.end, Info):
            work.keep(shard, self.number, self.part)
        return self.end

    def _add(self, clip: _ClipInFlight) -> None:
        """Makes the sample of a clip that is encoded; what is not finite rejects the video."""
        embeddings = self.embeddings.result() if self.embeddings else []
        if not clip.finite or embeddings is None:
            what = "the VAE's latents" if not clip.finite else "the text embeddings"
            if not isinstance(self.end, Rejected):
                self.end = Rejected(f"{what} are not finite in {self.spec.dtype}")
        elif self.spec.format == 2:
            piece = clip.piece
            still = self.spec.read.images and piece.last and clip.frames == 1
            described = Clip(
                source=self.source.name,
                window=Window(piece.first, clip.frames),
                fps=piece.fps,
                label=self.source.label,
                bucket=bucket_of(self.spec, piece.bucket, still),
                frames=0,
                captions=self.texts,
            )
            self.part.add(clip.moments.clip(clip_key(self.number, piece.clip), described, embeddings))
        clip.close()

    def close(self) -> None:
        """Frees the temporary files; waits for what is being encoded."""
        for clip in self.clips:
            clip.close()
        self.part.close()


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
    decoders, threads = processes(config)
    shard_of = {video: shard for shard in shards for video in work.missing(shard)}
    left = Counter(shard.name for shard in shard_of.values())
    work.folder.mkdir(exist_ok=True)
    for shard in shards:
        if not left[shard.name]:
            work.assemble(shard)
    encoder = Encoder(models, work.plan.spec)
    encoder.write_empty_prompt(work.out)
    paths = {number: str(Path(config.videos) / work.plan.sources[number].name) for number in shard_of}
    tasks = (Task(number, path, work.plan.spec.read) for number, path in paths.items())
    items = decode(tasks, workers=max(1, min(decoders, len(shard_of))), timeout=config.timeout)
    with _threads(threads) as pool, closing(items):
        depth = threads + 1 if work.plan.spec.read.frames else DEPTH * threads
        in_flight = _InFlight(encoder, work, pool, depth, report)
        with closing(in_flight):
            for number, item in items:
                in_flight.take(number, item)
                if not in_flight.store(shard_of, left, strict=config.strict):
                    return in_flight.progress
            in_flight.wait_for_all()
            in_flight.store(shard_of, left, strict=config.strict)
    return in_flight.progress


def processes(config: EncodeConfig) -> tuple[int, int]:
    """How many decoder processes one job has, and how many threads that call the VAE, on the machine it runs on."""
    if config.cluster == "slurm":
        cores = int(os.environ.get("SLURM_CPUS_PER_TASK", 1))
    else:
        cores = max(1, len(os.sched_getaffinity(0)) // config.jobs)
    encoders = min(16, cores) if config.device == "cpu" else 1
    return config.workers or min(8, cores), config.encoders or encoders


class _InFlight:
    """The videos that are being decoded or encoded."""

    def __init__(
        self,
        encoder: Encoder,
        work: Work,
        pool: ThreadPoolExecutor,
        depth: int,
        report: Callable[[EncodeProgress], None],
    ) -> None:
        self.encoder, self.work, self.pool, self.depth, self.report = encoder, work, pool, depth, report
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
