"""Format 2: what is written comes back, through this library and through WebDataset's own reader."""

import json
import pickle

import numpy as np
import pytest
import torch
import webdataset as wds

from fvdm.data.clips import read_clip
from fvdm.data.format import CLIP_FORMAT
from fvdm.data.location import CorruptShardError
from fvdm.data.opening import read_manifest
from fvdm.data.shards import LatentShards
from tests.data_fixtures import make_clip_shards, make_shards

CLIPS = [(0, 1), (1, 0), (0, 2), (0, 0), (1, 1), (0, 3), (0, 1)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_clip_shards(tmp_path_factory.mktemp("clips"), CLIPS)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_clips_flips_and_embeddings_come_back(tmp_path, dtype):
    shards = LatentShards(make_clip_shards(tmp_path, CLIPS, dtype=dtype))
    assert len(shards) == 7
    assert shards.manifest.causal
    exact = {"float16": 1e-3, "bfloat16": 1e-2}[dtype]
    for v, (bucket, captions) in enumerate(CLIPS):
        f, c, h, w = shards.shape(v)
        assert (f, h, w) == [(5, 4, 6), (1, 4, 4)][bucket]
        moments = shards.read(v, np.arange(f))
        assert moments.shape == (f, 2 * c, h, w)
        expected = torch.full((f, 4, h, w), float(v)) + torch.arange(f)[:, None, None, None] / 1000
        assert torch.allclose(torch.from_numpy(moments[:, :4]), expected, rtol=exact)
        assert np.array_equal(shards.read(v, np.arange(f), flip=True)[:, :4], -moments[:, :4])
        for caption in range(captions):
            embedding = shards.embedding(v, caption)
            assert embedding.shape == (caption + 1, 3)
            assert np.allclose(embedding, v + caption / 10, rtol=exact)
        if not captions:
            assert np.array_equal(shards.embedding(v, 0), np.full((1, 3), -1, np.float32))


def test_webdataset_reads_every_sample_caption_and_embedding(folder):
    shards = LatentShards(folder)
    urls = [str(folder / shard.name) for shard in shards.shards]
    found = list(wds.WebDataset(urls, shardshuffle=False).decode())
    assert [sample["__key__"] for sample in found] == shards.keys
    for v, sample in enumerate(found):
        f = len(sample["moments.npy"])
        assert np.array_equal(sample["moments.npy"].astype(np.float32), shards.read(v, np.arange(f)))
        assert np.array_equal(sample["flip.npy"].astype(np.float32), shards.read(v, np.arange(f), flip=True))
        assert sample["json"]["source"] == shards.sources[v]
        assert sample["json"]["captions"] == [f"caption {k} of {v}" for k in range(CLIPS[v][1])]
        assert len(sample["json"]["tokens"]) == CLIPS[v][1]
        for k in range(CLIPS[v][1]):
            parts = np.split(sample["embeddings.npy"], np.cumsum(sample["json"]["tokens"])[:-1])
            assert np.array_equal(parts[k].astype(np.float32), shards.embedding(v, k))
        clip = read_clip(json.dumps(sample["json"]).encode())
        assert (clip.window.first, clip.window.frames) == (81 * v, 4 * (f - 1) + 1)


def test_one_span_is_one_read(folder, tmp_path, monkeypatch):
    """With the checksums, which lie beside the frames, in both formats; a large gap is not read."""
    import os

    reads, pread = [], os.pread
    monkeypatch.setattr(os, "pread", lambda file, size, offset: reads.append(size) or pread(file, size, offset))
    LatentShards(folder).read(0, np.arange(5))
    videos = LatentShards(make_shards(tmp_path, [60]))
    videos.read(0, 3 + 3 * np.arange(16))
    assert len(reads) == 2
    monkeypatch.setattr("fvdm.data.shards.GAP", 100)
    videos.read(0, 3 + 3 * np.arange(16))
    assert len(reads) == 2 + 17


def test_a_flipped_bit_of_an_embedding_is_found(folder, tmp_path):
    copy = make_clip_shards(tmp_path, CLIPS)
    shards = LatentShards(copy)
    path = copy / shards.shards[0].name
    data = bytearray(path.read_bytes())
    data[shards.samples.number("embeddings", 2) + 3] ^= 4
    path.write_bytes(data)
    for caption in (0, 1):
        with pytest.raises(CorruptShardError, match=r"the text embeddings of 'video2.mp4' \(000000002\)"):
            shards.embedding(2, caption)
    assert shards.read(2, np.arange(5)).shape == (5, 8, 4, 6)


def test_tables_of_another_folder_are_refused(folder, tmp_path):
    copy = make_clip_shards(tmp_path / "copy", CLIPS)
    table = copy / "train.index.arrow"
    data = bytearray(table.read_bytes())
    data[len(data) // 2] ^= 1
    table.write_bytes(data)
    with pytest.raises(CorruptShardError, match=r"train\.index\.arrow' is not the file that the manifest lists"):
        LatentShards(copy)
    table.unlink()
    with pytest.raises(CorruptShardError, match=r"Cannot read the table .*no such file"):
        LatentShards(copy)


def test_some_shards_by_name_and_shards_in_another_process(folder):
    some = LatentShards(f"{folder}/train-{{000001..000002}}.tar")
    assert some.sources == [f"video{v}.mp4" for v in range(3, 7)]
    assert some.read(1, np.arange(1))[0, 0, 0, 0] == 4
    again = pickle.loads(pickle.dumps(some))
    assert again.keys == some.keys
    assert np.array_equal(again.read(0, np.arange(5)), some.read(0, np.arange(5)))


@pytest.mark.parametrize(
    ("where", "value", "sentence"),
    [
        (("shards", 0, "sha256"), "../../etc/passwd", "not a SHA-256 checksum"),
        (("shards", 0, "sha256"), "0" * 63, "not a SHA-256 checksum"),
        (("shards", 0, "sha256"), None, "not a SHA-256 checksum"),
        (("shards", 0, "name"), "../train-000000.tar", "not a plain file name"),
        (("shards", 0, "name"), "/tmp/x.tar", "not a plain file name"),
        (("shards", 0, "name"), ".tar", "not a plain file name"),
        (("shards", 0, "name"), "x.json", "not a plain file name"),
        (("shards", 0, "bytes"), -1, "the size of|bytes of"),
        (("shards", 0, "samples"), "3", "samples of"),
        (("dtype",), "float64", "dtype is 'float64'"),
        (("dtype",), "float16; import os", "dtype is"),
    ],
)
def test_what_a_manifest_must_not_hold(folder, tmp_path, where, value, sentence):
    for source in (folder, make_shards(tmp_path, [4, 4])):
        fields = json.loads((source / "manifest.json").read_text())
        part = fields
        for key in where[:-1]:
            part = part[key]
        part[where[-1]] = value
        with pytest.raises(ValueError, match=rf"^x is not a valid manifest of latent shards: .*({sentence})") as caught:
            read_manifest(json.dumps(fields).encode(), "x")
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("where", "value", "sentence"),
    [
        (("indices", 0, "name"), "..arrow", "not a plain file name"),
        (("indices", 0, "sha256"), "", "not a SHA-256 checksum"),
        (("indices", 0, "rows"), 6, "has 6 rows for 7 samples"),
        (("text", "empty_prompt"), "../secret.npy", "not a plain file name"),
        (("text", "width"), 0, "width of the text embeddings is 0"),
        (("buckets",), [], "no buckets"),
        (("buckets", 0, "height"), -4, "height of a bucket is -4"),
        (("normalisation", "scale"), [float("nan")], "not finite"),
    ],
)
def test_what_a_manifest_of_clips_must_not_hold(folder, where, value, sentence):
    fields = json.loads((folder / "manifest.json").read_text())
    assert fields["format"] == CLIP_FORMAT
    part = fields
    for key in where[:-1]:
        part = part[key]
    part[where[-1]] = value
    with pytest.raises(ValueError, match=sentence):
        read_manifest(json.dumps(fields).encode(), "x")


def test_an_empty_bucket_does_not_decide_the_shape(tmp_path):
    shards = LatentShards(make_clip_shards(tmp_path, [(1, 1), (1, 0)]))
    assert shards.latent_shape[1:] == (4, 4)
    assert shards.shape(0) == (1, *shards.latent_shape)


def test_the_former_format_names_one_bucket(tmp_path):
    shards = LatentShards(make_shards(tmp_path, [5, 6]))
    (bucket,) = shards.manifest.buckets
    assert (bucket.frames, bucket.height, bucket.width) == (0, 4, 4)
    assert not shards.manifest.causal
    assert shards.manifest.text is None
