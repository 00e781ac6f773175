"""Video files as players show them: orientation, track, shape of pixels, repeats, and cuts at an open GOP."""

import struct
import subprocess
import sys
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest

from fvdm.generation.inputs import read_source
from fvdm.media.containers import orientation_of, packets_of, upright
from fvdm.media.videos import Info, Preprocess, VideoError, codec_of, count_frames, read_video, to_square
from tests.data_fixtures import cut, write_video

ONE = Preprocess(min_frames=1)
ONE_SIXTEENTH = 1 << 16
MATRICES = {  # a, b, c, d of the display matrix: x' = a x + c y, y' = b x + d y
    "upright": ((1, 0, 0, 1), lambda x: x),
    "hflip": ((-1, 0, 0, 1), lambda x: x[:, :, ::-1]),
    "vflip": ((1, 0, 0, -1), lambda x: x[:, ::-1]),
    "180": ((-1, 0, 0, -1), lambda x: x[:, ::-1, ::-1]),
    "transpose": ((0, 1, 1, 0), lambda x: x.transpose(0, 2, 1, 3)),
    "transverse": ((0, -1, -1, 0), lambda x: x.transpose(0, 2, 1, 3)[:, ::-1, ::-1]),
    "90 clockwise": ((0, 1, -1, 0), lambda x: np.rot90(x, -1, (1, 2))),
    "90 counter-clockwise": ((0, -1, 1, 0), lambda x: np.rot90(x, 1, (1, 2))),
}


def read(path, size=144, preprocess=ONE):
    *parts, info = read_video(path, size, preprocess, 7)
    assert isinstance(info, Info)
    frames = np.concatenate(parts)
    assert len(frames) == info.frames == count_frames(path)
    return frames, info


def turn(path: Path, matrix: tuple[int, ...]) -> Path:
    """Writes a display matrix into the header of an mp4 file."""
    data = bytearray(path.read_bytes())
    at = data.index(b"tkhd") + 4 + 40  # version 0: the display matrix begins 40 bytes into the box
    a, b, c, d = (value * ONE_SIXTEENTH for value in matrix)
    data[at : at + 36] = struct.pack(">9i", a, b, 0, c, d, 0, 0, 0, 1 << 30)
    path.write_bytes(data)
    return path


@pytest.mark.parametrize("name", MATRICES)
def test_all_eight_display_matrices(tmp_path, name):
    matrix, transform = MATRICES[name]
    plain = write_video(tmp_path / "plain.mp4", cut(0))
    with av.open(str(plain)) as container:
        decoded = np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])
    path = turn(write_video(tmp_path / "a.mp4", cut(0)), matrix)
    frames, info = read(path)
    assert np.array_equal(frames, [to_square(frame, 144, ONE) for frame in transform(decoded)])
    assert np.array_equal(frames, read(plain)[0]) == (name == "upright")
    assert info.side == ((144, 176) if "90" in name or "trans" in name else (176, 144))
    assert read_source(str(path), 144).side == info.side


@pytest.mark.parametrize("angle", [3, 44, 89, 271])
def test_an_oblique_matrix_counts_as_the_nearest(tmp_path, angle):
    c, s = np.cos(np.radians(angle)), np.sin(np.radians(angle))
    path = write_video(tmp_path / "a.mp4", cut(0))
    data = bytearray(path.read_bytes())
    at = data.index(b"tkhd") + 44
    a, b, c, d = (round(value * ONE_SIXTEENTH) for value in (c, s, -s, c))
    data[at : at + 36] = struct.pack(">9i", a, b, 0, c, d, 0, 0, 0, 1 << 30)
    path.write_bytes(data)
    assert read(path)[1].side == ((176, 144) if angle < 45 else (144, 176))


def write_aspect(path: Path, frames: np.ndarray, codec: str, aspect: Fraction) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=25)
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = "yuv420p"
        stream.codec_context.sample_aspect_ratio = aspect
        for pixels in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(pixels), format="rgb24")))
        container.mux(stream.encode())
    return path


@pytest.mark.parametrize(("suffix", "codec"), [("mp4", "libx264"), ("mkv", "libx264"), ("avi", "mpeg4")])
@pytest.mark.parametrize("aspect", [Fraction(2), Fraction(1, 2), Fraction(64, 45), Fraction(12, 11), Fraction(1)])
@pytest.mark.parametrize("resize", ["shorter-side", "centre-square"])
def test_a_circle_is_round_whatever_the_shape_of_pixels(tmp_path, suffix, codec, aspect, resize):
    height, width = 144, round(144 * 1.2 / aspect / 2) * 2
    y, x = np.mgrid[:height, :width]
    disc = ((x - width / 2) * float(aspect)) ** 2 + (y - height / 2) ** 2 < 50**2
    frames = np.repeat((disc * 255).astype(np.uint8)[None, ..., None], 3, axis=3).repeat(8, axis=0)
    path = write_aspect(tmp_path / f"a.{suffix}", frames, codec, aspect)
    got, info = read(path, 96, Preprocess(min_frames=1, resize=resize))
    assert info.side == (round(width * aspect), height)
    white = got[0, 0] > 127
    wide, high = white.any(0).sum(), white.any(1).sum()
    assert wide == pytest.approx(high, abs=2)
    assert high == pytest.approx(96 * 100 / min(height, width * float(aspect)), abs=3)


