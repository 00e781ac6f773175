"""Video files through libav: which track is read, what it promises, and its frames as a player shows them.

What a decoder would hide is brought up: libav conceals corrupt frames and continues, so every error-level line it logs,
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
from fractions import Fraction
from typing import Any, cast

import av
import av.logging
import numpy as np
from av.sidedata.sidedata import Type
from av.video.stream import VideoStream

from fvdm.media.preprocess import MAX_PIXELS, Frame, VideoError
from fvdm.media.timing import NONSENSE, Grid, Timing, measure

_CORRUPT = re.compile("misdetection|corrupt|truncated|partial")  # in warnings of libav
_CUT = "mmco: unref short failure"  # H.264 after a cut: a frame that may be forgotten was never there
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
        leading: times of the frames that come after the first keyframe and are shown before it; None if unknown.
        unit: seconds to which times are rounded.
        stated: frames per second that the file states, the most trusted first.
    """

    times: list[float]
    decode_times: bool
    count: int
    empty: list[float]
    leading: list[float | None]
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
    """The track that libav and players choose: the default one, else the best; never a cover image or a thumbnail.

    Raises:
        VideoError: if there is none.
    """
    tracks = [stream for stream in container.streams.video if not stream.disposition & _COVER]
    tracks = [track for track in tracks if track.frames != 1] or tracks  # a cover may lack its mark
    if not tracks:
        covers = ", only a cover image" if container.streams.video else ""
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
        lead = _Lead(codec)
        leading: list[float | None] = []
        stamps: list[tuple[float | None, float | None]] = []
        small: list[int] = []
        for packet in container.demux(stream):
            if packet.size and not packet.is_discard and _is_shown(packet, codec):
                if packet.size <= (NOT_CODED if codec == "mpeg4" else 1):
                    small.append(len(stamps))
                stamps.append((_seconds(packet.pts, packet.time_base), _seconds(packet.dts, packet.time_base)))
                if lead.holds(packet):
                    leading.append(stamps[-1][0])
    by = next((k for k in (0, 1) if all(row[k] is not None for row in stamps)), None)
    times = [] if by is None else [row[by] or 0.0 for row in stamps]
    return Packets(
        times=sorted(times),
        decode_times=by == 1,
        count=len(stamps),
        empty=sorted(times[k] for k in small) if times else [],
        leading=leading,
        unit=unit,
        stated=stated,
    )


def _seconds(stamp: int | None, base: Fraction | None) -> float | None:
    return None if stamp is None or base is None else float(stamp * base)


def _is_shown(packet: av.Packet, codec: str) -> bool:
    """VP8 has packets that are only for reference (the bit is `show_frame` of RFC 6386, 9.1)."""
    return codec != "vp8" or bool(memoryview(packet)[0] >> 4 & 1)


class _Lead:
    """Follows the packets of a track, and knows which are shown before the first keyframe though they come after it.

    In MPEG-1 and 2 these are all frames without reordering that follow it directly, whatever a cut made of their times.
    """

    def __init__(self, codec: str) -> None:
        self.mpeg2 = codec in ("mpeg1video", "mpeg2video")
        self.key: av.Packet | None = None
        self.over = False

    def holds(self, packet: av.Packet) -> bool:
        """Whether this next packet is one of them."""
        if self.key is None:
            self.key, self.over = packet, not packet.is_keyframe or packet.pts is None
            return False
        self.over = self.over or not (packet.pts is None or self._precedes(packet, self.key))
        return not self.over

    def _precedes(self, packet: av.Packet, key: av.Packet) -> bool:
        assert packet.pts is not None
        assert key.pts is not None
        return packet.pts < key.pts or (self.mpeg2 and key.pts != key.dts and packet.pts == packet.dts)


