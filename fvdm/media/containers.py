"""Video files through libav: which track is read, what it promises, and its frames as a player shows them.

What a decoder would hide is brought up: libav conceals corrupt frames and goes on, so every error-level line it logs,
every frame it flags as corrupt, and every index that promises more frames than there are, rejects the video with that
line as its reason.
"""

import os
import re
import struct
from bisect import bisect_left
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import av
import av.logging
import numpy as np
from av.sidedata.sidedata import Type
from av.video.stream import VideoStream

from fvdm.media.preprocess import MAX_PIXELS, Picture, VideoError
from fvdm.media.timing import NONSENSE, Grid, Timing, measure

_DAMAGE = re.compile("misdetection|corrupt|truncated|partial")  # in warnings of libav
NOT_CODED = 16  # bytes: an MPEG-4 packet of at most so many may say "the same frame again"
_COVER = av.stream.Disposition.attached_pic | av.stream.Disposition.timed_thumbnails
_IMPAIRED = av.stream.Disposition.hearing_impaired | av.stream.Disposition.visual_impaired

Log = list[tuple[int, str, str]]


@dataclass(frozen=True)
class Packets:
    """What the packets of a track promise, without decoding.

    Attributes:
        times: of all frames in seconds, sorted; empty if they have none.
        decode_times: whether `times` are those of decoding, as some AVI files have no others.
        count: number of packets that hold a frame.
        empty: times, sorted, of packets so small that they may say "the same frame again".
        key: time of the first keyframe; None if there is none.
        unit: seconds to which times are rounded.
        stated: frames per second that the file states, the most trusted first.
    """

    times: list[float]
    decode_times: bool
    count: int
    empty: list[float]
    key: float | None
    unit: float
    stated: list[float]

    def timing(self) -> Timing:
        """The frame rate and the even grid."""
        return measure(self.times, self.unit, self.stated)


@contextmanager
def open_video(path: str | os.PathLike[str]) -> Iterator[tuple[av.container.InputContainer, VideoStream]]:
    """A video file and the track that players show.

    Raises:
        VideoError: if it has no video track, or no decoder is there for it.
        av.error.FFmpegError: if it cannot be opened.
    """
    with av.open(os.fspath(path)) as container:
        stream = main_track(container)
        if stream.codec_context is None:
            raise VideoError("its codec has no decoder here")
        stream.codec_context.thread_count = 1  # errors are logged by the thread that asks; workers run side by side
        stream.codec_context.options = {"max_pixels": str(MAX_PIXELS)}
        yield container, stream


def main_track(container: av.container.InputContainer) -> VideoStream:
    """The track that libav and players choose: the default one, else the best; never a cover picture or a thumbnail.

    Raises:
        VideoError: if there is none.
    """
    tracks = [stream for stream in container.streams.video if not stream.disposition & _COVER]
    if not tracks:
        covers = ", only a cover picture" if container.streams.video else ""
        raise VideoError(f"no video stream in it{covers}")
    best = container.streams.best("video")
    if best is not None and best.index in [track.index for track in tracks]:
        return next(track for track in tracks if track.index == best.index)
    return max(tracks, key=_preference)


def _preference(track: VideoStream) -> tuple[int, int, int]:
    default = int(bool(track.disposition & av.stream.Disposition.default))
    return default + int(not track.disposition & _IMPAIRED), min(track.frames, 5), track.width * track.height


def packets_of(path: str | os.PathLike[str]) -> Packets:
    """Reads all packets of a video; decodes nothing.

    Raises:
        VideoError, av.error.FFmpegError: as `open_video`.
    """
    with open_video(path) as (container, stream):
        codec = stream.codec_context.name
        stated = [float(rate) for rate in (stream.base_rate, stream.average_rate, stream.guessed_rate) if rate]
        unit = float(stream.time_base or 0)
        shown: list[tuple[float | None, float | None, bool, bool]] = []
        for packet in container.demux(stream):
            if packet.size and not packet.is_discard and _is_shown(packet, codec):
                small = packet.size <= (NOT_CODED if codec == "mpeg4" else 1)
                pts, dts = (None if t is None else float(t * packet.time_base) for t in (packet.pts, packet.dts))
                shown.append((pts, dts, small, packet.is_keyframe))
    by = next((k for k in (0, 1) if all(row[k] is not None for row in shown)), None)
    rows = [] if by is None else [(row[by] or 0.0, row[2], row[3]) for row in shown]
    keys = [time for time, _, key in rows if key]
    return Packets(
        times=sorted(time for time, _, _ in rows),
        decode_times=by == 1,
        count=len(shown),
        empty=sorted(time for time, small, _ in rows if small),
        key=keys[0] if keys and by == 0 else None,
        unit=unit,
        stated=stated,
    )


def _is_shown(packet: av.Packet, codec: str) -> bool:
    """VP8 has packets that are only for reference (the bit is `show_frame` of RFC 6386, 9.1)."""
    return codec != "vp8" or bool(memoryview(packet)[0] >> 4 & 1)