def test_the_shape_of_pixels_turns_with_the_frame(tmp_path):
    path = write_aspect(tmp_path / "a.mp4", cut(0), "libx264", Fraction(2))
    assert read(turn(path, (0, 1, -1, 0)))[1].side == (144, 352)


def two_tracks(path: Path, dispositions, sizes=((48, 64), (144, 176)), lengths=(24, 24), codec="libx264") -> Path:
    with av.open(str(path), "w") as container:
        streams = []
        for (height, width), disposition in zip(sizes, dispositions, strict=True):
            stream = container.add_stream(codec, rate=25)
            stream.height, stream.width, stream.pix_fmt = height, width, "yuv420p"
            stream.disposition = disposition
            streams.append(stream)
        for number in range(max(lengths)):
            for stream, length in zip(streams, lengths, strict=True):
                if number < length:
                    pixels = np.full((stream.height, stream.width, 3), min(stream.width, 255), np.uint8)
                    container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        for stream in streams:
            container.mux(stream.encode())
    return path


DEFAULT = av.stream.Disposition.default
NONE = av.stream.Disposition(0)
IMPAIRED = av.stream.Disposition.visual_impaired


@pytest.mark.parametrize("suffix", ["mkv", "mp4"])
@pytest.mark.parametrize(
    ("dispositions", "width"), [((NONE, DEFAULT), 176), ((DEFAULT, NONE), 64), ((IMPAIRED, DEFAULT), 176)]
)
def test_the_default_track_is_read_and_said(tmp_path, suffix, dispositions, width):
    path = two_tracks(tmp_path / f"a.{suffix}", dispositions)
    frames, info = read(path, 48)
    assert info.side[0] == width
    assert abs(int(frames[0, 0, 0, 0]) - width) < 4
    assert f"of {width} x " in info.notes[0]
    assert f"of {width} x " in str(read_source(str(path), 48))


def test_a_cover_that_lacks_its_mark_is_not_the_video(tmp_path):
    path = two_tracks(tmp_path / "a.mp4", (DEFAULT, NONE), ((300, 300), (144, 176)), (1, 24))
    assert read(path)[1].side == (176, 144)
    assert codec_of(path) == "h264"


def test_audio_with_a_cover_is_no_video(tmp_path):
    with av.open(str(tmp_path / "a.m4a"), "w", format="mp4") as container:
        cover = container.add_stream("mjpeg", rate=1)
        cover.height, cover.width, cover.pix_fmt = 64, 64, "yuvj420p"
        cover.disposition = av.stream.Disposition.attached_pic
        container.mux(cover.encode(av.VideoFrame.from_ndarray(cut(0)[0][:64, :64].copy(), format="rgb24")))
        container.mux(cover.encode())
    with pytest.raises(VideoError, match="no video stream in it, only a cover image"):
        list(read_video(tmp_path / "a.m4a", 64, ONE, 8))


