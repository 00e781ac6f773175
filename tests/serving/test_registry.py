"""Trained models in a real MLflow registry, over http: logged once, loaded in a fresh process, and nothing lost."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from fvdm import config as settings
from fvdm.generation.pipeline import load
from fvdm.serving import registry
from fvdm.serving.registry import RegistryConfig, columns, pack, predict, register
from fvdm.tracking import tracker as tracking
from fvdm.tracking.config import TrackingConfig
from fvdm.tracking.logged_model import LoggedModel
from fvdm.tracking.tracker import Tracker
from fvdm.training.config import TrainConfig
from tests.commands import fvdm
from tests.data_fixtures import make_shards, real_frames, write_video
from tests.generation.test_pipeline import FRAMES, SIDE, make_run
from tests.runs import train, words
from tests.tracking.conftest import QUIET, Server

ROOT = Path(__file__).parents[2]
FRESH = """
import sys, mlflow, numpy, pandas
model = mlflow.pyfunc.load_model(sys.argv[1])
given = open(sys.argv[2], "rb").read()
rows = {"task": ["generate", "image-to-video"], "seed": [7, 8], "steps": [2, 2], "class": ["dog", "cat"]}
table = pandas.DataFrame(rows | {"given": [None, given]})
numpy.save(sys.argv[3], model.predict(table))
print(model.metadata.signature.outputs)
"""


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return make_run(tmp_path_factory.mktemp("registry") / "cats", classes=("cat", "dog"))


@pytest.fixture(autouse=True)
def patience(monkeypatch):
    """A busy machine may take its time."""
    monkeypatch.setattr(tracking, "TIMEOUT", 120.0)


@pytest.fixture
def picture(tmp_path):
    from PIL import Image

    Image.fromarray(real_frames()[0]).save(tmp_path / "given.png")
    return tmp_path / "given.png"


def client_of(uri):
    from mlflow.tracking import MlflowClient

    return MlflowClient(uri)


@pytest.mark.slow
def test_a_model_is_registered_once_and_makes_the_same_clip_in_a_fresh_process(run, picture, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    server = Server(tmp_path)
    server.start()
    try:
        owner = Tracker(run, TrackingConfig(server.uri, **QUIET), "cats")
        owner.close()
        config = RegistryConfig(str(run), tracking=TrackingConfig(server.uri, **QUIET))
        assert 'load_model("models:/cats/latest")' in register(config)
        register(config)
        client = client_of(server.uri)
        (version,) = client.search_model_versions("name = 'cats'")
        assert version.run_id == owner.run_id
        (logged,) = client.search_logged_models([client.get_run(owner.run_id).info.experiment_id])
        assert (logged.name, logged.status.value, logged.source_run_id) == ("step-00000005", "READY", owner.run_id)
        environment = os.environ | {"MLFLOW_TRACKING_URI": server.uri, "PYTHONPATH": str(ROOT)}
        command = [sys.executable, "-c", FRESH, "models:/cats/1", str(picture), "clips.npy"]
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert f"(-1, -1, 3, {SIDE}, {SIDE})" in done.stdout
    finally:
        server.kill()
    trained = load(run)
    still = registry.frames_of(picture.read_bytes(), SIDE)
    expected = [trained.generate(seed=7, steps=2, class_="dog")]
    expected += [trained.generate("image-to-video", given=still, seed=8, steps=2, class_="cat")]
    assert np.array_equal(np.load(tmp_path / "clips.npy"), torch.cat(expected).numpy())
    pickles = [path for path in (tmp_path / "artifacts").rglob("*") if path.suffix in (".pkl", ".pickle", ".pt")]
    assert not pickles


@pytest.mark.slow
def test_a_training_of_two_ranks_registers_its_model_once(tmp_path):
    latents = make_shards(tmp_path / "latents", [12, 9, 10, 30, 8, 11, 6])
    command = words(latents, tmp_path, "cats", "--steps", 2)
    for _ in range(2):
        train(2, command, tmp_path)
    client = client_of(f"sqlite:///{tmp_path}/mlflow.db")
    (version,) = client.search_model_versions("name = 'cats'")
    run = client.get_run(version.run_id)
    assert run.info.status == "FINISHED"
    assert [output.step for output in run.outputs.model_outputs] == [2]
    flat = settings.flatten(settings.parse(TrainConfig, command))
    assert run.data.params == {name: str(value) for name, value in flat.items()}
    assert (tmp_path / "runs" / "cats" / "models" / "step-00000002" / "inference.json").is_file()
    train(2, words(latents, tmp_path, "dogs", "--steps", 1, "--register_as", "none"), tmp_path)
    assert [model.name for model in client.search_registered_models()] == ["cats"]


@pytest.mark.slow
def test_a_model_waits_for_a_server_that_is_away(run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "5")
    monkeypatch.setattr(tracking, "TIMEOUT", 2.0)
    server = Server(tmp_path)
    config = RegistryConfig(str(run), "later", tracking=TrackingConfig(server.uri, **QUIET))
    (run / "tracking.json").unlink(missing_ok=True)
    assert "type the same command again" in register(config)
    monkeypatch.setattr(tracking, "TIMEOUT", 120.0)
    server.start()
    try:
        assert "later: registered" in register(config)
        assert len(client_of(server.uri).search_model_versions("name = 'later'")) == 1, "told twice, registered once"
    finally:
        server.kill()


def test_an_upload_that_was_cut_short_is_taken_up(run, tmp_path, monkeypatch):
    from fvdm.tracking import logged_model as mlflow_model

    monkeypatch.chdir(tmp_path)
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    upload = mlflow_model._upload
    tries = []

    def flaky(*words):
        tries.append(words)
        if len(tries) == 1:
            raise OSError("cut")
        upload(*words)

    monkeypatch.setattr(mlflow_model, "_upload", flaky)
    (run / "tracking.json").unlink(missing_ok=True)
    register(RegistryConfig(str(run), "cut/short", tracking=TrackingConfig(uri, **QUIET)))
    (version,) = client_of(uri).search_model_versions("name = 'cut-short'")
    (logged,) = client_of(uri).search_logged_models(["1"])
    assert (len(tries), version.source, logged.status.value) == (2, f"models:/{logged.model_id}", "READY")
    about = (Path(logged.artifact_location.removeprefix("file://")) / "requirements.txt").read_text().split()
    assert f"torch=={torch.__version__.partition('+')[0]}" in about
    assert all("==" in line for line in about)


def test_a_model_that_is_gone_is_said_and_blocks_nothing(tmp_path, caplog):
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    tracker = Tracker(tmp_path / "run", TrackingConfig(uri, **QUIET), "gone")
    tracker.log_model(LoggedModel(str(tmp_path / "no"), "", "step-1", "gone", 1, {}, [], [], {}))
    tracker.metrics({"after": 1.0}, 2)
    tracker.close()
    assert "is gone" in caplog.text
    assert client_of(uri).get_run(tracker.run_id).data.metrics == {"after": 1.0}


def test_a_model_that_the_server_refuses_is_said_and_blocks_nothing(tmp_path, monkeypatch, caplog):
    from mlflow.exceptions import MlflowException

    from fvdm.tracking import logged_model as mlflow_model

    def refuse(*words):
        raise MlflowException.invalid_parameter_value("no such thing")

    monkeypatch.setattr(mlflow_model, "_upload", refuse)
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    tracker = Tracker(tmp_path / "run", TrackingConfig(uri, **QUIET), "refused")
    tracker.log_model(LoggedModel(str(tmp_path), "", "step-1", "refused", 1, {}, [], [], {}))
    tracker.close()
    assert "MLflow refuses the model" in caplog.text
    assert tracker.refused
    assert client_of(uri).get_run(tracker.run_id).info.status == "FINISHED"


def test_the_packed_folder_is_the_run(run, tmp_path):
    packed = pack(run / "checkpoints" / "step-00000005", tmp_path)
    assert (packed.folder, packed.step, packed.size) == (tmp_path / "step-00000005", 5, (SIDE, SIDE))
    before, after = load(run), load(packed.folder)
    assert (after.classes, after.size, after.stride) == (before.classes, before.size, before.stride)
    assert torch.equal(before.generate(steps=1, class_="cat"), after.generate(steps=1, class_="cat"))
    written = {path.name: path.stat().st_mtime_ns for path in packed.folder.iterdir()}
    assert pack(run / "checkpoints" / "step-00000005", tmp_path) == packed
    assert {path.name: path.stat().st_mtime_ns for path in packed.folder.iterdir()} == written
    again = pack(packed.folder, tmp_path / "elsewhere")
    assert (again.folder, again.size) == (packed.folder, (SIDE, SIDE))


def test_a_vae_of_a_folder_goes_with_the_model(run, tmp_path):
    from fvdm.media.vae import BUILTIN

    checkpoint = run / "checkpoints" / "step-00000005"
    copy = tmp_path / "step-00000005"
    copy.mkdir()
    for name in ("ema.safetensors", "state.json", "manifest.json"):
        (copy / name).write_bytes((checkpoint / name).read_bytes())
    state = json.loads((copy / "state.json").read_text()) | {"vae": str(BUILTIN)}
    (copy / "state.json").write_text(json.dumps(state))
    packed = pack(copy, tmp_path / "packed")
    assert load(packed.folder).vae.name == str(packed.folder / "vae")


def test_rows_are_clips_and_a_wrong_one_is_named(run, tmp_path):
    trained = load(run)
    clip = write_video(tmp_path / "clip.mp4", real_frames()[:40]).read_bytes()
    made = predict(trained, [{"steps": 1, "class": "dog"}, {"task": "interpolate", "steps": 1, "given": clip}])
    assert (made.dtype, made.shape) == (np.uint8, (2, FRAMES, 3, SIDE, SIDE))
    for row, sentence in (
        ({"class": "bird"}, "row 2: this model has no class 'bird'"),
        ({"task": "long", "length": 16}, "row 2 makes 16 frames, row 1 8"),
        ({"task": "image-to-video", "given": b"none"}, "row 2: cannot read frames"),
        ({"task": "any"}, "row 2: "),
    ):
        with pytest.raises(ValueError, match=sentence):
            predict(trained, [{"steps": 1}, {"steps": 1} | row])
    assert {"task", "seed", "steps", "class", "given"} <= columns().keys()
    assert not {"num", "batch_size", "guidance_interval"} & columns().keys()


def test_what_is_no_model_is_refused_with_a_sentence(tmp_path):
    done = fvdm("register", "--checkpoint", tmp_path)
    assert done.returncode == 2
    assert "holds no complete checkpoint" in done.stderr


def test_a_model_that_version_0_1_registered_still_predicts(run, tmp_path):
    """Its own copy of the former file imports `fvdm.pipeline` and `fvdm.registry`."""
    import mlflow
    import pandas as pd

    packed = pack(run / "checkpoints" / "step-00000005", tmp_path / "packed")
    code = str(Path(__file__).with_name("pyfunc_0_1.py"))
    mlflow.pyfunc.save_model(
        str(tmp_path / "model"), python_model=code, artifacts={"model": str(packed.folder)}, pip_requirements=["fvdm"]
    )
    clips = mlflow.pyfunc.load_model(str(tmp_path / "model")).predict(
        pd.DataFrame({"task": ["generate"], "seed": [7], "steps": [1], "class": ["dog"]})
    )
    assert np.array_equal(clips, load(run).generate(seed=7, steps=1, class_="dog").numpy())