class VideoFile:
    """A video file, read once from the beginning.

    Attributes:
        fps: frames per second; None if unknown. Known once the first frame came.
        notes: what was done to the video, a sentence each; complete once the last frame came.
    """

    def __init__(self, path: str | os.PathLike[str], *, keep_damaged: bool) -> None:
        """Opens nothing; `keep_damaged` takes what can be decoded of a corrupt file."""
        self.path = os.fspath(path)
        self.keep_damaged = keep_damaged
        self.fps: float | None = None
        self.notes: list[str] = []
        self._decoded = self._repeats = 0

    def pictures(self) -> Iterator[Picture]:
        """Yields the frames, upright, at an even rate.

        Raises:
            VideoError: with the reason, at any point.
        """
        av.logging.set_level(av.logging.WARNING)
        av.logging.set_skip_repeated(False)
        with av.logging.Capture() as log:
            try:
                self._check_size()
                yield from self._pictures(log)
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

    def _pictures(self, log: Log) -> Iterator[Picture]:
        packets = packets_of(self.path)
        timing = packets.timing()
        self.fps = timing.fps
        if timing.stretch > NONSENSE and not self.keep_damaged:
            seconds = packets.times[-1] - packets.times[0]
            raise VideoError(f"time stamps make no sense: {len(packets.times)} frames in {seconds:.0f} s")
        self.notes += timing.notes
        yield from Grid(timing, packets.empty).even(self._frames(packets, log))
        self._check(log, corrupt=False)
        leading = self._leading(packets)
        if leading:
            self.notes.append(
                f"{leading} leading frame{'s' if leading > 1 else ''} of an open group of pictures left out: what they "
                "refer to was cut off, and no player shows them"
            )
        missing = packets.count - self._decoded - leading - (len(packets.empty) - self._repeats)
        if missing > 0 and not self.keep_damaged:
            raise VideoError(f"damaged: {packets.count - missing} of {packets.count} pictures can be decoded")

    def _frames(self, packets: Packets, log: Log) -> Iterator[tuple[float | None, Picture]]:
        """Frames with their times; counts what was decoded."""
        self._first: float | None = None
        with open_video(self.path) as (container, stream):
            self._say_which_track(container, stream)
            aspect = float(stream.sample_aspect_ratio or 1)
            for frame in self._decode(container, stream):
                self._check(log, corrupt=frame.is_corrupt)
                self._decoded += 2 if frame.interlaced_frame else 1  # each field may have come in a packet of its own
                stamp = frame.dts if packets.decode_times else frame.pts
                time = None
                if packets.times and stamp is not None and frame.time_base is not None:
                    time = float(stamp * frame.time_base)
                    self._first = time if self._first is None else self._first
                    place = bisect_left(packets.empty, time - 1e-9)
                    self._repeats += place < len(packets.empty) and packets.empty[place] < time + 1e-9
                yield time, upright(frame, aspect)

    def _say_which_track(self, container: av.container.InputContainer, stream: VideoStream) -> None:
        others = [s for s in container.streams.video if s.index != stream.index and not s.disposition & _COVER]
        if others:
            self.notes.append(f"track {stream.index} of {stream.width} x {stream.height} is read, the one players show")

    def _decode(self, container: av.container.InputContainer, stream: VideoStream) -> Iterator[av.VideoFrame]:
        for packet in container.demux(stream):
            try:
                yield from packet.decode()
            except av.error.InvalidDataError:
                if not self.keep_damaged:
                    raise

    def _leading(self, packets: Packets) -> int:
        """Frames before the first keyframe, if that is the first frame that is shown: a cut took what they refer to."""
        if packets.key is None or self._first is None or abs(self._first - packets.key) > 1e-9:
            return 0
        return bisect_left(packets.times, packets.key - 1e-9)

    def _check(self, log: Log, *, corrupt: bool) -> None:
        """Raises VideoError if something in the log, or the frame's flag, tells of damage; empties the log."""
        bad = [line for line in log if line[0] <= av.logging.ERROR or _DAMAGE.search(line[2])]
        if (bad or corrupt) and not self.keep_damaged:
            raise VideoError(f"damaged: {_line(bad, None)}")
        log.clear()


def upright(frame: av.VideoFrame, aspect: float = 1.0) -> Picture:
    """A frame as its display matrix says: one of the eight rotations and reflections; others count as the nearest.

    Args:
        frame: the decoded frame.
        aspect: width of a pixel over its height, as it is stored.
    """
    pixels = frame.to_ndarray(format="rgb24", threads=1)
    height, width = pixels.shape[:2]
    side = max(1, round(width * aspect)), height
    matrix: Any = next((data for data in cast(Any, frame.side_data) if data.type == Type.DISPLAYMATRIX), None)
    if matrix is None:
        return Picture(pixels, side)
    a, b, _, c, d = np.frombuffer(bytes(matrix)[:20], np.int32).tolist()  # x' = a x + c y, y' = b x + d y
    if abs(b) + abs(c) > abs(a) + abs(d):
        pixels, side = pixels.transpose(1, 0, 2), side[::-1]
        a, d = c, b
    return Picture(pixels[:: -1 if d < 0 else 1, :: -1 if a < 0 else 1], side)


def _line(log: Log, error: Exception | None) -> str:
    """The first line that libav logged, else the error, else a word for a frame it flagged."""
    if log:
        return f"{log[0][1]}: {' '.join(log[0][2].split())}"
    return " ".join(str(getattr(error, "strerror", None) or error or "a frame is flagged as corrupt").split())
