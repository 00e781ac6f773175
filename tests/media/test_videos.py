import io
import os
import struct

import av
import numpy as np
import pytest
from PIL import Image

from fvdm.media.videos import (
    Info,
    Preprocess,
    VideoError,
    estimate_frames,
    frame_files,
    read_video,
    to_square,
)
from tests.data_fixtures import carried, cut, real_frames, write_frames, write_video

HOW = Preprocess(min_frames=4)


def read(path, size=64, how=HOW, chunk=7):
    *chunks, info = read_video(path, size, how, chunk)
    assert isinstance(info, Info)
    frames = np.concatenate(chunks)
    assert frames.dtype == np.uint8
    assert frames.shape == (info.frames, 3, size, size)
    return frames, info


def psnr(a, b):
    return 10 * np.log10(255**2 / np.square(a.astype(float) - b).mean().clip(1e-9))


def expected(frames, size=64, how=HOW):
    return np.stack([to_square(frame, size, how) for frame in frames])


@pytest.mark.parametrize(
    ("name", "codec", "pix_fmt", "least"),
    [
        ("a.mp4", "libx264", "yuv420p", 30),
        ("a.mov", "mpeg4", "yuv420p", 28),
        ("a.avi", "mpeg4", "yuv420p", 28),
        ("a.mkv", "ffv1", "yuv444p", 38),
        ("a.webm", "libvpx", "yuv420p", 25),
        ("a.gif", "gif", "rgb8", 15),
        ("a.mkv", "libx264", "yuv444p10le", 30),
        ("a.mkv", "ffv1", "gray16le", 10),
        ("a.avi", "rawvideo", "bgr24", 60),
        ("a.mkv", "ffv1", "rgba64le", 60),
        ("a.mpg", "mpeg1video", "yuv420p", 25),
        ("a.ts", "libx264", "yuv420p", 30),
        ("a.nut", "ffv1", "bgra", 60),
        ("a.avi", "mjpeg", "yuvj422p", 30),
    ],
)
def test_containers_and_pixel_formats(tmp_path, name, codec, pix_fmt, least):
    path = write_video(tmp_path / name, cut(0), codec, pix_fmt)
    frames, info = read(path)
    assert info.frames == 20
    assert info.fps == pytest.approx(25, rel=0.01)
    assert psnr(frames, expected(cut(0))) > least


def test_estimates(tmp_path):
    assert estimate_frames(carried("bikes.mp4")) == 250
    assert estimate_frames(write_video(tmp_path / "a.mkv", cut(0))) in (19, 20, 21)
    (tmp_path / "bad.mp4").write_bytes(b"no video")
    assert estimate_frames(tmp_path / "bad.mp4") == 0
    assert estimate_frames(write_frames(tmp_path / "f", cut(0), [f"{i}.png" for i in range(20)])) == 20


@pytest.mark.parametrize(("turns", "display_matrix"), [(1, (0, -1, 1, 0)), (2, (-1, 0, 0, -1)), (3, (0, 1, -1, 0))])
def test_rotated_phone_videos_stand_upright(tmp_path, turns, display_matrix):
    path = write_video(tmp_path / "a.mp4", cut(0))
    data = bytearray(path.read_bytes())
    at = data.index(b"tkhd") + 4 + 40  # version 0: the display matrix begins 40 bytes into the box
    a, b, c, d = (value << 16 for value in display_matrix)
    data[at : at + 36] = struct.pack(">9i", a, b, 0, c, d, 0, 0, 0, 1 << 30)
    path.write_bytes(data)
    with av.open(str(path)) as container:
        assert next(container.decode(video=0)).rotation % 360 == 90 * turns
    frames, _ = read(path)
    assert psnr(frames, expected([np.rot90(frame, turns) for frame in cut(0)])) > 30


