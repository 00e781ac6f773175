"""Clips of one video: windows, rates and buckets are those of the frames that are read as a whole."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from data_prep.decoding import Rejected, Restarted, Task, decode
from fvdm.media.clips import ClipSpec, Piece, estimate_clips, nearest_size, read_clips
from fvdm.media.preprocess import Preprocess, VideoError, to_size, to_square
from fvdm.media.videos import Info, read_video
from tests.data_fixtures import cut, write_frames, write_video
from tests.media.test_fuzz import make_damaged

ANY = Preprocess(min_frames=1)


def clips_of(items):
    """The complete clips, by number: (first frame, bucket, frames)."""
    found: dict[int, list[Piece]] = {}
    for item in items:
        if isinstance(item, Piece):
            found.setdefault(item.clip, []).append(item)
    return {
        number: (pieces[0].first, pieces[0].bucket, np.concatenate([piece.frames for piece in pieces]))
        for number, pieces in found.items()
        if pieces[-1].last
    }


def read(path, spec):
    *pieces, info = read_clips(path, spec)
    return clips_of(pieces), info


@pytest.fixture(scope="module")
def video(tmp_path_factory):
    return write_video(tmp_path_factory.mktemp("clips") / "a.mp4", cut(0, 40)[:, ::4, ::4], fps=30)


@pytest.fixture(scope="module")
def frames(video):
    return np.concatenate([item for item in read_video(video, 32, ANY, 16) if isinstance(item, np.ndarray)])


@settings(max_examples=25, deadline=None)
@given(length=st.integers(1, 45), every=st.integers(1, 45), chunk=st.integers(1, 20))
def test_each_window_holds_its_frames(video, frames, length, every, chunk):
    spec = ClipSpec(((32, 32),), ANY, chunk, length, every)
    if length > len(frames):
        with pytest.raises(VideoError, match=f"too short: 40 frames, {length} are needed"):
            list(read_clips(video, spec))
        return
    clips, info = read(video, spec)
    assert info.frames == 40
    starts = [first for first in range(0, 40, every) if first + length <= 40]
    assert [clips[number][0] for number in sorted(clips)] == starts
    assert sum(len(clip) for *_, clip in clips.values()) == estimate_clips(video, spec)
    for first, _, clip in clips.values():
        assert np.array_equal(clip, frames[first : first + length])


@pytest.mark.parametrize("fps", [7.5, 15, 24, 29.97, 60])
def test_a_rate_takes_the_frames_that_a_player_shows(video, frames, fps):
    spec = ClipSpec(((32, 32),), ANY, 16, 5, 5, fps)
    clips, info = read(video, spec)
    shown = [int(tick / fps * 30 + 1e-6) for tick in range(200) if tick / fps * 30 < 40 - 1e-6]
    assert (info.fps, info.frames) == (fps, len(shown))
    for first, _, clip in clips.values():
        assert np.array_equal(clip, frames[shown[first : first + 5]])


def test_the_nearest_bucket():
    sizes = ((480, 832), (832, 480), (624, 624), (240, 416))
    assert [nearest_size(sizes, side) for side in ((1920, 1080), (1080, 1920), (500, 480), (600, 520))] == [0, 1, 2, 2]
    assert nearest_size(sizes, (416, 240)) == 3  # the largest of its kind that does not enlarge it
    assert nearest_size(sizes, (200, 120)) == 3
    assert nearest_size(((480, 832),), (10, 1000)) == 0


@pytest.mark.parametrize("resize", ["shorter-side", "centre-square"])
@pytest.mark.parametrize("size", [(24, 40), (40, 24), (32, 32)])
def test_a_frame_fills_its_rectangle(resize, size):
    """A ramp keeps its middle, whatever its shape; a square is as it always was."""
    preprocess = Preprocess(resize=resize)
    for rows, columns in ((60, 100), (100, 60), (64, 64)):
        y, x = np.mgrid[:rows, :columns].astype(float)
        frame = np.stack([y * 255 / rows, x * 255 / columns, 0 * x], -1).astype(np.uint8)
        made = to_size(frame, size, preprocess)
        assert made.shape == (3, *size)
        assert abs(made[0].mean() - 127) < 5
        assert abs(made[1].mean() - 127) < 5
        steps = (
            np.diff(made[0].astype(int).mean(1)).mean() * rows,
            np.diff(made[1].astype(int).mean(0)).mean() * columns,
        )
        assert steps[0] == pytest.approx(steps[1], rel=0.1)  # nothing is stretched
        if size[0] == size[1]:
            assert np.array_equal(made, to_square(frame, 32, preprocess))


def test_images_are_clips_of_one_frame(tmp_path):
    Image.fromarray(cut(0)[0]).save(tmp_path / "a.png")
    spec = ClipSpec(((32, 32), (32, 48)), Preprocess(), 16, 9, 9, 16.0, images=True)
    clips, info = read(tmp_path / "a.png", spec)
    assert (info.fps, info.frames, list(clips)) == (None, 1, [0])
    assert clips[0][:2] == (0, 0)
    folder = write_frames(tmp_path / "f", cut(0, 12), [f"{number}.png" for number in range(12)])
    clips, info = read(folder, replace(spec, preprocess=ANY))
    assert info.notes == ("its frame rate is unknown: its frames are taken as they are, not at 16 fps",)
    assert len(clips) == 1


@pytest.mark.slow
def test_damaged_videos_give_their_frames_or_a_reason(tmp_path):
    """150 damaged files as clips: each clip holds the frames of the whole reading, which test_fuzz checks."""
    paths = make_damaged(tmp_path, 150, seed=11)
    accepted = 0
    ended = {}
    for spec in (ClipSpec(((32, 32),), Preprocess(min_frames=4), 8), ClipSpec(((32, 32),), ANY, 8, 4, 3)):
        items: dict[int, list[Piece]] = {key: [] for key in range(len(paths))}
        tasks = [Task(key, str(path), spec) for key, path in enumerate(paths)]
        for key, item in decode(tasks, workers=2, timeout=60):
            if isinstance(item, Restarted):
                items[key] = []
            elif isinstance(item, Piece):
                items[key].append(item)
            else:
                ended[bool(spec.frames), key] = item, items[key]
    for key in range(len(paths)):
        (whole, pieces), (end, parts) = ended[False, key], ended[True, key]
        assert type(whole) is type(end)
        if isinstance(end, Rejected):
            assert end.reason
            continue
        assert isinstance(end, Info)
        accepted += 1
        frames = np.concatenate([piece.frames for piece in pieces])
        for first, _, clip in clips_of(parts).values():
            assert np.array_equal(clip, frames[first : first + 4])
    assert 5 < accepted < 100
