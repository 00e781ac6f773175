"""Weights that are not finite end every command with the tensor's name and exit code 2."""

import subprocess
import sys

import pytest
import torch

from fvdm.models import from_official
from tests.commands import fvdm
from tests.data_fixtures import make_shards
from tests.latte import OfficialLatte, randomised
from tests.runs import words

NAME = "blocks.0.mlp.fc1.weight"


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A checkpoint of Latte with one NaN, and a folder of ours with one infinity."""
    root = tmp_path_factory.mktemp("weights")
    official = randomised(OfficialLatte(2, 64, 2, 2, 4, 8, 6))
    weights = dict(official.state_dict())
    model = from_official(weights, num_heads=2)
    weights[NAME] = weights[NAME].clone()
    weights[NAME][0, 0] = float("nan")
    torch.save({"ema": weights}, root / "nan.pt")
    with torch.no_grad():
        model.final_layer.bias[3] = float("inf")
    model.save_pretrained(root / "folder")
    return root


def refused(done, name):
    assert done.returncode == 2, done.stderr
    assert f"are not finite: {name}, of" in done.stderr
    assert "Traceback" not in done.stderr


def test_convert_refuses_them_and_writes_nothing(files, tmp_path):
    refused(fvdm("convert", files / "nan.pt", tmp_path / "out", "--heads", "2"), NAME)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("source", "name"), [("nan.pt", NAME), ("folder", "final_layer.bias")])
def test_generate_refuses_them_and_writes_nothing(files, tmp_path, source, name):
    refused(fvdm("generate", "--checkpoint", files / source, "--out", tmp_path / "out"), name)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("source", "name"), [("nan.pt", NAME), ("folder", "final_layer.bias")])
def test_init_refuses_them(files, tmp_path, source, name):
    latents = make_shards(tmp_path / "latents", [20] * 4)
    line = [sys.executable, "-m", "fvdm.training.loop", *words(latents, tmp_path, "run", "--init", files / source)]
    refused(subprocess.run(line, capture_output=True, text=True), name)
