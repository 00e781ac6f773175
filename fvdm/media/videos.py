"""Reads one video: a file, an animated or still image, or a folder of frames, as square uint8 frames.

The only place that decodes, for training and for given frames alike. Frames that come at an uneven rate are put on an
even grid, as a player would show them, because a model that sees "every third frame" assumes one.
"""

import os
from collections.abc import Iterator
from typing import Protocol

import av
import numpy as np

from fvdm.media.containers import VideoFile, open_video, packets_of
from fvdm.media.preprocess import Frame, Info, Preprocess, VideoError, frame_of, sides, to_size, to_square
from fvdm.media.stills import folder_frames, frame_files, kind_of, read_animation, read_still
from fvdm.media.timing import Grid, measure

__all__ = [
    "Info",
    "Preprocess",
    "VideoError",
    "codec_of",
    "count_frames",
    "estimate_frames",
    "frame_files",
    "read_video",
    "to_square",
]


class Reader(Protocol):
    """What reads one kind of source: its frames, then what is known of it."""

    fps: float | None  # known once the first frame came
    notes: list[str]  # complete once the last frame came

    def frames(self) -> Iterator[Frame]: ...


class _Images:
    """A folder of images, or one still image; they have no rate."""

    fps: float | None = None

    def __init__(self, path: str | os.PathLike[str], order: str) -> None:
        self.path, self.order = path, order
        self.notes: list[str] = []

    def frames(self) -> Iterator[Frame]:
        if os.path.isdir(self.path):
            return folder_frames(self.path, self.order)
        return iter([frame_of(read_still(self.path))])


class _Animation:
    """An animated image that libav does not read."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = path
        self.fps: float | None = None
        self.notes: list[str] = []

    def frames(self) -> Iterator[Frame]:
        timing = measure([time for time, _ in read_animation(self.path)], 0.001)
        self.fps, self.notes = timing.fps, list(timing.notes)
        return Grid(timing).even((time, frame_of(pixels)) for time, pixels in read_animation(self.path))


def open_reader(path: str | os.PathLike[str], preprocess: Preprocess) -> Reader:
    """What reads a source, by its content.

    Raises:
        VideoError: the file cannot be read.
    """
    if os.path.isdir(path):
        return _Images(path, preprocess.frame_order)
    try:
        kind = kind_of(path)
    except OSError as error:
        raise VideoError(f"cannot be read: {error.strerror or error}", error) from None
    if kind == "image":
        return _Images(path, preprocess.frame_order)
    if kind == "animation" and not _libav_reads(path):
        return _Animation(path)
    return VideoFile(path, keep_corrupt=preprocess.keep_corrupt)


def is_still(path: str | os.PathLike[str]) -> bool:
    """Whether it is one still image. False where it cannot be read."""
    try:
        return not os.path.isdir(path) and kind_of(path) == "image"
    except OSError:
        return False


def _libav_reads(path: str | os.PathLike[str]) -> bool:
    """Of animated images libav reads GIF and PNG; of WebP it skips the frames."""
    with open(path, "rb") as file:
        return file.read(4) in (b"GIF8", b"\x89PNG")


def read_video(
    path: str | os.PathLike[str], size: int | tuple[int, int], preprocess: Preprocess, chunk: int
) -> Iterator[np.ndarray | Info]:
    """Yields the frames of a video in chunks, then one `Info`. Which kind of file it is follows from its content.

    Args:
        path: a video file, an image, or a folder of frames.
        size: (height, width), or the side of a square, in pixels.
        preprocess: how frames come to that size.
        chunk: frames per chunk; the last one has the rest.

    Yields:
        uint8 arrays (n 3 h w), then `Info`.

    Raises:
        VideoError: with the reason, at any point of the reading.
    """
    reader = open_reader(path, preprocess)
    buffer: list[np.ndarray] = []
    count, side = 0, (0, 0)
    for pixels, shown in reader.frames():
        side = side if count else shown
        buffer.append(to_size(pixels, sides(size), preprocess, shown))
        count += 1
        if len(buffer) == chunk:
            yield np.stack(buffer)
            buffer = []
    if count < preprocess.min_frames:
        raise VideoError(f"too short: {count} frames, {preprocess.min_frames} are needed")
    if buffer:
        yield np.stack(buffer)
    yield Info(reader.fps, count, side, tuple(reader.notes))


def estimate_frames(path: str | os.PathLike[str], fps: float | None = None) -> int:
    """About how many frames a video has, from its header alone (0 where it does not say). Never raises.

    Args:
        path: a video file, an image, or a folder of frames.
        fps: count the frames that there are at this rate, where the header states the video's own.
    """
    try:
        if os.path.isdir(path):
            return len(frame_files(path, "natural"))
        kind = kind_of(path)
        if kind == "image":
            return 1
        if kind == "animation" and not _libav_reads(path):
            return sum(1 for _ in read_animation(path))
        with av.logging.Capture(), open_video(path) as (container, stream):
            rate = float(stream.average_rate or stream.guessed_rate or 0)
            frames = stream.frames or int(float(container.duration or 0) / 1e6 * rate)
            return max(0, min(int(frames * fps / rate) if fps and rate else frames, 100_000_000))
    except (OSError, ValueError, VideoError):  # libav's errors are OSError or ValueError
        return 0


def count_frames(path: str | os.PathLike[str], order: str = "natural") -> int:
    """Frames that `read_video` yields. Counts packets; decodes only where these do not tell.

    Args:
        path: a video file, an image, or a folder of frames.
        order: of a frame folder, see `Preprocess`.

    Raises:
        VideoError: if it cannot be read.
    """
    if os.path.isdir(path):
        return len(frame_files(path, order))
    preprocess = Preprocess(min_frames=1)
    if isinstance(open_reader(path, preprocess), VideoFile):
        try:
            with av.logging.Capture():
                packets = packets_of(path)
        except (av.error.FFmpegError, OSError, ValueError) as error:
            raise VideoError(f"cannot be decoded: {error}", error) from None
        if packets.timing().step is None and not packets.empty and not packets.leading:
            return packets.count
    return next(part.frames for part in read_video(path, 8, preprocess, 32) if isinstance(part, Info))


def codec_of(path: str | os.PathLike[str]) -> str:
    """The codec of a video file, such as h264; of a frame folder, the suffixes of its files.

    Raises:
        ValueError: if the file is no video.
    """
    if os.path.isdir(path):
        suffixes = {os.path.splitext(file)[1].lower() or "no suffix" for file in frame_files(path, "natural")}
        return f"frame folders of {' and '.join(sorted(suffixes))}"
    try:
        kind = kind_of(path)
        if kind == "image" or (kind == "animation" and not _libav_reads(path)):
            return os.path.splitext(path)[1].lower().removeprefix(".") or "image"
        with av.logging.Capture(), open_video(path) as (_, stream):
            return str(stream.codec.canonical_name)
    except (OSError, ValueError, VideoError) as error:
        raise ValueError(f"cannot read {os.fspath(path)}: {error}") from None


def frame_rate_of(path: str | os.PathLike[str]) -> float | None:
    """Frames per second of a video file, as `read_video` finds them; None for images and where it is unknown.

    Raises:
        ValueError: if the file is no video.
    """
    if os.path.isdir(path) or not isinstance(open_reader(path, Preprocess()), VideoFile):
        return None
    try:
        with av.logging.Capture():
            return packets_of(path).timing().fps
    except (OSError, ValueError, VideoError) as error:
        raise ValueError(f"cannot read {os.fspath(path)}: {error}") from None
