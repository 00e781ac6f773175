import errno
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from data_prep import shards as shard_files
from data_prep.config import EncodeConfig, resolve
from data_prep.encode_latents import run
from data_prep.encoder import open_models
from data_prep.planning import EncodePlan, assign, make_plan
from data_prep.samples import make_sample
from data_prep.shards import Work
from fvdm.config import parse
from fvdm.data.shards import LatentShards
from fvdm.media.layouts import PAPER, Source
from fvdm.media.vae import load_vae
from fvdm.media.videos import Info, Preprocess, read_video
from tests.data_fixtures import (
    LAYOUTS,
    cut,
    make_clips,
    make_tree,
    make_vae,
    rejected,
    test_data,
    write_frames,
    write_video,
)

ROOT = Path(__file__).resolve().parents[2]
SIZE = 32


@pytest.fixture(scope="module")
def vae(tmp_path_factory):
    return make_vae(tmp_path_factory.mktemp("vae"))


@pytest.fixture(scope="module")
def videos(tmp_path_factory):
    """Seven clips of 16 to 22 frames, one of them corrupt."""
    folder = make_clips(tmp_path_factory.mktemp("videos"), 6)
    (folder / "3b.mp4").write_bytes(b"corrupt")
    return folder


def words(videos, out, vae, *more):
    # about two videos in a shard
    return ["--videos", str(videos), "--out", str(out), "--vae", str(vae), "--size", str(SIZE),
            "--device", "cpu",
            "--workers", "2", "--shard-mb", "0.035", "--mlflow", "none", *more]  # fmt: skip


def encode(videos, out, vae, *more):
    return run(words(videos, out, vae, *more))


def contents(folder: Path) -> dict[str, str]:
    """sha256 of every file that a finished run leaves, by name."""
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.parent.name != ".slurm")
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


@pytest.fixture(scope="module")
def undisturbed(videos, vae, tmp_path_factory):
    out = tmp_path_factory.mktemp("undisturbed") / "out"
    assert encode(videos, out, vae) == 3
    return out


