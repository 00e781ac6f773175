"""Shards that are damaged, missing, of another kind, or far away."""

import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest

from fvdm.data.location import CorruptShardError, Location
from fvdm.data.opening import read_manifest
from fvdm.data.shards import LatentShards
from tests.data_fixtures import make_shards
from tests.loading import config, sequence, take


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
        read_manifest(json.dumps(manifest | {"format": "fvdm-latents/0"}), "x")
    for text in ("", "[]", "{}", json.dumps(manifest | {"size_of_it": 3})):
        with pytest.raises(ValueError, match="x is not a manifest"):
            read_manifest(text, "x")
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
        assert not list(cache.glob(".tmp-*"))


def test_http_with_workers(folder, tmp_path):
    code = "import functools, http.server as h; s = h.ThreadingHTTPServer(('127.0.0.1', 0), functools.partial("
    code += f"h.SimpleHTTPRequestHandler, directory={str(folder)!r}))"
    code += "; print(s.server_port, flush=True); s.serve_forever()"
    server = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    try:
        url = f"http://127.0.0.1:{int(server.stdout.readline())}/"
        remote = LatentShards(url, cache=str(tmp_path))
        setting = config(folder, workers=3, lanes=4)
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


def test_many_shards_need_few_open_files(tmp_path):
    folder = make_shards(tmp_path, [4] * 100, per_shard=1)
    shards = LatentShards(folder)
    before = len(os.listdir("/proc/self/fd"))
    for video in list(range(100)) * 2:
        shards.read(video, np.arange(4))
    assert len(os.listdir("/proc/self/fd")) <= before + 64
