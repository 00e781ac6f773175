"""Parts, shards and rejected videos on disk, whoever writes them and however often."""

import contextlib
import json
import multiprocessing
import os
import random
import shutil
import time

import numpy as np
import pytest

from data_prep import shards as shard_files
from data_prep.planning import EncodePlan, ShardPlan
from data_prep.samples import make_sample
from data_prep.shards import Work, stamp_of
from fvdm.media.layouts import Source

VIDEOS = 8
SHARD = ShardPlan("train-000000.tar", "train", 0, VIDEOS)


def make_work(out, bad=()):
    """A work folder with the parts of one shard, none assembled; `bad` videos are rejected."""
    sources = [Source(f"{number}.mp4", "file") for number in range(VIDEOS)]
    work = Work(out, EncodePlan(str(out), {}, "ffs", [], sources, [4] * VIDEOS, [], [SHARD]))
    for video in range(VIDEOS):
        if video in bad:
            work.reject(SHARD, video, "bad", [1, 2])
        else:
            keep(work, video)
    return work


def keep(work, video):
    moments = np.full((4, 8, 4, 4), video, np.float16)
    work.keep(SHARD, video, make_sample(video, work.plan.sources[video], 25.0, moments, None))


def files(out):
    return {path.name: path.read_bytes() for path in out.iterdir() if path.is_file()}


@pytest.fixture
def good(tmp_path):
    (tmp_path / "good").mkdir()
    work = make_work(tmp_path / "good", bad=[3])
    work.assemble(SHARD)
    index = json.loads((tmp_path / "good" / "train-000000.index.json").read_text())
    assert len(index["samples"]) == VIDEOS - 1
    assert index["rejected"] == [{"source": "3.mp4", "reason": "bad", "stamp": [1, 2]}]
    assert not (tmp_path / "good" / ".work" / "train-000000").exists()
    return tmp_path / "good"


def copy_of_the_job(work, barrier, seconds, locks):
    """What each of two copies of a job does: a last video, then the shard."""
    if not locks:
        shard_files._lock = lambda folder: contextlib.nullcontext()
    barrier.wait()
    time.sleep(seconds)
    keep(work, VIDEOS - 1)
    work.assemble(SHARD)


@pytest.mark.parametrize("locks", [True, False])
def test_two_copies_of_a_job_lose_nothing(tmp_path, good, locks):
    """Two processes finish the same shard at nearly the same time, on file systems with and without locks."""
    expected = files(good)
    fork = multiprocessing.get_context("fork")
    draw = random.Random(0)
    for number in range(10):
        out = tmp_path / str(number)
        out.mkdir()
        work = make_work(out, bad=[3])
        barrier = fork.Barrier(2)
        delays = (0.0, draw.uniform(0, 0.03))
        copies = [fork.Process(target=copy_of_the_job, args=(work, barrier, delay, locks)) for delay in delays]
        for copy in copies:
            copy.start()
        for copy in copies:
            copy.join()
        assert [copy.exitcode for copy in copies] == [0, 0]
        assert files(out) == expected
        assert not (out / ".work" / SHARD.name.removesuffix(".tar")).exists()
        shutil.rmtree(out)


def test_a_missing_part_is_an_error_and_no_shorter_shard(tmp_path):
    work = make_work(tmp_path)
    next(tmp_path.rglob("000000005.tar")).unlink()
    with pytest.raises(FileNotFoundError):
        work.assemble(SHARD)
    assert not files(tmp_path)
    assert work.missing(SHARD) == [5]


