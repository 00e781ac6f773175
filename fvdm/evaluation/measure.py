"""Features of many clips over many ranks, to the last digit the same for any number of them.

The clips are cut into chunks of a fixed size, and each chunk is done whole by one rank: what goes through a network
together never depends on the ranks. The features, 400 numbers a clip, are then gathered once, in the order of the
clips, and every rank has them all; statistics are taken of that one table, in float64.
"""

import contextlib
import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from fvdm.distributed import Ranks, from_environment
from fvdm.evaluation import fvd
from fvdm.evaluation.i3d import I3D
from fvdm.evaluation.protocols import Clip
from fvdm.evaluation.sources import ClipSource

T = TypeVar("T")


@contextlib.contextmanager
def ranks() -> Iterator[Ranks]:
    """This process among those that torchrun started; alone without it.

    Only small tables are exchanged, on the CPU, so that the ranks need gloo whatever they compute on.

    Raises:
        ValueError: if only some of torchrun's variables are set.
    """
    if "RANK" not in os.environ:
        yield Ranks()
        return
    mine = from_environment()
    if torch.cuda.is_available():
        torch.cuda.set_device(mine.local_rank % torch.cuda.device_count())
    dist.init_process_group("gloo")
    try:
        yield mine
    finally:
        dist.destroy_process_group()


def gather(value: T, group: Ranks) -> list[T]:
    """What every rank has, in the order of the ranks, on all of them."""
    if group.world_size == 1:
        return [value]
    parts: list[Any] = [None] * group.world_size
    dist.all_gather_object(parts, value)
    return parts


def over_ranks(work: Callable[[int], T], count: int, group: Ranks) -> list[T]:
    """`[work(0), ..., work(count - 1)]` on every rank, each piece done by one of them.

    Raises:
        ValueError: on all ranks, if one of them raised it.
    """
    done: dict[int, T] = {}
    error_message = ""
    try:
        for piece in group.share(count):
            done[piece] = work(piece)
    except ValueError as error:
        error_message = str(error)
    for sentence, _ in (parts := gather((error_message, done), group)):
        if sentence:
            raise ValueError(sentence)
    everything = {piece: value for _, part in parts for piece, value in part.items()}
    return [everything[piece] for piece in range(count)]


def clip_features(
    net: I3D,
    source: ClipSource,
    clips: Sequence[Clip],
    group: Ranks,
    *,
    resize: fvd.Resize = "direct",
    chunk: int = 4,
    still: bool = False,
    progress: Callable[[int], None] = lambda done: None,
) -> np.ndarray:
    """I3D features of clips, float64 `(n 400)`, row k that of clip k. Collective: every rank calls it.

    Args:
        net: the detector.
        source: where the clips are.
        clips: which.
        group: the ranks.
        resize: how images come to the detector's size.
        chunk: clips that are read, or sampled, and go through the network together; part of what makes the digits.
        still: take the middle frame of each clip instead, shown all the time.
        progress: called with the number of a chunk that is done.

    Raises:
        ValueError: if a clip cannot be read.
    """

    def work(piece: int) -> np.ndarray:
        video = source.read(clips[piece * chunk : (piece + 1) * chunk])  # (b f 3 h w)
        if still:
            video = freeze(video)
        found = fvd.features(net, video, batch=chunk, resize=resize).double().cpu().numpy()
        progress(piece)
        return found

    return np.concatenate(over_ranks(work, -(-len(clips) // chunk), group))


def freeze(video: Tensor) -> Tensor:
    """Clips `(b f ...)` in which the middle frame stands still."""
    frames = video.shape[1]
    return video[:, frames // 2, None].expand(-1, frames, *video.shape[2:])
