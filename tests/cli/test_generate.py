"""What a user types: files on disk, MLflow runs and sentences, in processes of their own, on one rank and on two."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
from pathlib import Path

import av
import numpy as np
import pytest
import torch

from fvdm.diffusion.tasks import TaskSpec, find
from fvdm.diffusion.timesteps import evenly_spaced, format_schedule
from fvdm.distributed import Ranks
from fvdm.generation import videos as command_line
from fvdm.generation.config import GenerateCommand
from fvdm.generation.inputs import read_source
from fvdm.generation.videos import batches
from fvdm.tracking.config import TrackingConfig
from fvdm.tracking.tracker import Tracker
from tests.generation.test_pipeline import FRAMES, SIDE, make_run
from tests.runs import wait_until

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return make_run(tmp_path_factory.mktemp("run"))


FIVE_LINES = """
import sys, fvdm
assert "torch" not in sys.modules, "import fvdm must stay cheap"
from fvdm import load
model = load({run!r})
video = model.generate(task="generate", seed=7, steps=2)
assert video.shape == (1, {frames}, 3, {side}, {side})
assert next(model.stream(seed=7, steps=4)).shape == (1, 3, {side}, {side})
"""


def test_the_python_interface_of_five_lines(run, tmp_path):
    words = FIVE_LINES.format(run=str(run), frames=FRAMES, side=SIDE)
    done = subprocess.run([sys.executable, "-c", words], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def command(run, out, *words):
    base = [sys.executable, "-m", "fvdm", "generate", "--checkpoint", str(run), "--steps", "2", "--out", str(out)]
    return [*base, "--tracking.uri", f"sqlite:///{out.parent}/mlflow.db", *words]


SPIED = """
import os, sys, torch
import fvdm.cli.generate
import fvdm.generation.videos
from fvdm.media.vae import VAE
decode, drawn = VAE.decode, []
VAE.decode = lambda self, latents: drawn.append(latents) or decode(self, latents)
fvdm.generation.videos.report = lambda *args: None
path = sys.argv.pop(1)
fvdm.cli.generate.main()
torch.save(drawn, path + os.environ.get("RANK", "0"))
"""


def generate_on(ranks, run, out, *words):
    """What the command says on each rank, and the latents of the batches that it has drawn there."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    started = []
    line = [sys.executable, "-c", SPIED, f"{out}.", *command(run, out, *words)[4:]]
    for rank in range(ranks):
        where = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks)}
        where |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "PYTHONPATH": os.getcwd()}
        environment = os.environ | (where if ranks > 1 else {"PYTHONPATH": os.getcwd()})
        started.append(subprocess.Popen(line, cwd=out.parent, env=environment, stdout=subprocess.PIPE, text=True))
    said = [process.communicate()[0] for process in started]
    assert [process.returncode for process in started] == [0] * ranks
    return said, [torch.load(f"{out}.{rank}") for rank in range(ranks)]


def test_two_ranks_draw_the_samples_and_write_the_files_of_one(tmp_path):
    """Eight seeds of a trained model, in batches of 8 or 1 on one rank, and of 1 or 3 on each of two."""
    words = ["--task", "generate", "--num", "8", "--solver", "ddpm", "--formats", "frames,mp4", "--batch-size"]
    reference: dict[int, torch.Tensor] = {}
    for ranks, size in ((1, 8), (1, 1), (2, 1), (2, 3)):
        said, latents = generate_on(ranks, "example", tmp_path / f"{ranks}-{size}", *words, str(size))
        assert "8 video(s)" in said[0]
        assert not any(said[1:])
        drawn = {}
        for rank, parts in enumerate(latents):
            planned = batches(GenerateCommand("run", num=8, batch_size=size), Ranks(rank, rank, ranks))
            for part, seeds in zip(parts, planned, strict=True):
                drawn |= dict(zip(seeds, part, strict=True))
        assert sorted(drawn) == list(range(8))
        reference = reference or drawn
        assert max((drawn[seed] - reference[seed]).abs().max().item() for seed in drawn) < 1e-5
    assert (reference[0] - reference[1]).abs().max() > 0.1
    assert 0.3 < torch.stack(list(reference.values())).std() < 3
    one, two = (sorted(p.relative_to(tmp_path / k) for p in (tmp_path / k).rglob("*.*")) for k in ("1-1", "2-1"))
    assert one == two
    for path in one:
        if path.suffix in (".png", ".mp4"):
            assert (tmp_path / "1-1" / path).read_bytes() == (tmp_path / "2-1" / path).read_bytes(), path


