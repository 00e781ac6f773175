"""Which frames count: pure, and on real files whose frames say their number."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fvdm.evaluation.protocols import LENGTHS, PROTOCOLS, Clip, departures, protocol, select_fake, select_real
from fvdm.evaluation.sources import Files, codec_of, count_frames, open_source
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


OF_FACTS = {  # real clips (0: all), generated, stride, Taichi's; order, resize, ddof, seed, split, repeats
    "styleganv": (2048, 2048, 1, 1, "sorted", "short-side", 0, 0, "train", 1),
    "latte": (2048, 2048, 3, 6, "random", "short-side", 0, 0, "train", 1),
    "tats": (2048, 2048, 1, 4, "random", "direct", 1, 0, "train", 1),
    "videogpt": (256, 256, 1, 1, "random", "short-side", 1, 0, "test", 4),
    "cdfvd": (0, 2048, 1, 1, "random", "direct", 0, 42, "train", 1),
    "even": (2048, 2048, 1, 1, "even", "direct", 0, 0, "train", 1),
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


@pytest.mark.parametrize("name", PROTOCOLS)
def test_each_protocol_is_what_was_published(name):
    how = protocol(name)
    strides = (how.stride_on("ffs"), how.stride_on("taichi"))
    told = (how.order, how.resize, how.ddof, how.seed, how.split, how.repeats)
    assert (how.real, how.fake, *strides, *told) == OF_FACTS[name]
    lengths = [400] * 3000
    for frames in LENGTHS:
        real, fake = select_real(how, lengths, frames), select_fake(how, lengths, frames)
        assert (len(real), len(fake)) == (how.real or 3000, how.fake)
        assert {span(clip)[2] for clip in real} == {how.stride}
        assert {clip.frames for clip in fake} == {tuple(range(frames))}
        first = {clip.frames[0] for clip in real}
        assert (first == {0}) == (how.offset == "first")


@pytest.fixture(scope="module")
def numbered(tmp_path_factory):
    """Videos as frame folders and files, whose colours say the numbers of their frames."""
    return number_frames(tmp_path_factory.mktemp("numbered"), (50, 12, 60, 30))


@pytest.fixture(scope="module")
def numbered_long(tmp_path_factory):
    """The same, long enough for 128 frames of every protocol."""
    return number_frames(tmp_path_factory.mktemp("numbered"), (400, 128, 385, 390))


def number_frames(root, lengths):
    """Write videos; the red of a frame is its number, modulo 250, and the green what is left."""
    for k, length in enumerate(lengths):
        numbers = np.arange(length)
        colours = np.stack([numbers % 250, numbers // 250, 0 * numbers], axis=1).astype(np.uint8)
        frames = np.broadcast_to(colours[:, None, None], (length, 32, 48, 3))
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
        check_frames(source, select_real(protocol(name), source.lengths, frames, seed=seed), frames)
        check_frames(source, select_fake(protocol(name), source.lengths, frames), frames)


@pytest.mark.parametrize("name", PROTOCOLS)
def test_so_are_the_frames_of_long_clips(numbered_long, name):
    how, source = protocol(name), Files(str(numbered_long), 16)
    assert source.lengths == [400, 128, 385, 390]
    real = select_real(how, source.lengths, 128, seed=1)
    check_frames(source, real, 128)
    assert {clip.video for clip in real} == ({0, 2, 3} if name == "latte" else {0, 1, 2, 3})
    assert {span(clip)[2] for clip in real} == {how.stride}
    fake = select_fake(how, source.lengths, 128)
    check_frames(source, fake, 128)
    assert [clip.frames for clip in fake] == [tuple(range(128))] * 4


def check_frames(source, clips, frames):
    """What is read says the numbers of the frames that were taken."""
    video = source.read(clips)
    assert video.shape == (len(clips), frames, 3, 16, 16)
    red, green, _ = video.float().mean(dim=(3, 4)).round().int().unbind(2)
    assert (red + 250 * green).tolist() == [list(clip.frames) for clip in clips]


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


def exact(name, **changed):
    """What `departures` is told of a measurement that follows a protocol to the letter, of 3000 videos."""
    how = protocol(name)
    told = {"clips": (how.real or 3000, how.fake), "frames": 16, "size": 256, "videos": 3000, "decoded": False}
    told |= {"stride": how.stride, "usual": how.stride, "repeats": how.repeats, "seed": how.seed, "split": how.split}
    return departures(how, **(told | changed))


@pytest.mark.parametrize("name", PROTOCOLS)
def test_departures_are_named(name):
    assert exact(name) == exact(name, frames=128) == exact(name, split="") == []
    how = protocol(name)
    fewer = {"clips": ((how.real or 3000) - 1, how.fake)}
    for changed in (
        fewer,
        {"clips": (how.real or 3000, 40)},
        {"frames": 9},
        {"size": 64},
        {"stride": how.stride + 1},
        {"repeats": how.repeats + 1},
        {"seed": how.seed + 1},
        {"split": "other"},
        {"decoded": True},
    ):
        assert len(exact(name, **changed)) == 1, changed


def test_departures_in_the_number_of_real_clips_are_told_by_the_protocol():
    assert exact("videogpt", clips=(40, 256), videos=40) == ["40 real clips, as many as there are videos, not 256"]
    assert exact("videogpt", clips=(40, 256)) == ["40 real clips, not 256"]
    assert exact("cdfvd", clips=(100, 2048)) == ["100 real clips, not all 3000"]
    assert exact("cdfvd", clips=(100, 2048), videos=100) == []
    assert exact("even", clips=(50, 50), videos=60) == []


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
    assert codec_of(str(path)) == {"gif": "gif", "vp8": "vp8"}.get(kind, "h264")
    source = Files(str(path.parent), 16, path.name)
    assert source.read([Clip(0, (0, expected - 1))]).shape == (1, 2, 3, 16, 16)
    with pytest.raises(ValueError, match="ends at frame"):
        source.read([Clip(0, (0, expected))])
