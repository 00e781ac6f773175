import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fvdm.data import DataConfig, batches, draw_frames, epoch_order
from fvdm.location import CorruptShardError, Location
from fvdm.shards import LatentShards, Manifest
from tests.data_fixtures import make_shards

LENGTHS = [20, 17, 60, 16, 33, 48, 16, 47, 18, 21, 90]  # 11 videos in uneven shards of 3, 3, 3, 2


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_shards(tmp_path_factory.mktemp("shards"), LENGTHS)


@pytest.fixture(scope="module")
def shards(folder):
    return LatentShards(folder)


def config(folder, **changes):
    return replace(DataConfig(str(folder), batch_size=4, workers=0), **changes)


def take(n, *args, **kwargs):
    return list(itertools.islice(batches(*args, **kwargs), n))


def test_what_the_folder_says(shards):
    assert len(shards) == 11
    assert shards.frames.tolist() == LENGTHS
    assert shards.classes == ("a", "b")
    assert shards.latent_shape == (4, 4, 4)
    assert shards.labels.tolist() == [0, 1] * 5 + [0]
    assert [info.samples for info in shards.shards] == [3, 3, 3, 2]


def test_a_batch(folder, shards):
    batch = take(1, shards, config(folder), seed=5)[0]
    assert batch.x_0.shape == (4, 16, 4, 4, 4)
    assert batch.x_0.dtype == torch.float32
    assert batch.y.tolist() == [int(key) % 2 for key in batch.keys]
    assert batch.consumed == 4
    assert batch.skipped == 0
    # frame i of video v holds v + i / 1000, negated in the mirrored twin: which video, which frames, which twin
    value = batch.x_0[:, :, 0, 0, 0]
    assert value[:, 0].abs().round().tolist() == [int(key) for key in batch.keys]
    steps = (value.abs().diff(dim=1) * 1000).round()
    for step, key in zip(steps, batch.keys, strict=True):
        assert (step - min(3, (LENGTHS[int(key)] - 1) // 15)).abs().max() <= 8  # float16 of numbers up to 10
    assert (batch.x_0.std(dim=(2, 3, 4)) < 1e-2).all()


def test_flips_only_if_asked_and_stored(folder, shards, tmp_path):
    signs = torch.cat([batch.x_0[:, 0, 0, 0, 0] for batch in take(30, shards, config(folder))]).sign()
    assert 0.35 < (signs < 0).float().mean() < 0.65
    plain = torch.cat([batch.x_0[:, 0, 0, 0, 0] for batch in take(8, shards, config(folder, flip=False))])
    assert (plain > -0.01).all()
    other = make_shards(tmp_path / "plain", [16] * 4, flip=False, labels=False)
    batch = take(1, LatentShards(other), config(other))[0]
    assert batch.y is None
    assert (batch.x_0 > -0.01).all()


@pytest.mark.parametrize("workers", [0, 2])
def test_every_sample_once_an_epoch_over_any_ranks(folder, shards, workers):
    for ranks in (1, 2, 4):
        streams = [
            take(22, shards, config(folder, workers=workers), rank=rank, world_size=ranks, seed=1)
            for rank in range(ranks)
        ]
        keys = [key for step in zip(*streams, strict=True) for batch in step for key in batch.keys]
        assert len(keys) == 88  # 8 epochs of 11
        for epoch in range(8):
            assert sorted(keys[11 * epoch : 11 * (epoch + 1)]) == shards.keys


def sequence(shards, config, ranks, steps, start=0, seed=3):
    """The global batches: per step the set of (key, sum of the clip), whatever the ranks."""
    streams = [take(steps, shards, config, rank=r, world_size=ranks, seed=seed, start=start) for r in range(ranks)]
    return [
        {(key, float(x.double().sum())) for batch in step for key, x in zip(batch.keys, batch.x_0, strict=True)}
        for step in zip(*streams, strict=True)
    ]


def test_the_same_global_batches_for_1_2_and_4_ranks(folder, shards):
    one = sequence(shards, config(folder), 1, 12)
    assert sequence(shards, config(folder), 2, 12) == one
    assert sequence(shards, config(folder, workers=3), 4, 12) == one
    assert sequence(shards, config(folder), 1, 12, seed=4) != one


def test_resume_in_the_middle_of_an_epoch(folder, shards):
    whole = sequence(shards, config(folder), 1, 12)
    assert take(5, shards, config(folder))[-1].consumed == 20
    for ranks in (1, 2, 4):
        first = sequence(shards, config(folder, workers=1), 2, 5)
        rest = sequence(shards, config(folder), ranks, 7, start=20)
        assert first + rest == whole


@settings(max_examples=60, deadline=None)
@given(
    lengths=st.lists(st.integers(4, 9), min_size=1, max_size=9),
    per_shard=st.integers(1, 4),
    share=st.integers(1, 3),
    ranks=st.integers(1, 4),
    stop=st.integers(0, 6),
    seed=st.integers(0, 2**63),
)
def test_order_and_resume_for_any_shards_and_ranks(tmp_path_factory, lengths, per_shard, share, ranks, stop, seed):
    folder = make_shards(tmp_path_factory.mktemp("shards"), lengths, per_shard=per_shard)
    shards = LatentShards(folder)
    size = share * ranks
    setting = config(folder, batch_size=size, frames=4)
    whole = sequence(shards, setting, 1, 8, seed=seed)
    some = sequence(shards, setting, ranks, stop, seed=seed)
    rest = sequence(shards, setting, ranks, 8 - stop, start=stop * size, seed=seed)
    assert some + rest == whole
    keys = [key for step in take(8, shards, setting, seed=seed) for key in step.keys]
    for first in range(0, len(keys) - len(lengths) + 1, len(lengths)):
        assert sorted(keys[first : first + len(lengths)]) == shards.keys
    shutil.rmtree(folder)


def test_order_is_pinned_across_versions():
    assert epoch_order(0, 0, 10).tolist() == [0, 8, 9, 3, 7, 5, 1, 2, 6, 4]
    assert epoch_order(7, 3, 10).tolist() == [7, 1, 9, 6, 0, 4, 2, 8, 3, 5]
    assert sorted(epoch_order(1, 1, 1000)) == list(range(1000))
    assert not np.array_equal(epoch_order(1, 1, 1000), epoch_order(1, 2, 1000))


@given(available=st.integers(1, 200), frames=st.integers(1, 32), interval=st.integers(1, 8), seed=st.integers(0, 9))
def test_frames_are_even_and_inside(available, frames, interval, seed):
    if frames > available:
        return
    drawn = draw_frames(available, frames, interval, np.random.default_rng(seed))
    assert drawn.shape == (frames,)
    assert drawn[0] >= 0
    assert drawn[-1] < available
    steps = set(np.diff(drawn).tolist())
    assert len(steps) <= 1
    if steps:
        step = steps.pop()
        assert step == interval or (step < interval and (frames - 1) * (step + 1) + 1 > available)


def test_the_last_frame_can_be_drawn():
    random = np.random.default_rng(0)
    drawn = [draw_frames(50, 16, 3, random) for _ in range(100)]
    assert {0, 49} <= {int(frame) for frames in drawn for frame in frames}


def test_short_videos_are_left_out_with_a_warning(folder, shards, caplog):
    keys = {key for batch in take(6, shards, config(folder, frames=20)) for key in batch.keys}
    assert keys == {f"{video:09d}" for video, length in enumerate(LENGTHS) if length >= 20}
    assert "4 of 11 videos are shorter than 20 frames" in caplog.text
    with pytest.raises(ValueError, match=r"None of the 11 videos .* has 100 frames; the longest has 90"):
        batches(shards, config(folder, frames=100))


def test_settings_out_of_range_are_refused(folder, shards):
    for changes in ({"frames": 0}, {"interval": 0}, {"batch_size": 0}, {"workers": -1}):
        with pytest.raises(ValueError, match=f"data.{next(iter(changes))} is"):
            config(folder, **changes)
    with pytest.raises(ValueError, match="batch_size 4 cannot be shared by 3 ranks"):
        batches(shards, config(folder), world_size=3)


def damaged(folder, tmp_path, at=40_000):
    """A copy whose second shard has one bit flipped."""
    copy = tmp_path / "damaged"
    shutil.copytree(folder, copy)
    path = copy / "train-000001.tar"
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)
    return copy


@pytest.mark.parametrize("workers", [0, 2])
def test_a_corrupt_shard_stops_the_run_by_name(folder, tmp_path, workers):
    copy = damaged(folder, tmp_path)
    with pytest.raises(CorruptShardError, match=r"train-000001\.tar' is corrupt: frame \d+ of 'video\d.mp4'") as caught:
        take(200, LatentShards(copy), config(copy, workers=workers))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_corrupt_sample_is_skipped_with_a_count(folder, tmp_path, workers, caplog):
    copy = damaged(folder, tmp_path)
    steps = take(100, LatentShards(copy), config(copy, corrupt="skip", workers=workers))
    assert sum(batch.skipped for batch in steps) > 0
    assert all(len(batch.keys) == 4 for batch in steps)
    assert "train-000001.tar" in caplog.text
    again = sequence(LatentShards(copy), config(copy, corrupt="skip"), 2, 30)
    assert again == sequence(LatentShards(copy), config(copy, corrupt="skip"), 1, 30)


def test_any_flipped_bit_of_an_array_is_found(folder, tmp_path):
    good = LatentShards(folder)
    random = np.random.default_rng(0)
    data = (folder / "train-000000.tar").read_bytes()
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    unnoticed = 0
    for at in random.integers(0, len(data), 150):
        changed = bytearray(data)
        changed[at] ^= 1 << random.integers(8)
        (copy / "train-000000.tar").write_bytes(changed)
        shards = LatentShards(copy)
        for video in range(3):
            for flip in (False, True):
                frames = np.arange(shards.frames[video])
                try:
                    found = shards.read(video, frames, flip=flip)
                except CorruptShardError:
                    continue
                assert np.array_equal(found, good.read(video, frames, flip=flip))
                unnoticed += 1
    assert unnoticed  # damage elsewhere leaves the other arrays usable


def test_missing_and_cut_shards_are_found_at_once(folder, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    path = copy / "train-000002.tar"
    path.write_bytes(path.read_bytes()[:-512])
    with pytest.raises(CorruptShardError, match=r"train-000002\.tar' has \d+ bytes, the manifest says"):
        LatentShards(copy)
    path.unlink()
    with pytest.raises(CorruptShardError, match=r"Cannot read the shard .*train-000002\.tar"):
        LatentShards(copy)
    (copy / "train-000000.index.json").write_text("{}")
    with pytest.raises(CorruptShardError, match=r"index\.json' is not the file"):
        LatentShards(copy)


def test_other_shards_are_refused_with_a_sentence(folder, shards, tmp_path):
    shards.require(vae_identity="0123", latent_shape=(4, 4, 4))
    with pytest.raises(ValueError, match=r"made with the VAE 'none' \(0123\), not with 4567"):
        shards.require(vae_identity="4567")
    with pytest.raises(ValueError, match=r"latents of shape \(4, 4, 4\) \(frames of 32 pixels\), not \(4, 8, 8\)"):
        shards.require(latent_shape=(4, 8, 8))
    manifest = json.loads((folder / "manifest.json").read_text())
    with pytest.raises(ValueError, match="is of format 'fvdm-latents/0', this version reads"):
        Manifest.from_json(json.dumps(manifest | {"format": "fvdm-latents/0"}), "x")
    for text in ("", "[]", "{}", json.dumps(manifest | {"size_of_it": 3})):
        with pytest.raises(ValueError, match="x is not a manifest"):
            Manifest.from_json(text, "x")
    with pytest.raises(ValueError, match="holds no videos of the split 'test'; it has train"):
        LatentShards(folder, "test")
    with pytest.raises(ValueError, match=r"Cannot read .*no such file"):
        LatentShards(tmp_path)


@pytest.mark.parametrize(
    "form",
    [
        "file:{}",
        "{}/train-{{000000..000003}}.tar",
        "pipe:cat {}/train-{{000000..000003}}.tar",
        "pipe:cat '{}/train-000000.tar'",
    ],
)
def test_urls_as_webdataset_takes_them(folder, shards, tmp_path, form):
    url = form.format(folder)
    cache = tmp_path / "cache"
    remote = LatentShards(url, cache=str(cache))
    assert remote.keys == shards.keys[: len(remote)]
    for video in range(len(remote)):
        frames = np.arange(remote.frames[video])
        assert np.array_equal(remote.read(video, frames), shards.read(video, frames))
    if url.startswith("pipe"):
        assert len(list(cache.glob("*.tar"))) == len(remote.shards)
        assert not list(cache.glob("*.part"))


def test_http_with_workers(folder, tmp_path):
    if not shutil.which("curl"):
        pytest.skip("webdataset reads http through curl, which is not installed")
    code = "import functools, http.server as h; s = h.ThreadingHTTPServer(('127.0.0.1', 0), functools.partial("
    code += f"h.SimpleHTTPRequestHandler, directory={str(folder)!r}))"
    code += "; print(s.server_port, flush=True); s.serve_forever()"
    server = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    try:
        url = f"http://127.0.0.1:{int(server.stdout.readline())}/"
        remote = LatentShards(url, cache=str(tmp_path))
        setting = config(folder, workers=3)
        assert sequence(remote, replace(setting, path=url), 1, 6) == sequence(LatentShards(folder), setting, 1, 6)
        with pytest.raises(ValueError, match=r"Cannot read 'http://.*/nothing/manifest.json'"):
            LatentShards(url + "nothing", cache=str(tmp_path))
    finally:
        server.kill()
        server.wait()


def test_what_arrives_changed_is_refused(folder, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    path = copy / "train-000000.tar"
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    remote = LatentShards(f"pipe:cat {copy}/train-{{000000..000003}}.tar", cache=str(tmp_path / "cache"))
    with pytest.raises(CorruptShardError, match=r"train-000000\.tar' is not the file that the manifest lists"):
        remote.read(0, np.arange(3))
    assert not list((tmp_path / "cache").glob("*.tar"))


@pytest.mark.parametrize("path", ["pipe:cat x", "{a,b}/train-000000.tar"])
def test_urls_that_cannot_work(path):
    with pytest.raises(ValueError, match=r"names no \.tar|one folder"):
        Location(path)


def test_s3_goes_through_the_aws_command(folder, tmp_path, monkeypatch):
    tool = tmp_path / "bin" / "aws"
    tool.parent.mkdir()
    tool.write_text(f'#!/bin/sh\ncat "{folder}/${{3##*/}}"\n')
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tool.parent}:{os.environ['PATH']}")
    remote = LatentShards("s3://bucket/latents", cache=str(tmp_path / "cache"))
    assert remote.read(0, np.arange(3)).shape == (3, 8, 4, 4)


def test_many_shards_need_few_open_files(tmp_path):
    folder = make_shards(tmp_path, [4] * 100, per_shard=1)
    shards = LatentShards(folder)
    before = len(os.listdir("/proc/self/fd"))
    for video in list(range(100)) * 2:
        shards.read(video, np.arange(4))
    assert len(os.listdir("/proc/self/fd")) <= before + 64


def test_workers_shrug_off_signals_and_end_with_the_run(folder):
    """SIGUSR2 and SIGTERM to a worker change nothing; when the training process is killed, its workers end."""
    code = (
        "import itertools, sys\n"
        "from fvdm.data import *\n"
        f"s = LatentShards({str(folder)!r}); c = DataConfig({str(folder)!r}, batch_size=4, workers=2)\n"
        "for batch in batches(s, c):\n"
        "    print(batch.consumed, flush=True); sys.stdin.readline()\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=Path.cwd()
    )
    import psutil

    assert int(process.stdout.readline()) == 4
    workers = psutil.Process(process.pid).children()
    assert len(workers) >= 2
    for number in (signal.SIGUSR2, signal.SIGTERM, signal.SIGINT):
        for worker in workers:
            worker.send_signal(number)
    for step in range(2, 30):
        process.stdin.write("\n")
        process.stdin.flush()
        assert int(process.stdout.readline()) == 4 * step
    process.kill()
    process.wait()
    _, alive = psutil.wait_procs(workers, timeout=20)
    assert not alive


def test_closing_the_iterator_ends_the_workers(folder, shards):
    import psutil

    before = len(psutil.Process().children())
    stream = batches(shards, config(folder, workers=2))
    next(stream)
    assert len(psutil.Process().children()) >= before + 2
    stream.close()
    del stream
    deadline = time.monotonic() + 10
    while len(psutil.Process().children()) > before and time.monotonic() < deadline:
        time.sleep(0.1)
    assert len(psutil.Process().children()) <= before


def test_a_killed_worker_is_told_as_such(folder, shards):
    """Not as the trouble with a disk or a network that the broken pipe to it would look like."""
    import multiprocessing

    data = batches(shards, config(folder, workers=1))
    next(data)
    (worker,) = multiprocessing.active_children()
    worker.kill()
    with pytest.raises(RuntimeError, match=r"DataLoader worker|reads ahead"):
        list(itertools.islice(data, 100))


def test_an_exception_in_the_middle_ends_the_process_though_workers_read_ahead(folder):
    code = (
        "from fvdm.data import *; from fvdm.shards import LatentShards\n"
        f"s = LatentShards({str(folder)!r}); c = DataConfig({str(folder)!r}, batch_size=4, workers=2)\n"
        "for batch in batches(s, c): raise RuntimeError('in the middle')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    assert done.stderr.strip().splitlines()[-1] == "RuntimeError: in the middle"