def test_what_is_stored_is_what_the_vae_says(videos, vae, undisturbed):
    shards = LatentShards(undisturbed)
    net = load_vae(str(vae), torch.device("cpu"), torch.float32)
    assert shards.manifest.vae_identity == net.identity
    assert shards.latent_shape == (net.channels, SIZE // net.factor, SIZE // net.factor)
    assert shards.normalisation == net.normalisation
    assert shards.sources == [f"{number}.mp4" for number in range(6)]
    assert shards.frames.tolist() == [16, 17, 18, 19, 20, 21]
    for video, source in enumerate(shards.sources):
        *chunks, info = read_video(videos / source, SIZE, PAPER["ffs"], 100)
        assert info == Info(25.0, shards.frames[video])
        frames = torch.from_numpy(np.concatenate(chunks))
        for flip in (False, True):
            expected = net.encode(frames.flip(-1) if flip else frames).float().numpy()
            found = shards.read(video, np.arange(info.frames), flip=flip)
            assert np.abs(found - expected).max() < 2e-3 * max(1, np.abs(expected).max())


def test_files_of_a_run(undisturbed):
    names = set(contents(undisturbed))
    shards = [info.name for info in LatentShards(undisturbed).shards]
    assert len(shards) >= 3
    indices = {name.replace(".tar", ".index.json") for name in shards}
    assert names == {*shards, *indices, "manifest.json", "plan.json", "rejected.jsonl", ".lock"}
    assert list(rejected(undisturbed)) == ["3b.mp4"]
    manifest = json.loads((undisturbed / "manifest.json").read_text())
    assert manifest["rejected"] == 1
    assert all(info["bytes"] <= 1.2 * 35_000 for info in manifest["shards"])
    with tarfile.open(undisturbed / shards[0]) as tar:
        members = tar.getmembers()
    assert {member.mtime for member in members} == {0}
    assert [member.name for member in members[:4]] == [
        f"000000000.{suffix}" for suffix in ("crc.npy", "flip.npy", "json", "moments.npy")
    ]


def test_webdataset_reads_the_shards(undisturbed):
    webdataset = pytest.importorskip("webdataset")
    urls = [str(undisturbed / info.name) for info in LatentShards(undisturbed).shards]
    samples = list(webdataset.WebDataset(urls, shardshuffle=False).decode())
    assert [sample["json"]["source"] for sample in samples] == LatentShards(undisturbed).sources
    for sample in samples:
        assert sample["moments.npy"].dtype == np.float16
        assert sample["moments.npy"].shape == (sample["json"]["frames"], 8, 4, 4)


@pytest.mark.parametrize("more", [("--workers", "1"), ("--encoders", "3", "--workers", "4"), ("--jobs", "2")])
def test_bytes_do_not_depend_on_workers_or_jobs(videos, vae, undisturbed, tmp_path, more):
    assert encode(videos, tmp_path / "out", vae, *more) == 3
    assert contents(tmp_path / "out") == contents(undisturbed)


class Killed(BaseException):
    pass


def stop_at(monkeypatch, name, number, error):
    """Makes the number-th call of an os function in the shard writer fail."""
    function, calls = getattr(os, name), []

    def patched(*args):
        calls.append(args)
        if len(calls) == number:
            raise error
        return function(*args)

    monkeypatch.setattr(shard_files.os, name, patched)
    return calls


def test_killed_at_every_rename_and_started_again(videos, vae, undisturbed, tmp_path, monkeypatch):
    out = tmp_path / "out"
    number = 0
    while True:
        number += 1
        shutil.rmtree(out, ignore_errors=True)
        with monkeypatch.context() as patch:
            calls = stop_at(patch, "replace", number, Killed())
            try:
                encode(videos, out, vae)
            except Killed:
                assert not any(contents_differ(out, undisturbed))
        if len(calls) < number:
            break
        assert encode(videos, out, vae) == 3
        assert contents(out) == contents(undisturbed)
    assert number > 15


def contents_differ(out, undisturbed):
    """Names of shards and manifests that are there under their final names, and are not complete."""
    expected = contents(undisturbed)
    found = contents(out)
    found.pop("rejected.jsonl", None)  # at any exit it has what is known by then
    return [name for name, digest in found.items() if name in expected and expected[name] != digest]


@pytest.mark.parametrize("number", [1, 4, 12])
def test_full_disk_is_a_sentence_and_the_run_goes_on_later(
    videos, vae, undisturbed, tmp_path, monkeypatch, capsys, number
):
    with monkeypatch.context() as patch:
        stop_at(patch, "fsync", number, OSError(errno.ENOSPC, "No space left on device"))
        assert encode(videos, tmp_path / "out", vae) == 2
    assert "No space left on device. What is done is kept" in capsys.readouterr().err
    assert not list((tmp_path / "out").rglob(".tmp-*"))
    assert encode(videos, tmp_path / "out", vae) == 3
    assert contents(tmp_path / "out") == contents(undisturbed)


def test_a_finished_run_is_left_alone(videos, vae, undisturbed, capsys):
    before = {path: path.stat().st_mtime_ns for path in undisturbed.glob("*.tar")}
    assert encode(videos, undisturbed, vae) == 3
    assert "Every shard is complete" in capsys.readouterr().out
    assert before == {path: path.stat().st_mtime_ns for path in undisturbed.glob("*.tar")}


def test_another_setting_or_video_is_refused(videos, vae, undisturbed, tmp_path, capsys):
    assert encode(videos, undisturbed, vae, "--dtype", "bfloat16") == 2
    assert "was begun with dtype 'float16' (now 'bfloat16')" in capsys.readouterr().err
    shutil.copytree(videos, tmp_path / "more")
    (tmp_path / "more" / "new.mp4").write_bytes(b"x")
    assert encode(tmp_path / "more", undisturbed, vae) == 2
    assert "1 new, 0 gone, for example 'new.mp4'" in capsys.readouterr().err


def test_a_plan_of_which_nothing_was_encoded_is_replaced(videos, vae, undisturbed, tmp_path, capsys):
    """The advice to take a smaller --shard-mb can be followed; one finished video, and the plan stands."""
    out = tmp_path / "out"
    config = resolve(parse(EncodeConfig, words(videos, out, vae, "--shard-mb", "100")))
    out.mkdir()
    plan = make_plan(config, open_models(config).vae)
    Work(out, plan).reject(plan.shards[0], 3, "of the former plan", [1, 2])
    assert encode(videos, out, vae) == 3
    assert "nothing was encoded there yet; it is planned again" in capsys.readouterr().out
    assert contents(out) == contents(undisturbed)
    shutil.rmtree(out)
    out.mkdir()
    plan = make_plan(config, open_models(config).vae)
    moments = np.zeros((16, 8, 4, 4), np.float16)
    Work(out, plan).keep(plan.shards[0], 0, make_sample(0, plan.sources[0], 25.0, moments, moments))
    assert encode(videos, out, vae) == 2
    assert "was begun with shard_mb 100.0 (now 0.035)" in capsys.readouterr().err


def test_a_plan_with_jobs_in_the_queue_stands(videos, vae, tmp_path):
    config = resolve(parse(EncodeConfig, words(videos, tmp_path, vae)))
    make_plan(config, open_models(config).vae)
    with pytest.raises(ValueError, match="was begun with dtype"):
        make_plan(replace(config, dtype="bfloat16"), open_models(config).vae, replace_idle=False)


def test_strict_stops_at_the_first(videos, vae, tmp_path, capsys):
    assert encode(videos, tmp_path / "out", vae, "--strict") == 3
    assert not (tmp_path / "out" / "manifest.json").exists()
    assert "--strict" in capsys.readouterr().err


@pytest.mark.slow
def test_strict_stops_all_jobs(videos, vae, tmp_path, capsys):
    assert encode(videos, tmp_path / "out", vae, "--strict", "--jobs", "2") == 3
    assert not (tmp_path / "out" / "manifest.json").exists()


@pytest.mark.parametrize(
    ("more", "sentence"),
    [
        (("--size", "30"), "--size 30 is no multiple of 8"),
        (("--chunk", "0"), "chunk is 0"),
        (("--videos", "/nowhere"), "'/nowhere' is not a folder"),
    ],
)
def test_misuse_is_a_sentence_and_2(videos, vae, tmp_path, capsys, more, sentence):
    assert encode(videos, tmp_path / "out", vae, *more) == 2
    error = capsys.readouterr().err
    assert sentence in error
    assert "Traceback" not in error


def test_nothing_usable_is_2(vae, tmp_path, capsys):
    (tmp_path / "v").mkdir()
    assert encode(tmp_path / "v", tmp_path / "out", vae) == 2
    assert "holds no videos" in capsys.readouterr().err
    (tmp_path / "v" / "a.mp4").write_bytes(b"x")
    assert encode(tmp_path / "v", tmp_path / "out", vae) == 2
    assert "No video of 1 could be used" in capsys.readouterr().err


def test_two_runs_in_one_folder(videos, vae, tmp_path, capsys):
    import fcntl

    (tmp_path / "out").mkdir()
    with open(tmp_path / "out" / ".lock", "wb") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert encode(videos, tmp_path / "out", vae) == 2
    assert "Another encode_latents.py is writing" in capsys.readouterr().err


@pytest.mark.parametrize("layout", LAYOUTS)
def test_each_layout_converts_without_flags(vae, tmp_path, capsys, layout):
    expected = make_tree(tmp_path / "videos", layout)
    assert encode(tmp_path / "videos", tmp_path / "out", vae) == 0
    assert f"layout {layout}:" in capsys.readouterr().out
    shards = LatentShards(tmp_path / "out")
    assert shards.manifest.layout == layout
    assert shards.sources == expected["videos"]
    assert shards.labels.tolist() == [-1 if label is None else label for label in expected["labels"]]
    assert set(shards.frames.tolist()) == {expected["frames"]}
    assert shards.manifest.flip == PAPER[layout].flip


def test_real_class_folders(vae, tmp_path):
    source = test_data("weizmann_actions")
    for folder in sorted(source.iterdir()):
        for clip in sorted(folder.iterdir())[:2]:
            (tmp_path / "videos" / folder.name).mkdir(parents=True, exist_ok=True)
            shutil.copy(clip, tmp_path / "videos" / folder.name)
    assert encode(tmp_path / "videos", tmp_path / "out", vae) == 0
    shards = LatentShards(tmp_path / "out")
    assert shards.manifest.layout == "ucf101"
    assert shards.classes == tuple(sorted(folder.name for folder in source.iterdir()))
    assert shards.labels.tolist() == [0, 0, 1, 1, 2, 2, 3, 3]


def test_hostile_names_are_data(vae, tmp_path):
    names = [b"new\nline.mp4", b"\xff\xfe.mp4", b"; touch x.mp4", b"a.b.c.mp4"]
    for number, name in enumerate(names):
        write_video(tmp_path / "x.mp4", cut(number)).rename(tmp_path / "y.mp4")
        (tmp_path / "v").mkdir(exist_ok=True)
        os.rename(tmp_path / "y.mp4", os.path.join(os.fsencode(tmp_path / "v"), name))
    assert encode(tmp_path / "v", tmp_path / "out", vae) == 0
    assert [os.fsencode(source) for source in LatentShards(tmp_path / "out").sources] == sorted(names)


@pytest.mark.parametrize(("dtype", "least"), [("float16", 60), ("bfloat16", 42)])
def test_cost_of_rounding(videos, vae, tmp_path, dtype, least):
    assert encode(videos, tmp_path / "out", vae, "--dtype", dtype, "--no-flip") == 3
    shards = LatentShards(tmp_path / "out")
    *chunks, _ = read_video(videos / "0.mp4", SIZE, Preprocess(), 100)
    net = load_vae(str(vae), torch.device("cpu"), torch.float32)
    exact = net.encode(torch.from_numpy(np.concatenate(chunks))).float().numpy()[:, :4]
    error = np.square(shards.read(0, np.arange(16))[:, :4] - exact).mean()
    assert 10 * np.log10(exact.var() / error) > least


def test_assign_bounds_the_shards():
    sources = [Source(f"{n}", "file", split="train" if n < 7 else "test") for n in range(10)]
    frames = [100, 100, 100, 1000, 10, 10, 10, 10, 10, 10]
    plan = assign(sources, [1000 * count + 8192 for count in frames], 250_000)
    assert [(shard.name, shard.first, shard.end) for shard in plan] == [
        ("train-000000.tar", 0, 2),
        ("train-000001.tar", 2, 3),
        ("train-000002.tar", 3, 4),
        ("train-000003.tar", 4, 7),
        ("test-000000.tar", 7, 10),
    ]
    assert assign([], [], 1) == []


def test_plan_survives_json():
    plan = EncodePlan("/v", {"a": 1}, "ffs", [], [Source("\udcff", "file", 1)], [3], [("x", "y")], [])
    assert EncodePlan.from_json(plan.to_json()) == plan


def test_help_is_instant_and_unknown_words_are_refused():
    command = [sys.executable, "-X", "importtime", str(ROOT / "data_prep" / "encode_latents.py")]
    shown = subprocess.run([*command, "--help"], capture_output=True, text=True, check=True)
    assert not re.search(r"\| +torch$", shown.stderr, re.MULTILINE), "torch takes seconds to import"
    assert "--split-files" in shown.stdout
    done = subprocess.run([*command, "--videos", "x", "--out", "y", "--sise", "3"], capture_output=True, text=True)
    assert done.returncode == 2
    assert "there is no setting sise; did you mean size?" in done.stderr


def test_frame_folder_with_one_bad_frame_is_rejected(vae, tmp_path):
    for number in range(3):
        write_frames(tmp_path / "v" / f"{number}", cut(number), [f"{i:03d}.png" for i in range(20)])
    (tmp_path / "v" / "1" / "011.png").write_bytes(b"broken")
    assert encode(tmp_path / "v", tmp_path / "out", vae) == 3
    assert rejected(tmp_path / "out") == {"1": "'011.png' cannot be decoded: not an image"}
    assert LatentShards(tmp_path / "out").sources == ["0", "2"]


def test_throughput_goes_to_mlflow(videos, vae, tmp_path, monkeypatch):
    from mlflow.tracking import MlflowClient

    monkeypatch.chdir(tmp_path)
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    for _ in range(2):  # a second start continues the same run
        assert encode(videos, tmp_path / "out", vae, "--mlflow", uri) == 3
    client = MlflowClient(uri)
    runs = client.search_runs([client.get_experiment_by_name("encode").experiment_id])
    assert len(runs) == 1
    assert runs[0].info.status == "FINISHED"
    assert runs[0].data.params["layout"] == "ffs"
    assert runs[0].data.metrics["encode/total_videos"] == 6
    rates = [point.value for point in client.get_metric_history(runs[0].info.run_id, "encode/frames_per_second")]
    assert max(rates) > 0
    assert {item.path for item in client.list_artifacts(runs[0].info.run_id)} == {"manifest.json", "rejected.jsonl"}