def test_videos_go_to_the_run_of_the_model_that_made_them(tmp_path):
    """Also where two models write into one folder."""
    from mlflow.tracking import MlflowClient

    where = TrackingConfig(f"sqlite:///{tmp_path}/mlflow.db", system_metrics=False)
    models = [make_run(tmp_path / name) for name in "abcd"]
    owners = [Tracker(folder, where, folder.name) for folder in models[:2]]  # The others were trained elsewhere.
    for owner in owners:
        owner.close()
    for k, folder in enumerate([*models, models[0]]):
        config = GenerateCommand(
            str(folder), out=str(tmp_path / "out"), formats="mp4", num=1, steps=1, seed=k, tracking=where
        )
        command_line.run(config, Ranks())
    client = MlflowClient(where.uri)
    found = client.search_runs([client.get_run(owners[0].run_id).info.experiment_id])
    files = {run.info.run_name: set() for run in found}
    assert sorted(run.info.run_name for run in found) == ["a", "b", "generate-generate", "generate-generate"]
    for run in found:
        names = {Path(file.path).name for file in client.list_artifacts(run.info.run_id, "generate/generate")}
        files[run.info.run_name] |= {int(number[1]) for name in names if (number := re.search(r"-(\d+)", name))}
        assert len(names) == 3 + (2 if run.info.run_name == "a" else 1)
    assert files == {"a": {0, 4}, "b": {1}, "generate-generate": {2, 3}}


def test_the_matrix_can_be_seen_before_it_is_walked(run, clip, tmp_path):
    words = ["--task", "interpolate", "--given", clip, "--show-matrix"]
    done = subprocess.run(command(run, tmp_path / "out", *words), cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert format_schedule(find("interpolate").plan(TaskSpec(evenly_spaced(2), FRAMES, FRAMES)).schedule) in done.stdout
    assert "frames 0, 14 of it" in done.stdout
    assert "at a stride of 2 frames" in done.stdout
    assert not (tmp_path / "out").exists()


def test_the_command_writes_what_it_says(run, clip, tmp_path):
    out = tmp_path / "out"
    line = command(run, out, "--task", "image-to-video", "--given", clip, "--num", "2")
    done = subprocess.run(line, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    wanted = {f"image-to-video-{k:05d}.{suffix}" for k in (0, 1) for suffix in ("mp4", "gif")}
    wanted |= {f"image-to-video.{suffix}" for suffix in ("mp4", "gif", "png", "json")}
    assert {path.name for path in out.iterdir() if path.is_file()} == wanted
    assert json.loads((out / "image-to-video.json").read_text())["seed"] == 0
    with av.open(str(out / "image-to-video-00001.mp4")) as container:
        assert float(container.streams.video[0].average_rate) == pytest.approx(read_source(clip, SIDE).fps / 2, abs=0.1)
        frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    assert np.stack(frames).shape == (FRAMES, SIDE, SIDE, 3)
    for words, sentence in ((["--taks", "long"], "did you mean task"), (["--class", "cat"], "no classes")):
        wrong = subprocess.run([*line, *words], cwd=tmp_path, capture_output=True, text=True)
        assert wrong.returncode == 2
        assert sentence in wrong.stderr
        assert "Traceback" not in wrong.stderr


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_ends_a_generation_with_a_sentence_and_complete_videos(run, tmp_path, number):
    out = tmp_path / "out"
    process = subprocess.Popen(
        [*command(run, out, "--num", "10000"), "--batch-size", "1"], cwd=tmp_path, stderr=subprocess.PIPE, text=True
    )
    wait_until(lambda: any(out.glob("*.mp4")))
    process.send_signal(number)
    _, error = process.communicate(timeout=60)
    assert process.returncode == 128 + number, error
    assert f"stopped by {number.name}; videos that are complete are kept" in error
    assert "Traceback" not in error
    assert not [path for path in out.iterdir() if path.name.startswith(".tmp-")]