class VideoFile:
    """A video file, read once from the beginning.

    Attributes:
        fps: frames per second; None if unknown. Known once the first frame came.
        notes: what was done to the video, a sentence each; complete once the last frame came.
    """

    def __init__(self, path: str | os.PathLike[str], *, keep_corrupt: bool) -> None:
        """Opens nothing; `keep_corrupt` takes what can be decoded of a corrupt file."""
        self.path = os.fspath(path)
        self.keep_corrupt = keep_corrupt
        self.fps: float | None = None
        self.notes: list[str] = []
        self._decoded = self._repeats = 0
        self._excused: list[str] = []

    def frames(self) -> Iterator[Frame]:
        """Yields the frames, upright, at an even rate.

        Raises:
            VideoError: with the reason, at any point.
        """
        av.logging.set_level(av.logging.WARNING)
        av.logging.set_skip_repeated(False)
        with av.logging.Capture() as log:
            try:
                self._check_size()
                yield from self._even_frames(log)
            except (av.error.FFmpegError, ValueError, OverflowError) as error:
                raise VideoError(f"cannot be decoded: {_line(log, error)}", error, corrupt=True) from None
            except OSError as error:
                raise VideoError(f"cannot be read: {error.strerror or error}", error) from None

    def _check_size(self) -> None:
        """An empty file, or an AVI shorter than its header says: libav would play what is there."""
        size = os.path.getsize(self.path)
        if not size:
            raise VideoError("empty file")
        with open(self.path, "rb") as file:
            magic, promised = struct.unpack("<4sI", file.read(8).ljust(8, b"\0"))
        if magic == b"RIFF" and promised + 8 > size and not self.keep_corrupt:
            raise VideoError(f"truncated: {size} of {promised + 8} bytes", corrupt=True)

    def _even_frames(self, log: Log) -> Iterator[Frame]:
        packets = packets_of(self.path)
        timing = packets.timing()
        self.fps = timing.fps
        if timing.stretch > NONSENSE and not self.keep_corrupt:
            seconds = packets.times[-1] - packets.times[0]
            reason = f"time stamps make no sense: {len(packets.times)} frames in {seconds:.0f} s"
            raise VideoError(reason, corrupt=True)
        self.notes += timing.notes
        yield from Grid(timing, packets.empty).even(self._decoded_frames(packets, log))
        empty = len(packets.empty) - self._repeats
        leading = min(len(self._leading), packets.count - self._decoded - empty)
        if leading > 0:
            self.notes.append(
                f"{leading} leading frame{'s' if leading > 1 else ''} of an open GOP left out: what they "
                "refer to was cut off, and no player shows them"
            )
        elif self._excused and not self.keep_corrupt:
            raise VideoError(f"corrupt: {self._excused[0]}", corrupt=True)
        missing = packets.count - self._decoded - empty - max(0, leading)
        if missing > 0 and not self.keep_corrupt:
            reason = f"corrupt: {packets.count - missing} of {packets.count} frames can be decoded"
            raise VideoError(reason, corrupt=True)

    def _decoded_frames(self, packets: Packets, log: Log) -> Iterator[tuple[float | None, Frame]]:
        """Frames with their times; counts what was decoded."""
        self._leading = list(packets.leading)
        with open_video(self.path) as (container, stream):
            self._say_which_track(container, stream)
            aspect = float(stream.sample_aspect_ratio or 1)
            rotation: int | None = None
            orientation: Orientation = (1, 0, 0, 1)
            for frame in self._decode(container, stream, log):
                self._decoded += 2 if frame.interlaced_frame else 1  # each field may have come in a packet of its own
                time = _seconds(frame.dts if packets.decode_times else frame.pts, frame.time_base)
                if time is not None and packets.times:
                    place = bisect_left(packets.empty, time - 1e-9)
                    self._repeats += place < len(packets.empty) and packets.empty[place] < time + 1e-9
                if time in self._leading:
                    self._leading.remove(time)
                if frame.rotation != rotation:
                    rotation, orientation = frame.rotation, orientation_of(frame)
                yield time if packets.times else None, upright(frame, orientation, aspect)

    def _say_which_track(self, container: av.container.InputContainer, stream: VideoStream) -> None:
        others = [s for s in container.streams.video if s.index != stream.index and not s.disposition & _COVER]
        if others:
            self.notes.append(f"track {stream.index} of {stream.width} x {stream.height} is read, the one players show")

    def _decode(self, container: av.container.InputContainer, stream: VideoStream, log: Log) -> Iterator[av.VideoFrame]:
        """All frames until something reports corruption. What is logged of leading frames is excused until the end."""
        lead, keys = _Lead(stream.codec_context.name), 0
        for packet in container.demux(stream):
            keys += packet.is_keyframe
            leading = bool(packet.size) and lead.holds(packet)
            try:
                frames = packet.decode()
            except av.error.InvalidDataError:
                if not (self.keep_corrupt or leading):
                    raise
                frames = []
            bad = [line for line in log if line[0] <= av.logging.ERROR or _CORRUPT.search(line[2])]
            if keys <= 1:
                bad = [line for line in bad if line[2].strip() != _CUT]
            log.clear()
            if leading:
                self._excused += [_line(bad, None)] if bad else []
            elif not self.keep_corrupt and (bad or any(frame.is_corrupt for frame in frames)):
                raise VideoError(f"corrupt: {_line(bad, None)}", corrupt=True)
            yield from frames


Orientation = tuple[int, int, int, int]
"""a, b, c, d of a frame's `displaymatrix`: a pixel (x, y) is shown at x' = a x + c y, y' = b x + d y."""


def orientation_of(frame: av.VideoFrame) -> Orientation:
    """How to turn a frame. Call it seldom: PyAV keeps a frame whose side data were read until the next garbage
    collection, 3 MB each at 1080p."""
    transform: Any = next((data for data in cast(Any, frame.side_data) if data.type == Type.DISPLAYMATRIX), None)
    if transform is None:
        return 1, 0, 0, 1
    a, b, _, c, d = np.frombuffer(bytes(transform)[:20], np.int32).tolist()
    return a, b, c, d


def upright(frame: av.VideoFrame, orientation: Orientation, aspect: float = 1.0) -> Frame:
    """A frame in one of the eight rotations and reflections; any other orientation counts as the nearest of them.

    Args:
        frame: the decoded frame.
        orientation: how to turn it.
        aspect: width of a pixel over its height, as it is stored.
    """
    pixels = frame.to_ndarray(format="rgb24", threads=1)
    height, width = pixels.shape[:2]
    side = max(1, round(width * aspect)), height
    a, b, c, d = orientation
    if abs(b) + abs(c) > abs(a) + abs(d):
        pixels, side = pixels.transpose(1, 0, 2), side[::-1]
        a, d = c, b
    return Frame(pixels[:: -1 if d < 0 else 1, :: -1 if a < 0 else 1], side)


def _line(log: Log, error: Exception | None) -> str:
    """The first line that libav logged, else the error, else a word for a frame it flagged."""
    if log:
        return f"{log[0][1]}: {' '.join(log[0][2].split())}"
    return " ".join(str(getattr(error, "strerror", None) or error or "a frame is flagged as corrupt").split())
