"""The commands as a user types them first: without options, with --help, and without the packages."""

import os
import shutil
import subprocess
import sys
import venv
from pathlib import Path

import pytest

from data_prep.config import EncodeConfig, resolve
from fvdm.data.shards import LatentShards

ROOT = Path(__file__).resolve().parents[2]
SCRIPTS = ("encode_latents", "inspect_shards", "demo_clips", "moving_digits", "train_vae")


@pytest.mark.parametrize("name", SCRIPTS)
def test_help_is_in_the_words_of_the_field(name):
    command = [sys.executable, "-X", "importtime", str(ROOT / "data_prep" / f"{name}.py"), "--help"]
    shown = subprocess.run(command, capture_output=True, text=True, check=True)
    assert shown.stdout.startswith(f"usage: python data_prep/{name}.py ")
    assert "(type:" not in shown.stdout
    for package in ("torch", "jsonargparse", "av", "diffusers"):
        assert f"| {package}\n" not in shown.stderr, f"{package} takes long to import"


@pytest.fixture(scope="module")
def bare_python(tmp_path_factory):
    """A Python without any package."""
    folder = tmp_path_factory.mktemp("bare")
    venv.create(folder, with_pip=False)
    return folder / "bin" / "python"


@pytest.fixture
def clone(tmp_path):
    """A copy of the scripts and the library."""
    for name in ("data_prep", "fvdm"):
        shutil.copytree(ROOT / name, tmp_path / "clone" / name, ignore=shutil.ignore_patterns("__pycache__", "weights"))
    return tmp_path / "clone"


@pytest.mark.parametrize("name", SCRIPTS)
def test_without_the_packages_a_script_says_make_install(bare_python, clone, name):
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    command = [str(bare_python), f"data_prep/{name}.py"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=clone, env=environment)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert f"type: make install, then .venv/bin/python data_prep/{name}.py" in done.stderr


def test_a_script_takes_the_python_of_make_install(bare_python, clone):
    """`python data_prep/...` works after `make install`, though `python` is another one."""
    (clone / ".venv" / "bin").mkdir(parents=True)
    own = clone / ".venv" / "bin" / "python"
    own.write_text(f'#!/bin/sh\nexec "{sys.executable}" "$@"\n')
    own.chmod(0o755)
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    command = [str(bare_python), "data_prep/encode_latents.py", "--help"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=clone, env=environment)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("usage: python data_prep/encode_latents.py")


@pytest.mark.slow
def test_the_bare_command_encodes_the_clips_of_the_demo(tmp_path):
    command = [sys.executable, str(ROOT / "data_prep" / "encode_latents.py")]
    environment = {**os.environ, "MLFLOW_TRACKING_URI": f"sqlite:///{tmp_path}/mlflow.db"}
    for _ in range(2):
        done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment)
        assert done.returncode == 0, done.stderr
        assert "encodes the clips of the demo, demo/clips, to latents/sample" in done.stdout
        assert "For your own videos: python data_prep/encode_latents.py --videos DIR" in done.stdout
    shards = LatentShards(tmp_path / "latents" / "sample")
    assert len(shards) == len(list((tmp_path / "demo" / "clips").glob("*.mp4"))) > 40
    assert shards.manifest.vae == "builtin"
    assert shards.manifest.size == 64


def test_the_output_is_named_after_the_videos():
    assert resolve(EncodeConfig(videos="some/where/faces/")).out == "latents/faces"
    assert resolve(EncodeConfig(videos="some/where/faces/")).size == 256
    assert resolve(EncodeConfig(out="x")).videos == "demo/clips"