def not_coded(path: Path, source: Path, places: set[int]) -> Path:
    """Replaces packets of an MPEG-4 video by "the same again": a VOP whose vop_coded is 0."""
    with av.open(str(source)) as old, av.open(str(path), "w") as new:
        stream = new.add_stream_from_template(old.streams.video[0])
        for number, packet in enumerate(p for p in old.demux(old.streams.video[0]) if p.size):
            if number in places:
                data = bytes(packet)
                at = data.index(b"\0\0\1\xb6") + 4
                bits = "".join(f"{byte:08b}" for byte in data[at : at + 12])
                end = bits.index("0", 2) + 2 + 5  # modulo time, marker, and 5 bits of time at 25 frames per second
                bits = "01" + bits[2:end] + "10"
                bits += "0" + "1" * (-(len(bits) + 1) % 8)
                empty = av.Packet(b"\0\0\1\xb6" + int(bits, 2).to_bytes(len(bits) // 8, "big"))
                empty.pts, empty.dts, empty.time_base = packet.pts, packet.dts, packet.time_base
                packet = empty
            packet.stream = stream
            new.mux(packet)
    return path


@pytest.mark.parametrize("suffix", ["avi", "mp4", "mkv"])
@pytest.mark.parametrize("places", [{5}, {7, 8, 12}, {10, 19}])
def test_frames_that_say_the_same_again_are_repeated(tmp_path, suffix, places):
    plain = np.stack([np.full((48, 64, 3), 12 * k, np.uint8) for k in range(20)])
    source = write_video(tmp_path / f"a.{suffix}", plain, "mpeg4", g="100")
    frames, info = read(not_coded(tmp_path / f"b.{suffix}", source, places), 48)
    assert info.frames == 20
    shown = np.rint(frames[:, 0].mean((1, 2)) / 12).astype(int).tolist()
    assert shown == [max(j for j in range(k + 1) if j not in places) for k in range(20)]


def open_gop(folder: Path, suffix: str, codec: str) -> Path:
    frames = np.stack([np.roll(cut(0)[0], 4 * k, axis=1) for k in range(60)])
    private = {"x264-params": "open-gop=1:keyint=12:min-keyint=12:bframes=3:scenecut=0:b-adapt=0"}
    options = {"g": "12", "bf": "2"} if codec == "mpeg2video" else private
    return write_video(folder / f"whole.{suffix}", frames, codec, **options)


def cut_at_second_key(path: Path, source: Path) -> Path:
    """A lossless cut: all packets from the second keyframe on."""
    with av.open(str(source)) as old, av.open(str(path), "w") as new:
        stream = new.add_stream_from_template(old.streams.video[0])
        keys = 0
        for packet in old.demux(old.streams.video[0]):
            keys += packet.is_keyframe
            if packet.size and keys > 1:
                packet.stream = stream
                new.mux(packet)
    return path


@pytest.mark.parametrize(
    ("suffix", "codec"), [("mpg", "mpeg2video"), ("ts", "mpeg2video"), ("ts", "libx264"), ("mkv", "libx264")]
)
def test_a_cut_at_an_open_gop_gives_what_players_show(tmp_path, suffix, codec):
    source = open_gop(tmp_path, suffix, codec)
    assert not read(source)[1].notes
    path = cut_at_second_key(tmp_path / f"cut.{suffix}", source)
    with av.open(str(path)) as container:
        shown = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    frames, info = read(path)
    assert len(frames) == len(shown) < packets_of(path).count
    assert np.array_equal(frames, [to_square(frame, 144, ONE) for frame in shown])
    assert "leading frame" in info.notes[0]
    assert "leading frame" in str(read_source(str(path), 144))


def test_a_frame_missing_elsewhere_is_still_corruption(tmp_path):
    """The leading frames of a cut excuse nothing behind them."""
    path = cut_at_second_key(tmp_path / "cut.ts", open_gop(tmp_path, "ts", "mpeg2video"))
    data = bytearray(path.read_bytes())
    data[len(data) // 2 : len(data) // 2 + 2000] = bytes(2000)
    path.write_bytes(data)
    with pytest.raises(VideoError, match="corrupt"):
        read(path)


def test_what_can_be_decoded_of_a_corrupt_given_video_is_taken_and_said(tmp_path):
    path = write_video(tmp_path / "a.avi", cut(0), "mpeg4")
    path.write_bytes(path.read_bytes()[:-3000])
    with pytest.raises(VideoError, match="truncated"):
        read(path)
    assert "only what can be decoded is taken (truncated" in str(read_source(str(path), 64))


def test_upright_without_an_orientation_is_the_frame(tmp_path):
    with av.open(str(write_video(tmp_path / "a.mp4", cut(0)))) as container:
        frame = next(container.decode(video=0))
    assert orientation_of(frame) == (1, 0, 0, 1)
    assert np.array_equal(upright(frame, (1, 0, 0, 1)).pixels, frame.to_ndarray(format="rgb24"))
    assert upright(frame, (1, 0, 0, 1), 2.0).side == (352, 144)


MEMORY = """
import sys
from benchmarks.process_memory import peak
from fvdm.media.videos import Preprocess, read_video
for part in read_video(sys.argv[1], 16, Preprocess(), 4):
    pass
print(round(peak() / 2**20))
"""


@pytest.mark.parametrize("orientation", [None, (0, 1, -1, 0)])
def test_decoded_frames_are_freed_at_once(tmp_path, orientation):
    """60 frames of 1280 x 720 are 83 MB when decoded, 166 MB as RGB."""
    peaks = []
    for length in (20, 80):
        frames = np.broadcast_to(cut(0)[:1].repeat(5, 1).repeat(8, 2)[:, :720, :1280], (length, 720, 1280, 3))
        path = write_video(tmp_path / f"{length}.mp4", frames, preset="ultrafast")
        if orientation:
            turn(path, orientation)
        words = [sys.executable, "-c", MEMORY, str(path)]
        peaks.append(int(subprocess.run(words, capture_output=True, text=True, check=True).stdout))
    assert peaks[1] - peaks[0] < 40, f"peak memory in MB: {peaks}"
