"""From a checkpoint on disk to files on disk, by the command a user types."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from PIL import Image

from fvdm import checkpoint as ckpt
from fvdm import config as settings
from fvdm.generate import GenerateConfig, generate, load, read_frames
from fvdm.media import tile, write_gif, write_mp4, write_strips
from fvdm.model import VideoDiT, preset
from fvdm.tasks import given_frames
from fvdm.train import TrainConfig
from fvdm.vae import load_vae
from tests.data_fixtures import real_frames, write_video
from tests.latte import randomised

FRAMES, SIDE = 8, 32


def make_run(root, classes=()):
    """A run of an untrained tiny model on the built-in VAE's latents, saved by the real code."""
    vae = load_vae()
    network = replace(
        preset("T/2"), channels=vae.channels, size=SIDE // vae.factor, frames=FRAMES, num_classes=len(classes)
    )
    model = randomised(VideoDiT(network))
    flat = torch.cat([p.detach().flatten() for p in model.parameters()])
    config = settings.parse(TrainConfig, ["--name", "r", "--data.path", "p", "--data.interval", "2"])
    state = {
        "names": {name: list(p.shape) for name, p in model.named_parameters()},
        "settings": settings.plain(config),
        "network": settings.plain(network),
        "vae": "builtin",
        "classes": list(classes),
        "size": SIDE,
    }
    ckpt.save(root / "checkpoints", 5, {name: flat.clone() for name in ckpt.SLICES}, 0, state, 0, 1, lambda: None)
    return root


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return make_run(tmp_path_factory.mktemp("run"))


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    return str(write_video(tmp_path_factory.mktemp("clip") / "clip.mp4", real_frames()[:40]))


def made(run, **changes):
    return generate(load(run), GenerateConfig(str(run), num=2, steps=3, **changes))


@pytest.mark.parametrize("task", ["generate", "image-to-video", "interpolate", "long"])
def test_every_task_runs_from_the_same_checkpoint(run, clip, task):
    given = "" if task == "generate" else clip
    length = {"length": 20} if task == "long" else {}
    videos = made(run, task=task, given=given, **length)
    assert videos.dtype == torch.uint8
    assert videos.shape == (2, 20 if task == "long" else FRAMES, 3, SIDE, SIDE)
    assert not torch.equal(videos[0], videos[1])
    indices = list(given_frames(task, FRAMES)) if given else []
    vae, frames = load_vae(), read_frames(clip, SIDE)
    # What is shown of a given frame is what the VAE makes of it: nothing in between has touched it.
    expected = vae.decode(vae.encode_mean(frames[[2 * k for k in indices]]))
    for video in videos:
        assert torch.equal(video[indices], expected)


def test_a_sample_is_the_same_in_any_batch(run):
    one, three = (made(run, task="generate", batch_size=k, seed=4) for k in (1, 3))
    assert (one.int() - three.int()).abs().max() <= 1
    shifted = made(run, task="generate", seed=5)
    assert (shifted[0].int() - one[1].int()).abs().max() <= 1


def test_given_may_be_images_a_folder_or_a_video(run, clip, tmp_path):
    pictures = []
    for k in (0, 14):
        pictures.append(str(tmp_path / f"{k}.png"))
        Image.fromarray(real_frames()[k]).save(pictures[-1])
    two = made(run, task="interpolate", given=pictures)
    folder = made(run, task="interpolate", given=str(tmp_path))
    assert torch.equal(two, folder)
    assert made(run, task="image-to-video", given=pictures[0]).shape[1] == FRAMES


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"task": "image-to-video"}, "name them with --given"),
        ({"task": "dance"}, "image-to-video"),
        ({"task": "image-to-video", "given": "/nowhere.mp4"}, "cannot read frames from /nowhere.mp4"),
        ({"task": "generate", "solver": "euler"}, "ddim, ddpm"),
        ({"task": "generate", "label": "cat"}, "no classes"),
    ],
)
def test_misuse_is_refused(run, changes, sentence):
    with pytest.raises(ValueError, match=sentence):
        made(run, **changes)


def test_classes_are_chosen_by_name_or_number(tmp_path):
    run = make_run(tmp_path, ("cat", "dog"))
    by_name, by_number = made(run, label="dog", guidance=3.0), made(run, label="1", guidance=3.0)
    assert torch.equal(by_name, by_number)
    assert not torch.equal(by_name, made(run, label="cat", guidance=3.0))
    with pytest.raises(ValueError, match="cat, dog"):
        made(run, label="bird")


def test_without_a_label_every_sample_draws_its_own_class(tmp_path):
    run = make_run(tmp_path, ("cat", "dog"))
    trained = load(run)
    several = generate(trained, GenerateConfig(str(run), num=8, steps=1))
    alone = generate(trained, GenerateConfig(str(run), num=1, steps=1, seed=3))
    assert (several[3].int() - alone[0].int()).abs().max() <= 1


@pytest.mark.slow
def test_the_command_writes_what_it_says(run, clip, tmp_path):
    command = [sys.executable, "-m", "fvdm.generate", "--checkpoint", str(run), "--task", "image-to-video"]
    command += ["--given", clip, "--num", "2", "--steps", "2", "--out", str(tmp_path / "out")]
    command += ["--tracking.uri", f"sqlite:///{tmp_path}/mlflow.db"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    out = tmp_path / "out"
    wanted = {f"image-to-video-{k:05d}.{suffix}" for k in (0, 1) for suffix in ("mp4", "gif")}
    wanted |= {f"image-to-video.{suffix}" for suffix in ("mp4", "png", "json")}
    assert {path.name for path in out.iterdir() if path.is_file()} == wanted
    assert json.loads((out / "image-to-video.json").read_text())["seed"] == 0
    with av.open(str(out / "image-to-video-00001.mp4")) as container:
        frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    assert np.stack(frames).shape == (FRAMES, SIDE, SIDE, 3)
    wrong = subprocess.run([*command, "--taks", "long"], cwd=tmp_path, capture_output=True, text=True)
    assert wrong.returncode == 2
    assert "did you mean task" in wrong.stderr
    assert "Traceback" not in wrong.stderr


def test_media_round_trip(tmp_path):
    video = torch.from_numpy(real_frames()[:6].copy()).permute(0, 3, 1, 2)
    write_mp4(video, tmp_path / "v.mp4", fps=12.5)
    write_gif(video, tmp_path / "v.gif")
    with av.open(str(tmp_path / "v.mp4")) as container:
        assert float(container.streams.video[0].average_rate) == 12.5
        back = np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])
    error = np.square(back.astype(float) - real_frames()[:6]).mean()
    assert 10 * np.log10(255**2 / error) > 35
    with Image.open(tmp_path / "v.gif") as gif:
        assert gif.n_frames == 6
    write_strips(torch.stack([video, video]), tmp_path / "s.png", columns=3)
    with Image.open(tmp_path / "s.png") as strip:
        assert strip.size == (3 * 176, 2 * 144)
    assert tile([video] * 3).shape == (6, 3, 288, 352)
    assert not [path for path in Path(tmp_path).iterdir() if path.name.startswith(".tmp")]
