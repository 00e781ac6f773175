import shutil

import numpy as np
import pytest
from PIL import Image

from data_prep import encode_latents
from data_prep.inspect_clips import decode_clip
from data_prep.inspect_shards import run, verify
from fvdm.data.shards import LatentShards
from fvdm.media.clips import ClipSpec, Piece, read_clips
from fvdm.media.preprocess import Preprocess
from fvdm.media.vae import load_vae
from tests.data_fixtures import (
    cut,
    make_clip_shards,
    make_shards,
    make_tree,
    make_vae,
    write_frames,
    write_video,
)


@pytest.fixture(scope="module")
def encoded(tmp_path_factory):
    folder = tmp_path_factory.mktemp("inspect")
    make_tree(folder / "videos", "ucf101")
    words = ["--videos", str(folder / "videos"), "--out", str(folder / "out"), "--vae", str(make_vae(folder / "vae"))]
    words += ["--size", "32", "--mlflow", "none", "--device", "cpu", "--workers", "2"]
    assert encode_latents.run(words) == 0
    return folder / "out"


def test_table_and_images(encoded, tmp_path, capsys):
    assert run([str(encoded), "--images", str(tmp_path)]) == 0
    text = capsys.readouterr().out
    assert "32 px, latents 4 x 4 x 4 as float16, with flipped copies" in text
    train = next(line.split() for line in text.splitlines() if line.startswith("train"))
    assert train[:4] == ["train", "1", "4", "80"]
    assert "'Archery': 2 videos" in text
    assert "PSNR" in text
    assert Image.open(tmp_path / "contact_sheet.png").size == (8 * 32, 4 * 32)
    both = np.asarray(Image.open(tmp_path / "reconstruction.png"))
    assert both.shape == (2 * 32, 8 * 32, 3)
    assert both[:32].std() > 20  # the upper row is the real video


def test_without_the_videos_there_is_no_reconstruction(encoded, tmp_path, capsys):
    assert run([str(encoded), "--images", str(tmp_path), "--videos", str(tmp_path)]) == 0
    assert "no reconstruction.png" in capsys.readouterr().out


def test_shards_that_came_without_their_plan(encoded, tmp_path, capsys):
    """The manifest knows how the videos were cut; where they are must be said."""
    shutil.copytree(encoded, tmp_path / "copy", ignore=shutil.ignore_patterns("plan.json"))
    words = [str(tmp_path / "copy"), "--vae", str(encoded.parent / "vae")]
    assert run(words) == 0
    assert "no reconstruction.png: there is no plan.json (--videos says" in capsys.readouterr().out
    assert run([*words, "--videos", str(encoded.parent / "videos")]) == 0
    assert "PSNR" in capsys.readouterr().out
    (tmp_path / "file").touch()
    assert run([*words, "--images", str(tmp_path / "file")]) == 2
    assert "File exists" in capsys.readouterr().err


def test_another_vae_is_refused(encoded, tmp_path, capsys):
    folder = make_shards(tmp_path / "other", [16])
    assert run([str(folder), "--vae", str(make_vae(tmp_path / "vae"))]) == 2
    assert "made with the VAE 'none' (0123), not with sha256" in capsys.readouterr().err


def test_no_shards_is_misuse(tmp_path, capsys):
    assert run([str(tmp_path)]) == 2
    assert "has no manifest.json" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["train-000000.tar", "train-000001.tar", "train-000001.index.json"])
def test_every_damage_is_found(tmp_path, name, capsys):
    folder = make_shards(tmp_path / "good", [16, 17, 18, 19], per_shard=2)
    assert verify(folder) == []
    random = np.random.default_rng(0)
    data = (folder / name).read_bytes()
    for at in random.integers(0, len(data), 20):
        changed = bytearray(data)
        changed[at] ^= 1 << random.integers(8)
        (folder / name).write_bytes(changed)
        assert verify(folder) == [f"{name} is not the file that was written (sha256 differs)"]
    (folder / name).write_bytes(data[:-1])
    assert run([str(folder), "--no-images"]) == 3
    assert f"CORRUPT {name}" in capsys.readouterr().err
    (folder / name).unlink()
    assert verify(folder) == [f"{name} is missing"]


