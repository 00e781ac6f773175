"""Given frames as people have them: images, video files, folders of frames. Read, fitted, and told what was done."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from fvdm.diffusion.tasks import Plan
from fvdm.media.videos import IMAGE_SUFFIXES, Info, Preprocess, VideoError, read_video, to_square

_FIT = Preprocess(min_frames=1)


@dataclass(frozen=True)
class Source:
    """One given image or video.

    Attributes:
        name: how to speak of it.
        frames: uint8 `(n 3 size size)`.
        fps: frames per second; None where there is no such thing.
        side: what its frames were before they were fitted, (width, height).
    """

    name: str
    frames: Tensor
    fps: float | None
    side: tuple[int, int]

    def __str__(self) -> str:
        """What was read and what was done to it, in a line."""
        size, number = self.frames.shape[-1], len(self.frames)
        rate = f" at {self.fps:g} frames/s" if self.fps else ""
        count = f"{number} frame{'s' if number > 1 else ''}"
        fitted = "as it is" if self.side == (size, size) else f"shorter side to {size}, centre {size} x {size} kept"
        return f"{self.name}: {count} of {self.side[0]} x {self.side[1]}{rate}; {fitted}"


def read_source(path: str, size: int) -> Source:
    """Read an image, a video file or a folder of images; shorter side to `size`, the centre kept, as in training.

    Raises:
        ValueError: if it cannot be read.
    """
    from PIL import Image, ImageOps, UnidentifiedImageError

    try:
        if Path(path).suffix.lower() in IMAGE_SUFFIXES:
            with Image.open(path) as image:
                picture = np.asarray(ImageOps.exif_transpose(image).convert("RGB"))
            frame = torch.from_numpy(to_square(picture, size, _FIT))[None]
            return Source(path, frame, None, (picture.shape[1], picture.shape[0]))
        parts, info = [], Info(None, 0)
        for part in read_video(path, size, _FIT, 64):
            if isinstance(part, Info):
                info = part
            else:
                parts.append(part)
        return Source(path, torch.from_numpy(np.concatenate(parts)), info.fps, _side(path))
    except (OSError, UnidentifiedImageError, Image.DecompressionBombError, VideoError) as error:
        raise ValueError(f"cannot read frames from {path}: {error}") from None


def _side(path: str) -> tuple[int, int]:
    """Width and height of the first frame."""
    import av
    from PIL import Image

    from fvdm.media.videos import frame_files

    if Path(path).is_dir():
        with Image.open(frame_files(path, _FIT.frame_order)[0]) as image:
            return image.size
    with av.open(path) as container:
        stream = container.streams.video[0]
        return stream.width, stream.height


def read_frames(path: str, size: int) -> Tensor:
    """All frames of an image, a video or a folder of images: uint8 `(n 3 size size)`; see `read_source`.

    Raises:
        ValueError: if it cannot be read.
    """
    return read_source(path, size).frames


def as_frames(given: Tensor, size: int, name: str = "given") -> Tensor:
    """Pictures in memory, uint8 `(3 h w)` or `(n 3 h w)`, fitted as files are: `(n 3 size size)`.

    Raises:
        ValueError: if they are no such pictures.
    """
    frames = given[None] if given.ndim == 3 else given
    if frames.ndim != 4 or frames.shape[1] != 3 or frames.dtype != torch.uint8 or not len(frames):
        raise ValueError(f"{name}: frames are uint8 (n 3 h w), not {given.dtype} {tuple(given.shape)}")
    try:
        return torch.stack([torch.from_numpy(to_square(f.permute(1, 2, 0).cpu().numpy(), size, _FIT)) for f in frames])
    except VideoError as error:
        raise ValueError(f"{name}: {error}") from None


def available(clips: Sequence[Tensor], stride: int) -> int:
    """How many frames the clips `(n 3 h w)` hold, counted at the model's stride where they are video."""
    return sum(-(-len(clip) // stride) for clip in clips)


def choose(clips: Sequence[Tensor], plan: Plan, stride: int) -> tuple[Tensor, list[str]]:
    """The frames that a plan wants given, and from where each was taken.

    As many frames as are wanted are taken in their order. One longer clip gives every `stride`-th frame. Two clips
    give the end of the first and the beginning of the second. An image stands for every frame that is not held.

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
        raise ValueError(f"the task wants {count} given frames; {sum(map(len, clips))} came in {len(clips)} files")
    length = plan.schedule.shape[1]
    left, right = ([k for k in plan.given if (2 * k < length) == side] for side in (True, False))
    end = len(clips[0]) - 1
    first, before = _take(clips[0], [end - (left[-1] - k) * stride for k in left])
    second, after = _take(clips[1], [(k - right[0]) * stride for k in right])
    return torch.cat([first, second]), before + after


def _take(clip: Tensor, wanted: list[int]) -> tuple[Tensor, list[str]]:
    if not wanted:
        return clip[:0], []
    if min(wanted) < 0 or max(wanted) >= len(clip):
        raise ValueError(
            f"the given clip has {len(clip)} frames, and the task takes {len(wanted)} of {wanted[-1] - wanted[0] + 1}: "
            f"give a longer one, or exactly {len(wanted)} images"
        )
    shown = ", ".join(map(str, wanted[:4])) + (f", ... {wanted[-1]}" if len(wanted) > 4 else "")
    return clip[wanted], [f"frame{'s' if len(wanted) > 1 else ''} {shown} of it"]
