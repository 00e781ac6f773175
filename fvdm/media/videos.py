"""Reads one video, a file or a folder of frames, as square uint8 frames. The only place that decodes for
training.

What a decoder would hide is brought up: libav conceals damaged pictures and goes on, so every error-level
line it logs, every frame it flags as corrupt, and every index that promises more frames than there are,
rejects the video with that line as its reason. Frames that come at an uneven rate are put on an even grid,
as a player would show them, because a model that sees "every third frame" assumes one.
"""

import errno
import os
import re
import struct
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import av
import av.logging
import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError

_DAMAGE = re.compile("misdetection|corrupt|truncated|partial")  # in warnings of libav
IMAGE_SUFFIXES = frozenset([".bmp", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff"])
MAX_PIXELS = 64_000_000  # per frame; a damaged header can promise any size
MAX_ASPECT = 16  # longer to shorter side
LOST = frozenset([errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.EREMOTEIO, errno.EHOSTDOWN])  # disk or network
REFUSED = frozenset([errno.EACCES, errno.EPERM, errno.ENOENT, errno.EMFILE, errno.ENFILE])  # whatever is in the file
MAX_STRETCH = 8  # an uneven video may grow by this factor on its even grid; beyond, its times are nonsense


@dataclass(frozen=True)
class Preprocess:
    """How frames become squares, and what else is stored. All of it is written into the manifest.

    Attributes:
        resize: `shorter-side` scales the shorter side to the size, then crops the centre; `centre-square`
            crops the largest centred square, then scales it. They differ by less than a pixel.
        antialias: low-pass before shrinking. The papers' code does not; larger videos look better with it.
        flip: store the horizontally mirrored twin too (a mirrored latent is not the latent of a mirrored
            frame).
        min_frames: shorter videos are rejected, in frames.
        frame_order: order of a frame folder: `underscore` by the integer after the last underscore, `natural`
            by name with numbers compared as numbers.
        keep_damaged: store the frames of videos for which the decoder reports errors, instead of rejecting
            them.
    """

    resize: Literal["shorter-side", "centre-square"] = "shorter-side"
    antialias: bool = False
    flip: bool = False
    min_frames: int = 16
    frame_order: Literal["natural", "underscore"] = "natural"
    keep_damaged: bool = False


class VideoError(Exception):
    """A video that cannot be used; the message is the reason, one line.

    Attributes:
        unread: the file could not be read; what is in it may be good.
    """

    def __init__(self, reason: str, cause: Exception | None = None) -> None:
        """`cause` is the error behind it, if there is one."""
        super().__init__(reason)
        self.unread = isinstance(cause, OSError) and cause.errno in LOST | REFUSED


@dataclass(frozen=True)
class Info:
    """What is known of a video after reading it: frames per second (None: unknown) and number of frames."""

    fps: float | None
    frames: int


def read_video(path: str | Path, size: int, how: Preprocess, chunk: int) -> Iterator[np.ndarray | Info]:
    """Yields the frames of a video in chunks, then one `Info`.

    Args:
        path: a video file, or a folder of frames.
        size: side of the square, in pixels.
        how: the preprocessing.
        chunk: frames per chunk; the last one has what is left.

    Yields:
        uint8 arrays (n 3 size size), then `Info`.

    Raises:
        VideoError: with the reason, at any point of the reading.
    """
    folder = os.path.isdir(path)
    reader = _FolderReader(path, how) if folder else _FileReader(path, how)
    buffer: list[np.ndarray] = []
    count = 0
    for frame in reader.frames():
        buffer.append(to_square(frame, size, how))
        count += 1
        if len(buffer) == chunk:
            yield np.stack(buffer)
            buffer = []
    if count < how.min_frames:
        raise VideoError(f"too short: {count} frames, {how.min_frames} are needed")
    if buffer:
        yield np.stack(buffer)
    yield Info(reader.fps, count)


def estimate_frames(path: str | Path) -> int:
    """About how many frames a video has, from its header alone (0 where it does not say). Never raises."""
    try:
        if os.path.isdir(path):
            return len(frame_files(path, "natural"))
        with av.open(os.fspath(path)) as container:
            stream = container.streams.video[0]
            if stream.frames:
                return stream.frames
            rate = stream.average_rate or stream.guessed_rate
            seconds = float(container.duration or 0) / 1e6
            return max(0, min(int(seconds * float(rate or 0)), 100_000_000))
    except (OSError, ValueError, IndexError, VideoError):  # libav's errors are OSError or ValueError
        return 0


def to_square(frame: np.ndarray, size: int, how: Preprocess) -> np.ndarray:
    """Scales and crops one frame, uint8 (h w 3), to uint8 (3 size size), bilinear."""
    height, width = frame.shape[:2]
    side = min(height, width)
    if side < 1 or max(height, width) > MAX_ASPECT * side:
        raise VideoError(f"a frame of {width}x{height}: sides must be within {MAX_ASPECT} to 1")
    if how.resize == "centre-square":
        top, left = (height - side) // 2, (width - side) // 2
        frame = frame[top : top + side, left : left + side]
        target = (size, size)
    else:
        target = (max(size, round(height * size / side)), max(size, round(width * size / side)))
    pixels = torch.from_numpy(np.array(frame, order="C")).permute(2, 0, 1)[None]
    if target != pixels.shape[2:]:
        pixels = torch.nn.functional.interpolate(
            pixels, target, mode="bilinear", align_corners=False, antialias=how.antialias
        )
    top, left = (target[0] - size) // 2, (target[1] - size) // 2
    return pixels[0, :, top : top + size, left : left + size].contiguous().numpy()


class _FileReader:
    """Frames of a video file through PyAV."""

    def __init__(self, path: str | Path, how: Preprocess) -> None:
        self.path = os.fspath(path)
        self.keep_damaged = how.keep_damaged
        self.fps: float | None = None

    def frames(self) -> Iterator[np.ndarray]:
        """Yields uint8 (h w 3), upright, at an even rate. Raises VideoError."""
        av.logging.set_level(av.logging.WARNING)
        av.logging.set_skip_repeated(False)
        with av.logging.Capture() as log:
            try:
                self._check_size()
                yield from self._frames(log)
            except (av.error.FFmpegError, ValueError, OverflowError) as error:
                raise VideoError(f"cannot be decoded: {_line(log, error)}", error) from None
            except OSError as error:
                raise VideoError(f"cannot be read: {error.strerror or error}", error) from None

    def _check_size(self) -> None:
        """An empty file, or an AVI shorter than its header says: libav would play what is there."""
        size = os.path.getsize(self.path)
        if not size:
            raise VideoError("empty file")
        with open(self.path, "rb") as file:
            magic, promised = struct.unpack("<4sI", file.read(8).ljust(8, b"\0"))
        if magic == b"RIFF" and promised + 8 > size and not self.keep_damaged:
            raise VideoError(f"truncated: {size} of {promised + 8} bytes")

    def _frames(self, log: list[tuple[int, str, str]]) -> Iterator[np.ndarray]:
        times, promised = self._scan()
        step = even_step(times)
        if times:
            seconds = float(np.median(np.diff(times))) if len(times) > 1 else 0.0
            self.fps = round(1 / seconds, 6) if seconds > 0 else self.fps
        if step and (times[-1] - times[0]) / step > MAX_STRETCH * len(times):
            raise VideoError(f"time stamps make no sense: {len(times)} frames in {times[-1] - times[0]:.0f} s")
        held: np.ndarray | None = None  # the newest picture, on an uneven video
        tick = 0  # of the even grid
        pictures = 0
        with self._open() as container:
            for frame in self._decode(container):
                self._check(log, corrupt=frame.is_corrupt)
                pictures += 2 if frame.interlaced_frame else 1  # each field may have come in a packet of its own
                picture = _upright(frame)
                if step is None or frame.pts is None or frame.time_base is None:
                    yield picture
                    continue
                now = float(frame.pts * frame.time_base)
                while held is not None and times[0] + tick * step < now - step / 2:
                    yield held
                    tick += 1
                held = picture
        if held is not None:
            yield held
        self._check(log, corrupt=False)
        if pictures < promised and not self.keep_damaged:
            raise VideoError(f"damaged: {pictures} of {promised} pictures can be decoded")

    def _decode(self, container: av.container.InputContainer) -> Iterator[av.VideoFrame]:
        for packet in container.demux(container.streams.video[0]):
            try:
                yield from packet.decode()
            except av.error.InvalidDataError:
                if not self.keep_damaged:
                    raise

    def _check(self, log: list[tuple[int, str, str]], corrupt: bool) -> None:
        """Raises VideoError if something in the log, or the frame's flag, tells of damage; empties the log."""
        bad = [line for line in log if line[0] <= av.logging.ERROR or _DAMAGE.search(line[2])]
        if (bad or corrupt) and not self.keep_damaged:
            raise VideoError(f"damaged: {_line(bad, None)}")
        log.clear()

    def _open(self) -> av.container.InputContainer:
        container = av.open(self.path)
        if not container.streams.video:
            container.close()
            raise VideoError("no video stream in it")
        stream = container.streams.video[0]
        if stream.codec_context is None:
            container.close()
            raise VideoError("its codec has no decoder here")
        stream.codec_context.thread_count = 1  # errors are logged by the thread that asks; workers run side by side
        stream.codec_context.options = {"max_pixels": str(MAX_PIXELS)}
        return container

    def _scan(self) -> tuple[list[float], int]:
        """Times of all frames in seconds, sorted, empty if they have none; and their number. Decodes nothing."""
        with self._open() as container:
            stream = container.streams.video[0]
            rate = stream.average_rate or stream.guessed_rate
            self.fps = float(rate) if rate and 0 < rate <= 1000 else None
            times: list[float | None] = []
            for packet in container.demux(stream):
                if packet.size and not packet.is_discard and _is_shown(packet, stream.codec_context.name):
                    times.append(None if packet.pts is None else float(packet.pts * packet.time_base))
        known = sorted(time for time in times if time is not None)
        return known if len(known) == len(times) else [], len(times)


def even_step(times: list[float]) -> float | None:
    """Step of the even grid for frames at `times` (seconds), or None where they are even already.

    A frame may be early or late by half the median gap: millisecond time bases and jitter stay untouched, a
    dropped frame or a changed rate does not.
    """
    if len(times) < 3:
        return None
    gaps = np.diff(times)
    median = float(np.median(gaps))
    if median <= 0 or np.abs(gaps - median).max() <= 0.5 * median:
        return None
    return median


def _is_shown(packet: av.Packet, codec: str) -> bool:
    """VP8 has packets that are only for reference (the bit is `show_frame` of RFC 6386, 9.1)."""
    return codec != "vp8" or bool(memoryview(packet)[0] >> 4 & 1)


def _upright(frame: av.VideoFrame) -> np.ndarray:
    """RGB picture of a frame, turned as its rotation metadata says."""
    picture = frame.to_ndarray(format="rgb24", threads=1)
    turns = round(frame.rotation / 90) % 4  # counter-clockwise quarters
    return np.rot90(picture, turns) if turns else picture


def _line(log: list[tuple[int, str, str]], error: Exception | None) -> str:
    """The first line that libav logged, else the error, else a word for a frame it flagged."""
    if log:
        return f"{log[0][1]}: {' '.join(log[0][2].split())}"
    return " ".join(str(getattr(error, "strerror", None) or error or "a frame is flagged as corrupt").split())


class _FolderReader:
    """Frames of a folder of images through Pillow."""

    fps: float | None = None

    def __init__(self, path: str | Path, how: Preprocess) -> None:
        self.path = path
        self.order = how.frame_order

    def frames(self) -> Iterator[np.ndarray]:
        """Yields uint8 (h w 3) in order. Raises VideoError, naming the image."""
        for file in frame_files(self.path, self.order):
            try:
                with warnings.catch_warnings():
                    warnings.simplefilter("error", Image.DecompressionBombWarning)
                    with Image.open(file) as image:
                        if image.format == "PNG":
                            image.verify()  # its checksums; loading the pixels does not look at all of them
                    with Image.open(file) as image:
                        yield _rgb(ImageOps.exif_transpose(image))
            except (OSError, ValueError, SyntaxError, Image.DecompressionBombError, UserWarning) as error:
                reason = "not an image" if isinstance(error, UnidentifiedImageError) else str(error)
                raise VideoError(f"{os.path.basename(file)!a} cannot be decoded: {reason}", error) from None


def _rgb(image: Image.Image) -> np.ndarray:
    """uint8 (h w 3) of an image; 16-bit grey is scaled, where Pillow would clip it."""
    if image.mode.startswith("I"):
        grey = (np.asarray(image).astype(np.int64) >> 8).clip(0, 255).astype(np.uint8)
        return np.repeat(grey[..., None], 3, axis=2)
    return np.asarray(image.convert("RGB"))


def frame_files(folder: str | Path, order: str) -> list[str]:
    """Paths of the images in a folder, in the order of time.

    Raises:
        VideoError: the folder cannot be read, or a name has no number after its last underscore.
    """
    try:
        names = [name for name in os.listdir(folder) if os.path.splitext(name)[1].lower() in IMAGE_SUFFIXES]
    except OSError as error:
        raise VideoError(f"folder cannot be read: {error.strerror}", error) from None
    names = [name for name in names if not name.startswith(".")]
    key = _after_underscore if order == "underscore" else _natural
    return [os.path.join(os.fspath(folder), name) for name in sorted(names, key=key)]


def _after_underscore(name: str) -> tuple[int, str]:
    number = os.path.splitext(name)[0].rpartition("_")[2]
    if not (number.isascii() and number.isdigit()):
        raise VideoError(f"{name!a}: no frame number after the last underscore")
    return int(number), name


def _natural(name: str) -> tuple[list[tuple[int, str]], str]:
    parts = re.findall(r"[0-9]+|[^0-9]+", name)
    return [(int(part), "") if part[0] in "0123456789" else (-1, part) for part in parts], name