def test_variable_frame_rate_becomes_even(tmp_path):
    times = np.concatenate([np.arange(10) * 0.04, 0.4 + np.arange(10) * 0.12])  # 25 then 8.3 frames a second
    frames = np.stack([np.full((48, 64, 3), 10 * i, np.uint8) for i in range(20)])
    path = write_video(tmp_path / "a.mkv", frames, "ffv1", "bgr0", times=list(times))
    got, info = read(path, size=32)
    step = np.median(np.diff(np.round(times, 3)))
    grid = np.arange(0, times[-1] + 1e-3, step)
    shown = (np.round(times, 3)[None] <= grid[:, None] + step / 2 + 1e-9).sum(axis=1) - 1
    assert info.frames == len(grid)
    assert np.array_equal(got[:, 0, 0, 0] // 10, shown)


def test_jitter_and_millisecond_stamps_change_nothing(tmp_path):
    times = [round(i / 30 + 0.004 * (i % 3 - 1), 3) + 0.01 for i in range(20)]
    path = write_video(tmp_path / "a.mkv", cut(0), "ffv1", "bgr0", times=times)
    frames, _ = read(path)
    assert np.array_equal(frames, expected(cut(0)))


def test_nonsense_time_stamps_are_refused(tmp_path):
    path = write_video(tmp_path / "a.mkv", cut(0), times=[*np.arange(19) * 0.04, 3600.0])
    with pytest.raises(VideoError, match="time stamps make no sense: 20 frames in 3600 s"):
        read(path)
    _, info = read(path, how=Preprocess(min_frames=4, keep_corrupt=True))
    assert info.frames == 27  # 19, and the last one after a pause that is shortened to 8
    assert "pause" in info.notes[0]


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "empty file"),
        (b"not a video at all", "cannot be decoded"),
        (b"\0" * 5000, "cannot be decoded"),
        (os.urandom(5000), "cannot be decoded|no video stream|too short"),
    ],
)
def test_what_is_no_video_has_a_reason(tmp_path, content, reason):
    (tmp_path / "a.mp4").write_bytes(content)
    with pytest.raises(VideoError, match=reason):
        read(tmp_path / "a.mp4")


def test_audio_only(tmp_path):
    with av.open(str(tmp_path / "a.mp4"), "w") as container:
        stream = container.add_stream("aac", rate=16000)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), "fltp", "mono")
        frame.sample_rate = 16000
        container.mux(stream.encode(frame))
        container.mux(stream.encode())
    with pytest.raises(VideoError, match="no video stream"):
        read(tmp_path / "a.mp4")


def test_too_short_and_not_an_image(tmp_path):
    path = write_video(tmp_path / "a.mp4", cut(0, 3))
    with pytest.raises(VideoError, match="too short: 3 frames, 4 are needed"):
        read(path)
    buffer = io.BytesIO()
    Image.fromarray(cut(0)[0]).save(buffer, format="png")
    (tmp_path / "b.mp4").write_bytes(buffer.getvalue())  # a picture under the name of a video
    with pytest.raises(VideoError, match="too short: 1 frame"):
        read(tmp_path / "b.mp4")


