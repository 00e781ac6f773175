"""Videos that cannot be used: with --strict and without, mended meanwhile, or on a disk that fails for a moment."""

import errno
import os

import numpy as np
import pytest

from data_prep import decoding
from data_prep.decoding import Rejected, Restarted, Task, decode
from data_prep.inspect_shards import verify
from fvdm.data.shards import LatentShards
from fvdm.media.clips import ClipSpec, read_clips
from fvdm.media.videos import Info, Preprocess, VideoError, read_video
from tests.data_fixtures import cut, make_vae, rejected, write_frames, write_video
from tests.data_prep.test_encode_latents import contents, encode


@pytest.fixture(scope="module")
def vae(tmp_path_factory):
    return make_vae(tmp_path_factory.mktemp("vae"))


@pytest.fixture
def videos(tmp_path):
    """Six clips, two in a shard; 1 and 4 are damaged."""
    for number in range(6):
        write_video(tmp_path / "v" / f"{number}.mp4", cut(number, 16 + number)[:, ::2, ::2])
    for number in (1, 4):
        (tmp_path / "v" / f"{number}.mp4").write_bytes(b"damaged")
    return tmp_path / "v"


def mend(videos, number):
    write_video(videos / f"{number}.mp4", cut(number, 16 + number)[:, ::2, ::2])


def samples(out):
    """All that is stored of each video. (Which shard it is in depends on what its header says; a damaged one says
    nothing.)"""
    shards = LatentShards(out)
    return {
        source: [shards.read(video, np.arange(shards.frames[video]), flip=flip).tobytes() for flip in (False, True)]
        for video, source in enumerate(shards.sources)
    }


def test_strict_stops_at_the_same_video_until_it_is_mended(videos, vae, tmp_path, capsys):
    out = tmp_path / "out"
    for number in (1, 1, 4, 4):
        assert encode(videos, out, vae, "--strict", "--workers", "1") == 3
        assert f"stopped at '{number}.mp4': " in capsys.readouterr().err
        assert list(rejected(out)) == [f"{number}.mp4"]
        assert not (out / "manifest.json").exists()
        if (out / "seen").exists():
            mend(videos, number)
            (out / "seen").unlink()
        else:
            (out / "seen").touch()
    assert encode(videos, out, vae, "--strict") == 0
    assert encode(videos, tmp_path / "good", vae) == 0
    assert samples(out) == samples(tmp_path / "good")
    assert len(samples(out)) == 6


def test_after_strict_without_it(videos, vae, tmp_path):
    """And the other way round: a finished folder stays as it is."""
    out = tmp_path / "out"
    assert encode(videos, out, vae, "--strict") == 3
    assert encode(videos, out, vae) == 3
    assert set(rejected(out)) == {"1.mp4", "4.mp4"}
    assert encode(videos, tmp_path / "good", vae) == 3
    assert contents(out) == contents(tmp_path / "good")
    assert encode(videos, out, vae, "--strict") == 3
    assert contents(out) == contents(tmp_path / "good")


def test_a_mended_video_joins_a_finished_folder(videos, vae, tmp_path, capsys):
    out = tmp_path / "out"
    assert encode(videos, out, vae) == 3
    assert LatentShards(out).sources == ["0.mp4", "2.mp4", "3.mp4", "5.mp4"]
    mend(videos, 4)
    mend(videos, 1)
    capsys.readouterr()
    assert encode(videos, out, vae) == 0
    assert "tries 2 rejected videos again" in capsys.readouterr().out
    assert encode(videos, tmp_path / "good", vae) == 0
    assert samples(out) == samples(tmp_path / "good")
    assert len(samples(out)) == 6
    assert verify(out) == []
    assert rejected(out) == {}


@pytest.mark.parametrize("strict", [True, False])
def test_what_cannot_be_listed(videos, vae, tmp_path, capsys, strict):
    """It stops a strict run before anything is encoded; mended or taken away, it is no longer in the list."""
    (videos / "gone.mp4").symlink_to("nowhere.mp4")
    out = tmp_path / "out"
    assert encode(videos, out, vae, *(["--strict"] if strict else [])) == 3
    assert ("stopped at 'gone.mp4'" in capsys.readouterr().err) == strict
    assert rejected(out)["gone.mp4"] == "cannot be read: No such file or directory"
    assert (out / "plan.json").exists() != strict
    (videos / "gone.mp4").unlink()
    assert encode(videos, out, vae) == 3
    assert set(rejected(out)) == {"1.mp4", "4.mp4"}


