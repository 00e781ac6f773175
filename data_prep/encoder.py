"""Encodes the videos of a plan: decoder processes feed one VAE, finished videos become parts, full shards are
sealed.

Each video is encoded in chunks of a fixed number of frames from its start, together with their mirrored
twins. What is written therefore does not depend on what else was in flight, nor on how often the run was
interrupted.
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

from data_prep.decoding import Rejected, Restarted, Task, decode
from data_prep.samples import make_sample
from data_prep.shards import Plan, ShardPlan, Work, stamp_of
from fvdm.media.memory import keep_freed_memory
from fvdm.media.videos import Info, Preprocess

if TYPE_CHECKING:
    from fvdm.media.vae import VAE


DEPTH = 8  # chunks in flight per thread that encodes: its next ones are there while finished videos are written


@dataclass
class Progress:
    """Counts of a run: videos encoded, frames encoded, and `(name, reason)` of the videos rejected."""

    videos: int = 0
    frames: int = 0
    rejected: list[tuple[str, str]] = field(default_factory=list)


def encode_shards(
    videos: Path,
    work: Work,
    shards: list[ShardPlan],
    vae: "VAE",
    *,
    decoders: int,
    encoders: int,
    timeout: float,
    report: Callable[[Progress], bool],
) -> Progress:
    """Makes every shard of `shards` that is not whole yet.

    Args:
        videos: the folder that the plan's names are relative to.
        work: where parts and shards go.
        shards: those this job has to make.
        vae: the encoder, on its device.
        decoders: processes that decode.
        encoders: threads that call the VAE, see `_threads`.
        timeout: seconds after which a silent decoder is given up.
        report: called after every chunk and every video; the run stops after a video at which it returns
            False.
    """
    plan = work.plan
    shard_of = {video: shard for shard in shards for video in work.missing(shard)}
    left = Counter(shard.name for shard in shard_of.values())
    for shard in shards:
        if not left[shard.name]:
            work.assemble(shard)
    progress = Progress()
    flip, dtype = bool(plan.settings["preprocess"]["flip"]), str(plan.settings["dtype"])
    begun: dict[int, list[Future[np.ndarray | None]]] = {}
    ended: list[tuple[int, list[Future[np.ndarray | None]], Info | Rejected]] = []

    def store(everything: bool) -> bool:
        """Stores the videos whose chunks are encoded, or all that have ended; False to stop."""
        for video, chunks, end in list(ended):
            if everything or all(chunk.done() for chunk in chunks):
                ended.remove((video, chunks, end))
                shard = shard_of[video]
                _store(work, videos, shard, video, [chunk.result() for chunk in chunks], end, progress)
                if not report(progress):
                    return False
                left[shard.name] -= 1
                if not left[shard.name]:
                    work.assemble(shard)
        return True

    tasks = _tasks(videos, plan, list(shard_of))
    with _threads(encoders) as pool, closing(decode(tasks, workers=decoders, timeout=timeout)) as items:
        queued: deque[Future[np.ndarray | None]] = deque()
        for video, item in items:
            if isinstance(item, np.ndarray):
                if len(queued) >= DEPTH * encoders:
                    queued.popleft().result()
                queued.append(pool.submit(_encode, vae, item, flip, dtype))
                begun.setdefault(video, []).append(queued[-1])
                progress.frames += len(item)
                report(progress)
            elif isinstance(item, Restarted):
                begun.pop(video, None)
            else:
                ended.append((video, begun.pop(video, []), item))
            if not store(everything=False):
                return progress
        store(everything=True)
    return progress


@contextmanager
def _threads(encoders: int) -> Iterator[ThreadPoolExecutor]:
    """Threads that call the VAE.

    On a CPU each uses one core: that is up to twice as fast as one call on all cores, and the last bits of a
    latent do not depend on how many cores a job has. On a GPU there is one thread.
    """
    keep_freed_memory()
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with ThreadPoolExecutor(encoders, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            yield pool
    finally:
        torch.set_num_threads(before)


def _tasks(videos: Path, plan: Plan, missing: list[int]) -> Iterator[Task]:
    how = Preprocess.from_dict(plan.settings["preprocess"])
    for video in missing:
        path = str(videos / plan.sources[video].name)
        yield Task(video, path, plan.settings["size"], how, plan.settings["chunk"])


def _encode(vae: "VAE", frames: np.ndarray, flip: bool, dtype: str) -> np.ndarray | None:
    """Moments of a chunk, as stored: uint8 (n 3 s s) -> (1 or 2, n, 2c, h, w), the second half mirrored.

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


def _store(
    work: Work,
    videos: Path,
    shard: ShardPlan,
    video: int,
    chunks: list[np.ndarray | None],
    end: Info | Rejected,
    progress: Progress,
) -> None:
    """Keeps a video that was read to its end, or the reason why it cannot be used."""
    source = work.plan.sources[video]
    finite = [chunk for chunk in chunks if chunk is not None]
    if isinstance(end, Info) and len(finite) < len(chunks):
        end = Rejected(f"the VAE's latents are not finite in {work.plan.settings['dtype']}")
    if isinstance(end, Rejected):
        work.reject(shard, video, end.reason, None if end.unread else stamp_of(videos / source.name))
        progress.rejected.append((source.name, end.reason))
        return
    arrays = np.concatenate(finite, axis=1)
    flip = arrays[1] if len(arrays) == 2 else None
    work.keep(shard, video, make_sample(video, source, end.fps, arrays[0], flip))
    progress.videos += 1
