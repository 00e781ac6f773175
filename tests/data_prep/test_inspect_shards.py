import shutil

import numpy as np
import pytest
from PIL import Image

from data_prep import encode_latents
from data_prep.inspect_shards import run, verify
from tests.data_fixtures import make_shards, make_tree, make_vae


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
