"""Reads the clips of one video, in pieces: the windows of it that are encoded, each in the shape nearest to its own."""

import math
import os
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from fvdm.media.preprocess import Frame, Info, Preprocess, VideoError, to_size
from fvdm.media.videos import Reader, estimate_frames, is_still, open_reader

Size = tuple[int, int]


@dataclass(frozen=True)
class ClipSpec:
    """Which clips are read of a video, and in which form.

    Attributes:
        sizes: (height, width) of each bucket in pixels; a video goes into the nearest.
        preprocess: how frames are scaled and cropped.
        chunk: frames of a piece.
        frames: pixel frames of a clip; 0 where a video is one clip, whatever its length.
        every: pixel frames from the start of a clip to the start of the next.
        fps: frames per second at which videos are read; None for their own rate.
        images: still images are clips of one frame.
    """

    sizes: tuple[Size, ...]
    preprocess: Preprocess
    chunk: int
    frames: int = 0
    every: int = 0
    fps: float | None = None
    images: bool = False

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "ClipSpec":
        """The inverse of `dataclasses.asdict`, also after a way through JSON."""
        sizes = tuple((int(h), int(w)) for h, w in values["sizes"])
        return cls(**dict(values) | {"sizes": sizes, "preprocess": Preprocess.from_dict(values["preprocess"])})


class Piece(NamedTuple):
    """Frames of a clip, in order.

    Attributes:
        clip: its number in the video.
        first: number of the clip's first frame in the video, at the rate of the clips.
        bucket: index of `ClipSpec.sizes`.
        frames: uint8 (n 3 h w).
        fps: frames per second; None if unknown, as of an image.
        last: the clip is complete; never so for a whole video, which ends with its `Info`.
    """

    clip: int
    first: int
    bucket: int
    frames: np.ndarray
    fps: float | None = None
    last: bool = False


def nearest_size(sizes: Sequence[Size], side: tuple[int, int]) -> int:
    """The bucket of a video: the nearest aspect ratio, by its logarithm; of several of the same, the largest that
    does not enlarge it, else the smallest.

    Args:
        sizes: (height, width) of the buckets.
        side: (width, height) of the video.
    """
    width, height = side

    def distance(k: int) -> tuple[float, float]:
        h, w = sizes[k]
        off = round(abs(math.log(w / h) - math.log(width / height)), 6)
        enlarged = h > height or w > width
        return off, h * w if enlarged else -h * w

    return min(range(len(sizes)), key=distance)


def read_clips(path: str | os.PathLike[str], spec: ClipSpec) -> Iterator[Piece | Info]:
    """Yields the clips of a video in pieces of `spec.chunk` frames, then one `Info`.

    A window that the video ends in gives pieces, too, none of which is the last: discard such a clip.

    Args:
        path: a video file, an image, or a folder of frames.
        spec: which clips, and in which form.

    Raises:
        VideoError: with the reason, at any point of the reading; among them a video without a complete clip.
    """
    still = spec.images and is_still(path)
    reader = open_reader(path, spec.preprocess)
    length, every = (1, 1) if still else (spec.frames, spec.every)
    least = 1 if still else max(spec.preprocess.min_frames, spec.frames)
    windows = _Windows(spec.chunk, length, every)
    count, bucket, side = 0, 0, (0, 0)
    for pixels, shown in _at_rate(reader, None if still else spec.fps):
        if not count:
            side, bucket = shown, nearest_size(spec.sizes, shown) if min(shown) > 0 else 0
            windows.fps = (spec.fps if reader.fps and not still else None) or reader.fps
        if windows.holds(count):
            frame = to_size(pixels, spec.sizes[bucket], spec.preprocess, shown)
            yield from windows.add(count, bucket, frame)
        count += 1
    if count < least:
        at = f" at {spec.fps:g} fps" if spec.fps and reader.fps else ""
        raise VideoError(f"too short: {count} frames{at}, {least} are needed")
    yield from windows.rest(bucket)
    notes = list(reader.notes)
    if spec.fps and not still and not reader.fps:
        notes.append(f"its frame rate is unknown: its frames are taken as they are, not at {spec.fps:g} fps")
    yield Info(windows.fps, count, side, tuple(notes))


def estimate_clips(path: str | os.PathLike[str], spec: ClipSpec) -> int:
    """About how many frames the clips of a video have together, from its header alone. Never raises."""
    if spec.images and is_still(path):
        return 1
    frames = estimate_frames(path, spec.fps)
    if not spec.frames:
        return frames
    return spec.frames * max(0, (frames - spec.frames) // spec.every + 1)


def _at_rate(reader: Reader, fps: float | None) -> Iterator[Frame]:
    """The frames that a player shows at the times 0, 1 / fps, 2 / fps, ...; all, where either rate is unknown."""
    taken = 0
    for number, frame in enumerate(reader.frames()):
        if not (fps and reader.fps):
            yield frame
            continue
        while taken * reader.fps < (number + 1) * fps - 1e-6:
            yield frame
            taken += 1


class _Windows:
    """The windows of a video that the next frame belongs to, and the pieces of them that are not full yet."""

    def __init__(self, chunk: int, length: int, every: int) -> None:
        self.chunk, self.length, self.every = chunk, length, every
        self.fps: float | None = None
        self.open: deque[tuple[int, list[np.ndarray]]] = deque()

    def holds(self, number: int) -> bool:
        """Whether frame `number` belongs to a window."""
        return not self.length or number % self.every < self.length

    def add(self, number: int, bucket: int, frame: np.ndarray) -> Iterator[Piece]:
        """Takes a frame; yields the pieces that it fills."""
        if number == 0 or (self.length and number % self.every == 0):
            self.open.append((number, []))
        for first, frames in self.open:
            frames.append(frame)
            last = bool(self.length) and number - first + 1 == self.length
            if last or len(frames) == self.chunk:
                yield self._piece(first, bucket, frames, last)
                frames.clear()
        while self.open and self.length and number - self.open[0][0] + 1 == self.length:
            self.open.popleft()

    def rest(self, bucket: int) -> Iterator[Piece]:
        """The last piece of a whole video."""
        if not self.length:
            for first, frames in self.open:
                if frames:
                    yield self._piece(first, bucket, frames, False)

    def _piece(self, first: int, bucket: int, frames: list[np.ndarray], last: bool) -> Piece:
        number = first // self.every if self.every else 0
        return Piece(number, first, bucket, np.stack(frames), self.fps, last)