def test_rejected_is_written_at_every_exit(videos, vae, tmp_path, monkeypatch):
    from data_prep import encoding

    sample = encoding.VideoMoments.sample

    def interrupted(moments, video, *args):
        if video == 5:
            raise KeyboardInterrupt
        return sample(moments, video, *args)

    monkeypatch.setattr(encoding.VideoMoments, "sample", interrupted)
    assert encode(videos, tmp_path / "out", vae, "--workers", "1") == 130
    assert set(rejected(tmp_path / "out")) == {"1.mp4", "4.mp4"}


class Disk:
    """Fails to read the videos named, a number of times each, in the decoder processes too: counts in files."""

    def __init__(self, folder, name, times):
        self.counts, self.name, self.times = folder, name, times

    def __call__(self, path, spec):
        if os.path.basename(path) == self.name:
            tried = len(list(self.counts.iterdir()))
            (self.counts / str(tried)).touch()
            if tried < self.times:
                raise VideoError("cannot be read: Input/output error", OSError(errno.EIO, "Input/output error"))
        yield from read_clips(path, spec)


@pytest.fixture
def disk(tmp_path, monkeypatch):
    """A disk that fails: the decoders are threads here, so that they meet it."""
    (tmp_path / "counts").mkdir()

    def install(name, times):
        failing = Disk(tmp_path / "counts", name, times)

        class Worker:
            healthy = True

            def read(self, task, timeout, stop):
                try:
                    yield from failing(task.path, task.spec)
                except VideoError as error:
                    yield Rejected(str(error), error.unread)

            def close(self):
                pass

        monkeypatch.setattr(decoding, "_Worker", Worker)
        monkeypatch.setattr("data_prep.decoding.estimate", lambda paths, spec, workers: [20] * len(paths))

    return install


def test_a_disk_that_fails_once_costs_nothing(tmp_path, disk):
    path = write_video(tmp_path / "a.mp4", cut(0))
    disk("a.mp4", 1)
    items = [item for _, item in decode([Task(0, str(path), ClipSpec(((32, 32),), Preprocess(), 100))], workers=1)]
    assert isinstance(items[0], Restarted)
    assert items[-1] == Info(25.0, 20)


@pytest.mark.parametrize("others", [False, True])
def test_a_disk_that_failed_is_tried_at_the_next_start(videos, vae, tmp_path, disk, others):
    """The final samples are those of an undisturbed run, though no file has changed."""
    for number in (1, 4):
        mend(videos, number)
    disk("nothing", 0)
    assert encode(videos, tmp_path / "good", vae) == 0
    disk("2.mp4", 2 if not others else 4)
    assert encode(videos, tmp_path / "out", vae) == 3
    assert rejected(tmp_path / "out") == {"2.mp4": "cannot be read: Input/output error"}
    if others:
        assert encode(videos, tmp_path / "out", vae) == 3
    assert encode(videos, tmp_path / "out", vae) == 0
    assert contents(tmp_path / "out") == contents(tmp_path / "good")


def test_which_errors_are_the_disks(tmp_path):
    """A file without rights or no file at all may be good later; damage stays damage."""
    with pytest.raises(VideoError) as gone:
        list(read_video(tmp_path / "gone.mp4", 32, Preprocess(), 8))
    assert gone.value.unread
    (tmp_path / "bad.mp4").write_bytes(b"damaged")
    folder = write_frames(tmp_path / "frames", cut(0), [f"{number}.png" for number in range(20)])
    (folder / "7.png").write_bytes((folder / "7.png").read_bytes()[:200])
    for path in (tmp_path / "bad.mp4", folder):
        with pytest.raises(VideoError) as damaged:
            list(read_video(path, 32, Preprocess(), 8))
        assert not damaged.value.unread