def test_a_sample_there_twice_is_found(tmp_path):
    import hashlib
    import json

    folder = make_shards(tmp_path / "good", [16, 17], per_shard=1)
    for suffix in (".tar", ".index.json"):
        shutil.copy(folder / f"train-000000{suffix}", folder / f"train-000001{suffix}")
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["shards"][1] = manifest["shards"][0] | {"name": "train-000001.tar"}
    assert hashlib.sha256((folder / "train-000001.tar").read_bytes()).hexdigest() == manifest["shards"][1]["sha256"]
    (folder / "manifest.json").write_text(json.dumps(manifest))
    assert verify(folder) == ["the sample 000000000 is there 2 times"]


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    """Clips of two buckets and an image, with captions in other scripts, of the builtin VAE."""
    folder = tmp_path_factory.mktemp("clips")
    for number in range(2):
        frames = cut(number, 20)
        write_video(folder / "v" / f"{number}.mp4", frames.transpose(0, 2, 1, 3) if number else frames)
        (folder / "v" / f"{number}.txt").write_text(f"<b>clip</b> {number}\n一个人在说话")
    write_frames(folder / "v", cut(0)[:1], ["still.png"])
    words = ["--videos", str(folder / "v"), "--out", str(folder / "out"), "--buckets", "32x48,48x32", "--images"]
    words += ["--clip-frames", "9", "--captions", "txt", "--uncaptioned", "empty", "--mlflow", "none"]
    assert encode_latents.run([*words, "--device", "cpu", "--workers", "2"]) == 0
    return folder / "out"


def test_clips_are_shown_with_their_captions_and_buckets(clips, tmp_path, capsys):
    assert run([str(clips), "--images", str(tmp_path), "--batch-size", "2"]) == 0
    text = capsys.readouterr().out
    rows = [line.split() for line in text.splitlines()]
    assert rows[2][:3] == ["train", "1", "5"]
    assert [row[-1] for row in rows[4:8]] == ["train", "train", "train", "none"]
    assert "order (seed 0, batch size 2, 2 lanes): an epoch is" in text
    page = (tmp_path / "contact_sheet.html").read_text()
    assert page.count("<img src=") == 5
    assert "&lt;b&gt;clip&lt;/b&gt; 0<br>一个人在说话" in page
    assert page.count("<i>no caption</i>") == 1
    assert "bucket 1: 48 x 32 pixels, 9 x 12 x 8 latents, 2 clips" in page


def test_what_is_shown_is_the_frames(clips):
    """Decoded frames of a clip resemble those that were encoded."""
    shards = LatentShards(clips)
    shown = decode_clip(shards, load_vae("builtin"), 1, 3)
    spec = ClipSpec(((32, 48),), Preprocess(antialias=True), 9, 9, 9)
    pieces = [piece for piece in read_clips(clips.parent / "v" / "0.mp4", spec) if isinstance(piece, Piece)]
    expected = pieces[1].frames[[0, 4, 8]]
    assert np.abs(shown.astype(int) - expected).mean() < 12
    assert np.abs(shown[0].astype(int) - expected[0]).mean() < np.abs(shown[0].astype(int) - expected[2]).mean()


@pytest.mark.parametrize("name", ["train-000000.tar", "train.index.arrow", "empty_prompt.npy"])
def test_every_damage_of_clips_is_found(tmp_path, name, capsys):
    folder = make_clip_shards(tmp_path / "good", [(0, 1), (1, 0), (0, 2), (1, 1)], per_shard=2)
    assert verify(folder) == []
    data = (folder / name).read_bytes()
    for at in np.random.default_rng(0).integers(0, len(data), 10):
        changed = bytearray(data)
        changed[at] ^= 1
        (folder / name).write_bytes(changed)
        assert f"{name} is not the file that was written (sha256 differs)" in verify(folder)
    (folder / name).unlink()
    assert run([str(folder), "--no-images"]) == 3
    assert f"CORRUPT {name} is missing" in capsys.readouterr().err