def test_parts_that_vanish_while_they_are_read_make_no_shorter_shard(tmp_path, good, monkeypatch):
    """Another copy of the job makes the shard and removes the parts, between any two looks at them."""
    copy = shard_files._copy
    for number in range(VIDEOS - 1):
        out = tmp_path / str(number)
        out.mkdir()
        work = make_work(out, bad=[3])

        def made_by_another(path, writer, out=out, number=number):
            if int(path.stem) == number + (number >= 3):
                for name in ("train-000000.tar", "train-000000.index.json"):
                    shutil.copy(good / name, out)
                shutil.rmtree(path.parent)
            return copy(path, writer)

        monkeypatch.setattr(shard_files, "_copy", made_by_another)
        work.assemble(SHARD)
        assert files(out) == files(good)
        keep(work, 0)  # it continues with its videos, which are made
        work.assemble(SHARD)
        assert files(out) == files(good)


def test_a_shard_of_rejected_videos_only(tmp_path):
    work = make_work(tmp_path, bad=range(VIDEOS))
    work.assemble(SHARD)
    assert not (tmp_path / SHARD.name).exists()
    assert list(work.rejected(SHARD)) == list(range(VIDEOS))


@pytest.mark.parametrize("made", [True, False])
def test_repaired_videos_are_tried_again(tmp_path, made):
    """Those whose file has changed since, that could not be read, or all; what is good is not encoded again."""
    videos = tmp_path / "videos"
    videos.mkdir()
    out = tmp_path / "out"
    out.mkdir()
    work = make_work(out, bad=[2, 5, 7])
    for video in (2, 5):
        (videos / f"{video}.mp4").write_bytes(b"bad")
        work.reject(SHARD, video, "bad", stamp_of(videos / f"{video}.mp4"))
    (out / "manifest.json").touch()
    if made:
        work.assemble(SHARD)
    before = files(out)
    assert set(work.rejected(SHARD)) == {2, 5, 7}
    assert work.retry(videos) == 1  # 7.mp4 is not there
    assert work.missing(SHARD) == [7]
    assert set(work.rejected(SHARD)) == {2, 5}
    work.reject(SHARD, 7, "bad", [1, 2])
    (videos / "7.mp4").write_bytes(b"x")
    os.utime(videos / "7.mp4", ns=(2, 2))
    work.assemble(SHARD)
    assert work.retry(videos) == 0
    if made:
        assert files(out) | {"manifest.json": b""} == before
    (videos / "5.mp4").write_bytes(b"repaired")
    assert work.retry(videos) == 1
    assert work.missing(SHARD) == [5]
    assert not (out / "manifest.json").exists()
    assert work.retry(videos, everything=True) == 2
    assert work.missing(SHARD) == [2, 5, 7]
    for video in (2, 5, 7):
        keep(work, video)
    work.assemble(SHARD)
    make_work(tmp_path / "clean").assemble(SHARD)
    assert files(out) == files(tmp_path / "clean")


def test_killed_while_a_shard_is_taken_apart(tmp_path, monkeypatch):
    """The shard is complete, or all its parts are there; never less."""
    (tmp_path / "videos").mkdir()
    number = 0
    killed = True
    while killed:
        number += 1
        out = tmp_path / str(number)
        out.mkdir()
        work = make_work(out, bad=[3])
        work.assemble(SHARD)
        killed = False
        with monkeypatch.context() as patch:
            stop_at(patch, number)
            try:
                work.retry(tmp_path / "videos")
            except KeyboardInterrupt:
                killed = True
        assert work.complete(SHARD) or set(work.missing(SHARD)) <= {3}
        work.retry(tmp_path / "videos")
        assert work.missing(SHARD) == [3]
        work.reject(SHARD, 3, "bad", [1, 2])
        work.assemble(SHARD)
        assert len(json.loads((out / "train-000000.index.json").read_text())["samples"]) == VIDEOS - 1
    assert number > VIDEOS


def stop_at(patch, number):
    """Ends the process, as it were, at a change of the file system."""
    calls = []
    for name in ("replace", "unlink"):
        function = getattr(os, name)

        def patched(*args, function=function, **words):
            calls.append(args)
            if len(calls) == number:
                raise KeyboardInterrupt
            return function(*args, **words)

        patch.setattr(os, name, patched)
