"""Given frames as people have them: images, video files, folders of images. Reads them, and says what was done."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from fvdm.diffusion.tasks import TaskPlan
from fvdm.media.preprocess import sides, to_size
from fvdm.media.videos import Info, Preprocess, VideoError, read_video

_FIT = Preprocess(min_frames=1)
STEP_IN_TIME = 8.0  # frames per second of a file where nothing given has a rate
_MAX_BYTES = 4 * 2**30  # of the frames of one file; a task takes some dozens


@dataclass(frozen=True)
class Source:
    """One given image or video.

    Attributes:
        name: what it is called in messages.
        frames: uint8 `(n 3 h w)`.
        fps: frames per second; None for images.
        side: (width, height) of its frames as a player shows them, before scaling.
        notes: what else was done to it, a sentence each.
    """

    name: str
    frames: Tensor
    fps: float | None
    side: tuple[int, int]
    notes: tuple[str, ...] = ()

    def __str__(self) -> str:
        """What was read and what was done to it, in a line."""
        (height, width), number = self.frames.shape[-2:], len(self.frames)
        rate = f" at {self.fps:g} frames/s" if self.fps else ""
        count = f"{number} frame{'s' if number > 1 else ''}"
        square = f"shorter side to {height}, centre {height} x {width} kept"
        filled = square if height == width else f"scaled to fill {width} x {height}, centre kept"
        fitted = "as it is" if self.side == (width, height) else filled
        return "; ".join([f"{self.name}: {count} of {self.side[0]} x {self.side[1]}{rate}", fitted, *self.notes])


def read_source(path: str, size: int | tuple[int, int]) -> Source:
    """Read an image, a video file or a folder of images, as in training: scaled to fill `size`, then the centre.

    Of a corrupt video the frames are read that can be decoded, and a note says so.

    Raises:
        ValueError: if it cannot be read.
    """
    try:
        try:
            return _read(path, size, _FIT)
        except VideoError as error:
            if not error.corrupt:
                raise
            source = _read(path, size, replace(_FIT, keep_corrupt=True))
            return replace(source, notes=(*source.notes, f"only what can be decoded is taken ({error})"))
    except VideoError as error:
        raise ValueError(f"cannot read frames from {path}: {error}") from None


def _read(path: str, size: int | tuple[int, int], preprocess: Preprocess) -> Source:
    parts: list[np.ndarray] = []
    info = Info(None, 0)
    for part in read_video(path, size, preprocess, 64):
        if isinstance(part, Info):
            info = part
        elif len(parts) * part.nbytes > _MAX_BYTES:
            raise VideoError(
                f"it has more than {len(parts) * 64} frames, too many to hold: cut out what is to be given"
            )
        else:
            parts.append(part)
    return Source(path, torch.from_numpy(np.concatenate(parts)), info.fps, info.side, info.notes)


def read_frames(path: str, size: int | tuple[int, int]) -> Tensor:
    """All frames of an image, a video or a folder of images: uint8 `(n 3 h w)`; see `read_source`.

    Raises:
        ValueError: if it cannot be read.
    """
    return read_source(path, size).frames


def file_rate(sources: Sequence[Source], stride: int) -> float:
    """Frames per second of a generated file: the speed of the first given video at the model's stride, else 8."""
    rates = [source.fps for source in sources if source.fps]
    return rates[0] / stride if rates else STEP_IN_TIME


def as_frames(given: Tensor, size: int | tuple[int, int], name: str = "given") -> Tensor:
    """Frames in memory, uint8 `(3 h w)` or `(n 3 h w)`, scaled and cropped as files are to (height, width) `size`.

    Raises:
        ValueError: if they have another shape or type.
    """
    frames = given[None] if given.ndim == 3 else given
    if frames.ndim != 4 or frames.shape[1] != 3 or frames.dtype != torch.uint8 or not len(frames):
        raise ValueError(f"{name}: frames are uint8 (n 3 h w), not {given.dtype} {tuple(given.shape)}")
    try:
        own = [frame.permute(1, 2, 0).cpu().numpy() for frame in frames]
        return torch.stack([torch.from_numpy(to_size(frame, sides(size), _FIT)) for frame in own])
    except VideoError as error:
        raise ValueError(f"{name}: {error}") from None


def available(clips: Sequence[Tensor], stride: int) -> int:
    """How many frames the clips `(n 3 h w)` hold, counted at the model's stride where they are video."""
    return sum(-(-len(clip) // stride) for clip in clips)


def choose(clips: Sequence[Tensor], plan: TaskPlan, stride: int) -> tuple[Tensor, list[str]]:
    """The frames that a task needs, and from where each was taken.

    If there are exactly as many frames as the task needs, they are taken in their order. One longer clip gives every
    `stride`-th frame. Two clips give the end of the first and the beginning of the second. An image stands for every
    frame that is not held.

    Args:
        clips: uint8 `(n 3 h w)` each.
        plan: the task.
        stride: of the clips that the model was trained on.

    Returns:
        uint8 `(g 3 h w)`, g the number of the plan's given frames; and a line per clip.

    Raises:
        ValueError: if there are too few frames.
    """
    count = len(plan.given)
    if sum(map(len, clips)) == count:
        return torch.cat(list(clips)), [f"{count} given frame{'s' if count > 1 else ''}, in order"]
    if len(clips) == 1 and len(clips[0]) == 1 and set(plan.held) <= {0}:
        return clips[0].expand(count, -1, -1, -1), ["the image stands for every frame"]
    if len(clips) == 1:
        return _take(clips[0], [k * stride for k in plan.given])
    if len(clips) != 2:
        raise ValueError(f"the task needs {count} given frames; {sum(map(len, clips))} came in {len(clips)} files")
    length = plan.schedule.shape[1]
    left, right = ([k for k in plan.given if (2 * k < length) == side] for side in (True, False))
    end = len(clips[0]) - 1
    first, before = _take(clips[0], [end - (left[-1] - k) * stride for k in left])
    second, after = _take(clips[1], [(k - right[0]) * stride for k in right])
    return torch.cat([first, second]), before + after


def _take(clip: Tensor, indices: list[int]) -> tuple[Tensor, list[str]]:
    if not indices:
        return clip[:0], []
    if min(indices) < 0 or max(indices) >= len(clip):
        raise ValueError(
            f"the given clip has {len(clip)} frames, and the task takes {len(indices)} of "
            f"{indices[-1] - indices[0] + 1}: give a longer one, or exactly {len(indices)} images"
        )
    shown = ", ".join(map(str, indices[:4])) + (f", ... {indices[-1]}" if len(indices) > 4 else "")
    return clip[indices], [f"frame{'s' if len(indices) > 1 else ''} {shown} of it"]