@pytest.mark.parametrize("suffix", ["mp4", "avi", "mkv", "webm", "ts", "gif"])
def test_truncated_files_are_rejected(tmp_path, suffix):
    codec, pix_fmt = {"avi": ("mpeg4", "yuv420p"), "webm": ("libvpx", "yuv420p"), "gif": ("gif", "rgb8")}.get(
        suffix, ("libx264", "yuv420p")
    )
    options = {"movflags": "faststart"} if suffix == "mp4" else {}
    path = tmp_path / f"a.{suffix}"
    write_video(path, real_frames()[:60], codec, pix_fmt)
    if options:
        _faststart(path)
    data = path.read_bytes()
    assert read(path)[1].frames == 60
    path.write_bytes(data[: len(data) * 2 // 3])
    try:
        _, info = read(path)
    except VideoError:
        return
    assert suffix in ("ts", "gif", "mkv")  # made to be cut anywhere: what is there is whole
    assert info.frames < 60


def _faststart(path):
    with av.open(str(path)) as source, av.open(str(path) + ".mp4", "w", options={"movflags": "faststart"}) as target:
        stream = target.add_stream_from_template(source.streams.video[0])
        for packet in source.demux(video=0):
            if packet.dts is not None:
                packet.stream = stream
                target.mux(packet)
    os.replace(str(path) + ".mp4", path)


def test_extreme_shapes_are_refused(tmp_path):
    with pytest.raises(VideoError, match="sides must be within"):
        to_square(np.zeros((2, 2000, 3), np.uint8), 64, HOW)


@pytest.mark.parametrize("resize", ["shorter-side", "centre-square"])
@pytest.mark.parametrize("shape", [(144, 176), (176, 144), (64, 64), (30, 47), (129, 257)])
def test_square_keeps_the_centre(resize, shape):
    y, x = np.mgrid[: shape[0], : shape[1]]
    frame = np.stack([y * 255 // shape[0], x * 255 // shape[1], 0 * x], axis=2).astype(np.uint8)
    square = to_square(frame, 64, Preprocess(resize=resize)).astype(int)
    assert square.shape == (3, 64, 64)
    assert abs(square[:2, 31:33, 31:33].mean() - 127) < 6
    side = min(shape)
    for axis in (0, 1):
        low = 255 * (shape[axis] - side) / 2 / shape[axis]
        row = square[axis].take(0, axis).mean(), square[axis].take(63, axis).mean()
        assert row == pytest.approx((low, 255 - low), abs=10)


def test_antialias_removes_what_the_size_cannot_show():
    stripes = np.zeros((512, 512, 3), np.uint8)
    stripes[:, ::2] = 255
    assert to_square(stripes, 64, Preprocess(antialias=True)).std() < 5
    assert to_square(stripes, 60, Preprocess(antialias=False)).std() > 20


def test_frame_folders(tmp_path):
    frames = cut(0)
    write_frames(tmp_path / "sky", frames, [f"v_1_{i + 95}.png" for i in range(20)])
    write_frames(tmp_path / "natural", frames, [f"f{i}.png" for i in range(20)])
    for folder, order in (("sky", "underscore"), ("natural", "natural")):
        got, info = read(tmp_path / folder, how=Preprocess(frame_order=order))
        assert np.array_equal(got, expected(frames))
        assert info.fps is None
    with pytest.raises(VideoError, match="no frame number"):
        frame_files(tmp_path / "natural", "underscore")
    (tmp_path / "natural" / "f7.png").write_bytes(b"broken")
    with pytest.raises(VideoError, match=r"'f7\.png' cannot be decoded: not an image"):
        read(tmp_path / "natural")
    data = (tmp_path / "sky" / "v_1_99.png").read_bytes()
    (tmp_path / "sky" / "v_1_99.png").write_bytes(data[: len(data) // 2])
    with pytest.raises(VideoError, match=r"'v_1_99\.png' cannot be decoded"):
        read(tmp_path / "sky")


def test_odd_images(tmp_path):
    grey = cut(0)[0][..., 0]
    Image.fromarray(grey).save(tmp_path / "0.png")
    Image.fromarray(grey.astype(np.uint16) * 257).save(tmp_path / "1.png")
    Image.fromarray(np.dstack([grey, grey, grey, grey])).save(tmp_path / "2.png")
    Image.fromarray(grey).convert("P").save(tmp_path / "3.png")
    turned = Image.fromarray(np.rot90(grey))
    exif = turned.getexif()
    exif[0x112] = 6  # show it turned clockwise by 90 degrees
    turned.save(tmp_path / "4.png", exif=exif)
    frames, _ = read(tmp_path)
    for frame in frames[1:]:
        assert np.abs(frame.astype(int) - frames[0]).max() <= 1


def test_whole_tree_of_real_clips():
    for name, frames in (("bigbuckbunny.mp4", 132), ("bikes.mp4", 250), ("carphone_distorted.mp4", 120)):
        assert read(carried(name), size=32, chunk=50)[1].frames == frames
