"""Videos as files: they play, at their speed, and are written in the memory of a frame."""

import random
import tempfile
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from fvdm.generation.inputs import read_source
from fvdm.media.writing import FORMATS, card, gif_stride, tile, write, write_gif, write_mp4, write_strips
from tests.data_fixtures import real_frames


@pytest.mark.parametrize("form", ["mp4", "webm"])
def test_the_same_frames_give_the_same_file(form, tmp_path):
    """Whatever lies in the memory that an encoder gets: so that ranks write the files of one."""
    video = tile(list((torch.rand(3, 16, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 255).to(torch.uint8)))
    path, files, litter, dice = tmp_path / f"v.{form}", set(), [], random.Random(0)
    for _ in range(100):
        litter.append(np.ones(dice.randint(1, 5000), dtype=np.uint8))
        if dice.random() < 0.3:
            litter.pop(dice.randrange(len(litter)))
        write(video, path, 8.0, form)
        files.add(path.read_bytes())
    assert len(files) == 1


def test_media_round_trip(tmp_path):
    video = torch.from_numpy(real_frames()[:6].copy()).permute(0, 3, 1, 2)
    write_mp4(video, tmp_path / "v.mp4", fps=12.5)
    write_gif(video, tmp_path / "v.gif")
    write(video, tmp_path / "v.webm", 12.5, "webm")
    write(video, tmp_path / "v", form="frames")
    assert torch.equal(read_source(str(tmp_path / "v"), 144).frames[3], video[3, :, :, 16:160])
    assert read_source(str(tmp_path / "v.webm"), 144).fps == pytest.approx(12.5)
    with av.open(str(tmp_path / "v.mp4")) as container:
        assert float(container.streams.video[0].average_rate) == 12.5
        back = np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])
    error = np.square(back.astype(float) - real_frames()[:6]).mean()
    assert 10 * np.log10(255**2 / error) > 35
    with Image.open(tmp_path / "v.gif") as gif:
        assert gif.n_frames == 6
    write_strips(torch.stack([video, video]), tmp_path / "s.png", columns=3)
    with Image.open(tmp_path / "s.png") as strip:
        assert strip.size == (3 * 176, 2 * 144)
    write_strips(torch.stack([video, video]), tmp_path / "s.png", columns=4, rows=2)
    with Image.open(tmp_path / "s.png") as strip:
        assert strip.size == (4 * 176, 2 * 2 * 144)
        assert not np.asarray(strip)[144:288, 2 * 176 :].any(), "six frames leave two places empty"
    for count in range(1, 9):
        rows, columns = card(count)
        assert 3 / 4 <= columns / (count * rows) <= 4 / 3, "near a square"
    assert tile([video] * 3).shape == (6, 3, 288, 352)
    assert not [path for path in Path(tmp_path).iterdir() if path.name.startswith(".tmp")]


@settings(max_examples=25, deadline=None)
@given(st.one_of(st.sampled_from([24, 25, 30, 48, 50, 60, 120, 240, 23.976]), st.floats(1, 240)))
def test_a_gif_keeps_the_speed_of_its_video(fps):
    """In hundredths of a second, none of them less than two: for only one, viewers take ten."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "v.gif"
        write_gif((torch.rand(60, 3, 8, 8) * 255).byte(), path, fps)
        with Image.open(path) as gif:
            assert gif.info["loop"] == 0
            assert gif.n_frames == -(-60 // gif_stride(fps))
            durations = []
            for k in range(gif.n_frames):
                gif.seek(k)
                durations.append(gif.info["duration"] / 10)
    assert min(durations) >= 2
    ends = np.cumsum(durations)
    expected = 100 * gif_stride(fps) * np.arange(1, len(ends) + 1) / fps
    assert np.abs(ends - expected).max() <= 0.5 + 1e-6


def test_the_frames_of_a_gif_are_those_of_the_video(tmp_path):
    video = torch.from_numpy(real_frames()[:60:2].copy()).permute(0, 3, 1, 2)
    write_gif(video, tmp_path / "v.gif", 60)
    with Image.open(tmp_path / "v.gif") as gif:
        for k in range(gif.n_frames):
            gif.seek(k)
            error = np.asarray(gif.convert("RGB"), dtype=float) - video[2 * k].permute(1, 2, 0).numpy()
            assert np.abs(error).mean() < 4, k


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("number", [0, 1])
def test_a_video_that_ends_in_an_error_leaves_no_file(form, number, tmp_path):
    def frames():
        yield from torch.zeros(number, 3, 16, 16, dtype=torch.uint8)
        raise ValueError("no more")

    with pytest.raises(ValueError, match="no more"):
        write(frames(), tmp_path / "v", form=form)
    left = [path.name for path in tmp_path.rglob("*") if path.is_file()]
    assert left == (["00000.png"] if form == "frames" and number else []), "whole frames may stay"
