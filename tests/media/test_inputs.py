"""Files as they come from phones, recorders and old data sets: each gives the right frames, as data and as --given."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from data_prep.encode_latents import run
from fvdm.data.shards import LatentShards
from fvdm.generation.inputs import read_source
from fvdm.media.videos import Preprocess, count_frames, read_video
from tests.commands import fvdm
from tests.data_fixtures import make_vae, rejected, write_video

INPUTS = Path(__file__).parents[1] / "data" / "inputs"
VIDEOS = {  # frames, frames per second, and the side that players show
    "cover_first.mp4": (24, 25, (176, 144)),
    "dm_hflip.mp4": (24, 25, (176, 144)),
    "two.mov": (24, 25, (176, 144)),
    "fps_120.webm": (60, 120, (96, 64)),
    "nvop.avi": (31, 25, (176, 144)),
    "sar.mp4": (20, 25, (176, 144)),
    "m2cut.mpg": (45, 25, (176, 144)),
    "screen_still.mkv": (87, 30, (96, 64)),
}
NOTES = {"two.mov": "track 1", "m2cut.mpg": "2 leading frames", "screen_still.mkv": "a pause is shortened"}


@pytest.mark.parametrize("name", VIDEOS)
def test_videos(name):
    frames, fps, side = VIDEOS[name]
    source = read_source(str(INPUTS / name), 64)
    *parts, info = read_video(INPUTS / name, 64, Preprocess(), 16)
    assert np.array_equal(source.frames, np.concatenate(parts))
    assert (len(source.frames), source.fps, source.side) == (frames, fps, side)
    assert (info.frames, info.fps, info.side) == (frames, fps, side)
    assert count_frames(INPUTS / name) == frames
    assert all(NOTES.get(name, "") in note for note in info.notes)
    assert bool(info.notes) == (name in NOTES)
    assert f"{side[0]} x {side[1]} at {fps} frames/s" in str(source)


def test_a_mirrored_phone_video_is_the_flipped_copy_of_the_plain_one():
    """The same film without the display matrix is in cover_first.mp4."""
    mirrored = read_source(str(INPUTS / "dm_hflip.mp4"), 64).frames.float()
    plain = read_source(str(INPUTS / "cover_first.mp4"), 64).frames.float()
    assert (mirrored - plain.flip(-1)).abs().mean() < 5
    assert (mirrored - plain).abs().mean() > 30


def test_a_circle_of_wide_pixels_is_round():
    white = read_source(str(INPUTS / "sar.mp4"), 64).frames[0, 0] > 127
    assert int(white.any(0).sum()) == pytest.approx(int(white.any(1).sum()), abs=1)


def test_sixteen_bits_of_grey():
    frame = read_source(str(INPUTS / "grey16.png"), 256).frames[0, 0].float()
    assert [int(frame[:, k].mean()) for k in (0, 65, 130, 194)] == [0, 65, 130, 194]


def test_a_still_has_no_rate():
    source = read_source(str(INPUTS / "rgb.avif"), 64)
    assert (len(source.frames), source.fps, source.side) == (1, None, (200, 160))
    assert "frames/s" not in str(source)


def test_one_dropped_frame_of_600_costs_one_repeat(tmp_path):
    frames = np.stack([np.full((16, 16, 3), k % 250, np.uint8) for k in range(601)])
    times = [k / 60 for k in range(601) if k != 300]
    path = write_video(tmp_path / "a.mkv", np.delete(frames, 300, 0), "ffv1", "bgr0", times=times)
    *parts, info = read_video(path, 16, Preprocess(), 64)
    assert (info.frames, info.fps) == (601, 60)
    shown = np.concatenate(parts)[:, 0, 0, 0]
    assert shown.tolist() == [k % 250 if k != 300 else 299 % 250 for k in range(601)]


def test_all_of_them_are_encoded(tmp_path, capsys):
    words = ["--videos", str(INPUTS), "--out", str(tmp_path / "out"), "--size", "32", "--mlflow", "none", "--no-flip"]
    assert run([*words, "--layout", "ffs", "--vae", str(make_vae(tmp_path / "vae"))]) == 0
    assert rejected(tmp_path / "out") == {}
    shards = LatentShards(tmp_path / "out")
    assert dict(zip(shards.sources, shards.frames.tolist(), strict=True)) == {n: v[0] for n, v in VIDEOS.items()}
    index = json.loads((tmp_path / "out" / "train-000000.index.json").read_text())
    assert {row["source"]: row["fps"] for row in index["samples"]} == {n: v[1] for n, v in VIDEOS.items()}


def generate(name, *words):
    """What `fvdm generate` prints."""
    done = fvdm("generate", "--checkpoint", "example", "--task", "image-to-video", "--given", INPUTS / name, *words)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("name", VIDEOS)
def test_all_of_them_are_given(name):
    frames, fps, side = VIDEOS[name]
    output = generate(name, "--show-schedule")
    assert f"{name}: {frames} frames of {side[0]} x {side[1]} at {fps} frames/s" in output
    assert NOTES.get(name, "") in output
    assert f"fps: {fps}" in output


@pytest.mark.slow
@pytest.mark.parametrize(("name", "side"), [("grey16.png", "256 x 256"), ("rgb.avif", "200 x 160")])
def test_a_given_still_gives_eight_frames_per_second(tmp_path, name, side):
    tracking = ("--tracking.uri", f"sqlite:///{tmp_path}/mlflow.db")
    output = generate(name, "--steps", "1", "--num", "1", "--out", str(tmp_path / "out"), *tracking)
    assert f"{name}: 1 frame of {side};" in output
    assert json.loads((tmp_path / "out" / "image-to-video.json").read_text())["fps"] == 8


MEMORY = """
import sys
from benchmarks.process_memory import peak
from fvdm.media.videos import Preprocess, read_video
frames = 0
for part in read_video(sys.argv[1], 32, Preprocess(), 64):
    frames += len(part) if hasattr(part, "shape") else 0
print(frames, round(peak() / 2**20))
"""


@pytest.mark.slow
def test_a_long_video_is_read_in_the_memory_of_a_short_one(tmp_path):
    peaks = []
    for length in (1000, 30_000):
        frames = np.zeros((length, 16, 16, 3), np.uint8)
        path = write_video(
            tmp_path / f"{length}.mkv", frames, "mpeg4", times=[k * k % 3 / 250 + k / 30 for k in range(length)]
        )
        out = subprocess.run([sys.executable, "-c", MEMORY, str(path)], capture_output=True, text=True, check=True)
        read, peak = map(int, out.stdout.split())
        assert read == length
        peaks.append(peak)
    assert peaks[1] - peaks[0] < 40, f"peak memory in MB: {peaks}"
