"""Which frames count: pure, and on real files whose frames say their number."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.sources import Files, count_frames, open_source
from fvdm.protocols import LENGTHS, PROTOCOLS, Clip, departures, protocol, select_fake, select_real
from tests.data_fixtures import carried, make_shards, real_frames, write_frames, write_video

LONG = [60, 15, 16, 46, 45, 30, 200, 47]  # frames of eight videos
TAKEN = {  # (video, first frame, stride) of the first four real clips of 16 frames from LONG, seed 1
    "styleganv": [(0, 31, 1), (2, 0, 1), (3, 27, 1), (4, 21, 1)],
    "latte": [(6, 79, 3), (0, 1, 3), (3, 0, 3), (7, 1, 3)],
    "tats": [(3, 27, 1), (0, 31, 1), (2, 0, 1), (5, 0, 1)],
    "videogpt": [(3, 27, 1), (0, 31, 1), (2, 0, 1), (5, 0, 1)],
    "cdfvd": [(3, 27, 1), (0, 31, 1), (2, 0, 1), (5, 0, 1)],
    "even": [(0, 0, 1), (2, 0, 1), (4, 0, 1), (6, 0, 1)],
}


def span(clip: Clip) -> tuple[int, int, int]:
    """Video, first frame and stride of a clip, checked to be even."""
    assert set(np.diff(clip.frames)) == {clip.frames[1] - clip.frames[0]}
    return clip.video, clip.frames[0], clip.frames[1] - clip.frames[0]


@pytest.mark.parametrize("name", PROTOCOLS)
def test_each_protocol_takes_these_very_clips(name):
    assert [span(clip) for clip in select_real(protocol(name), LONG, 16, clips=4, seed=1)] == TAKEN[name]
    fake = select_fake(protocol(name), LONG, 16, 3)
    assert [clip.video for clip in fake] == ([0, 3, 5] if name == "even" else [0, 2, 3])
    assert all(clip.frames == tuple(range(16)) for clip in fake)


@pytest.fixture(scope="module")
def numbered(tmp_path_factory):
    """Videos as frame folders and files; the brightness of a frame is twice its number."""
    root = tmp_path_factory.mktemp("numbered")
    for k, length in enumerate((50, 12, 60, 30)):
        frames = np.repeat(np.arange(length, dtype=np.uint8)[:, None, None, None] * 2, 3, axis=3)
        frames = np.broadcast_to(frames, (length, 32, 48, 3))
        if k % 2:
            write_video(root / f"v{k}.avi", frames, "rawvideo", "bgr24")
        else:
            write_frames(root / f"v{k}", frames, [f"{i}.png" for i in range(length)])
    return root


@pytest.mark.parametrize("name", PROTOCOLS)
@pytest.mark.parametrize("frames", [9, 16])
def test_the_frames_read_are_those_the_protocol_took(numbered, name, frames):
    source = Files(str(numbered), 16)
    assert source.lengths == [50, 12, 60, 30]
    for seed in (0, 1):
        for clips in (
            select_real(protocol(name), source.lengths, frames, seed=seed),
            select_fake(protocol(name), source.lengths, frames),
        ):
            video = source.read(clips)
            assert video.shape == (len(clips), frames, 3, 16, 16)
            seen = video.float().mean(dim=(2, 3, 4)).div(2).round().int().tolist()
            assert seen == [list(clip.frames) for clip in clips]


@given(
    st.sampled_from(sorted(PROTOCOLS)),
    st.lists(st.integers(0, 400), min_size=3, max_size=12),
    st.sampled_from(LENGTHS),
    st.integers(0, 2**31),
)
def test_clips_fit_their_videos_and_no_video_comes_twice(name, lengths, frames, seed):
    how = protocol(name)
    needed = (frames - 1) * how.stride + 1
    usable = {video for video, length in enumerate(lengths) if length >= needed}
    if len(usable) < 2:
        with pytest.raises(ValueError, match="takes two or more"):
            select_real(how, lengths, frames, seed=seed)
        return
    clips = select_real(how, lengths, frames, seed=seed)
    assert clips == select_real(how, lengths, frames, seed=seed)
    assert {clip.video for clip in clips} == usable
    assert len(clips) == len(usable)
    assert all(clip.frames[0] >= 0 and clip.frames[-1] < lengths[clip.video] for clip in clips)
    if how.order == "sorted":
        assert clips == sorted(clips)
    more = select_real(how, [*lengths, 1000], frames, seed=seed)
    offsets = {clip.video: clip.frames for clip in more}
    assert all(offsets[clip.video] == clip.frames for clip in clips)


def test_offsets_reach_both_ends():
    firsts = {select_real(protocol("styleganv"), [18, 18], 16, seed=s)[0].frames[0] for s in range(40)}
    assert firsts == {0, 1, 2}


def test_strides_of_data_sets():
    assert [protocol("latte").stride_on(name) for name in ("ffs", "taichi")] == [3, 6]
    assert [protocol("tats").stride_on(name) for name in ("ffs", "taichi")] == [1, 4]
    assert span(select_real(protocol("latte"), [91, 100], 16, stride=6, seed=0)[0])[2] == 6


def test_departures_are_named():
    how = protocol("latte")
    exact = {"clips": (2048, 2048), "frames": 16, "size": 256, "stride": 3, "usual": 3}
    assert departures(how, **exact) == []
    for changed in ({"clips": (2048, 64)}, {"clips": (64, 2048)}, {"frames": 9}, {"size": 64}, {"stride": 1}):
        assert len(departures(how, **(exact | changed))) == 1
    assert departures(how, **(exact | {"frames": 128})) == []


def test_an_unknown_protocol_lists_the_known():
    with pytest.raises(ValueError, match="styleganv, latte, tats, videogpt"):
        protocol("fvd")


def test_sources_are_recognised(numbered, tmp_path):
    assert isinstance(open_source(str(numbered), 16, "v2"), Files)
    with pytest.raises(ValueError, match="no videos named"):
        open_source(str(numbered), 16, "nothing")
    with pytest.raises(ValueError, match="cannot load the VAE 'none'"):
        open_source(str(make_shards(tmp_path / "latents", [9, 9])), 16)
    with pytest.raises(ValueError, match="not a folder"):
        open_source("/nowhere", 16)


@pytest.mark.parametrize("kind", ["h264", "gif", "vp8", "uneven", "carried"])
def test_counted_frames_are_those_that_are_read(tmp_path, kind):
    frames = real_frames()[:23]
    if kind == "carried":
        path, expected = carried("carphone_pristine.mp4"), 120
    else:
        times = [k / 25 + 0.2 * (k > 9) for k in range(23)] if kind == "uneven" else None
        codec = {"gif": "gif", "vp8": "libvpx"}.get(kind, "libx264")
        suffix = {"gif": "gif", "vp8": "webm"}.get(kind, "mp4")
        options = {"auto-alt-ref": "1", "lag-in-frames": "8"} if kind == "vp8" else {}
        pix_fmt = "rgb8" if kind == "gif" else "yuv420p"
        path = write_video(tmp_path / f"v.{suffix}", frames, codec, pix_fmt, times=times, **options)
        expected = 28 if kind == "uneven" else 23
    assert count_frames(str(path)) == expected
    source = Files(str(path.parent), 16, path.name)
    assert source.read([Clip(0, (0, expected - 1))]).shape == (1, 2, 3, 16, 16)
    with pytest.raises(ValueError, match="ends at frame"):
        source.read([Clip(0, (0, expected))])
