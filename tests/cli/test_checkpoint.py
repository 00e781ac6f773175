"""`fvdm checkpoint list|verify|export`, on the checkpoints of a small network."""

import json
import re
from dataclasses import replace

import pytest
import torch

from fvdm import config as settings
from fvdm.checkpoints.find import resolve, set_aside
from fvdm.checkpoints.layout import SLICES
from fvdm.checkpoints.read import read_weights
from fvdm.checkpoints.save import save
from fvdm.diffusion.config import DiffusionConfig
from fvdm.generation.pipeline import load
from fvdm.models import build, preset
from tests.commands import fvdm
from tests.latte import randomised


def write(run, step, seed=0):
    """A checkpoint of a random small network, as a training run writes it."""
    torch.manual_seed(seed)
    model = randomised(build(replace(preset("T/2"), channels=6, size=8, frames=4)))
    flat = torch.cat([p.detach().flatten() for p in model.parameters()])
    state = {
        "names": {name: list(p.shape) for name, p in model.named_parameters()},
        "settings": {"diffusion": settings.plain(DiffusionConfig()), "data": {"stride": 2}, "model": "T/2"},
        "network": settings.plain(model.config) | {"attention": "math", "activation_checkpointing": 1},
        "vae": "builtin",
        "classes": [],
        "size": 32,
        "latent_shape": [6, 8, 8],
    }
    slices = {name: flat + k for k, name in enumerate(SLICES)}
    return save(run / "checkpoints", step, slices, [0], state, 0, 1, lambda error="": None)


def test_list_and_verify(tmp_path):
    run = tmp_path / "run"
    _, new = write(run, 10), write(run, 20)
    listed = fvdm("checkpoint", "list", run).stdout
    assert [re.findall(r"step-(\d+).* (\d+) ranks  complete", line) for line in listed.splitlines()] == [
        [("00000010", "1")],
        [("00000020", "1")],
    ]
    assert fvdm("checkpoint", "verify", run).returncode == 0
    data = bytearray((new / "ema.safetensors").read_bytes())
    data[-1] ^= 1
    (new / "ema.safetensors").write_bytes(data)
    done = fvdm("checkpoint", "verify", run)
    assert done.returncode == 2
    assert "corrupt: the checksum of ema.safetensors" in done.stdout
    set_aside(new, "for a test")
    done = fvdm("checkpoint", "verify", run)
    assert done.returncode == 0
    assert re.search("corrupt-step-00000020 .* corrupt: for a test", done.stdout)
    assert "no checkpoint" in fvdm("checkpoint", "list", tmp_path / "nothing").stderr


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_export_writes_a_model_folder_that_load_takes(tmp_path, dtype):
    run = tmp_path / "run"
    checkpoint = write(run, 10)
    done = fvdm("checkpoint", "export", run, tmp_path / "out", "--dtype", dtype)
    assert done.returncode == 0, done.stderr
    names = {"config.json", "diffusion_pytorch_model.safetensors", "inference.json"}
    assert {path.name for path in (tmp_path / "out").iterdir()} == names
    before, after = load(run, device="cpu"), load(tmp_path / "out", device="cpu")
    assert (after.stride, after.size, after.classes) == (before.stride, before.size, before.classes) == (2, 32, ())
    weights = {name: value.to(getattr(torch, dtype)).float() for name, value in read_weights(checkpoint).items()}
    assert all(torch.equal(value, weights[name]) for name, value in after.model.state_dict().items())
    assert (after.model.config.attention, after.model.config.activation_checkpointing) == ("auto", 0)
    assert "exists" in fvdm("checkpoint", "export", run, tmp_path / "out").stderr


def test_a_folder_with_the_names_of_version_0_1_still_loads(tmp_path):
    write(tmp_path / "run", 10)
    out = tmp_path / "out"
    assert fvdm("checkpoint", "export", tmp_path / "run", out).returncode == 0
    now = load(out, device="cpu")
    former = {"config.json": {"activation_checkpointing": "recompute"}, "inference.json": {"stride": "interval"}}
    for file, names in former.items():
        values = json.loads((out / file).read_text())
        values = {names.get(name, name): value for name, value in values.items()}
        values |= {"_class_name": "VideoDiT"} if file == "config.json" else {}
        (out / file).write_text(json.dumps(values))
    then = load(out, device="cpu")
    assert (then.stride, then.model.config) == (2, now.model.config)
    pairs = zip(then.model.parameters(), now.model.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


def test_what_earlier_versions_exported_still_loads(tmp_path):
    """Up to version 0.1, export copied two files of weights, the state and a manifest of these."""
    checkpoint = write(tmp_path / "run", 10)
    out = tmp_path / "out"
    out.mkdir()
    names = ["model.safetensors", "ema.safetensors", "state.json"]
    files = json.loads((checkpoint / "manifest.json").read_text())["files"]
    for name in names:
        (out / name).write_bytes((checkpoint / name).read_bytes())
    (out / "manifest.json").write_text(json.dumps({"format": 1, "files": {name: files[name] for name in names}}))
    assert resolve(out) == out
    assert all(
        torch.equal(a, b)
        for a, b in zip(
            load(out, device="cpu").model.parameters(),
            load(tmp_path / "run", device="cpu").model.parameters(),
            strict=True,
        )
    )


def test_a_checkpoint_with_a_nan_is_not_exported(tmp_path):
    checkpoint = write(tmp_path / "run", 10)
    weights = read_weights(checkpoint)
    weights["final_layer.weight"][0, 0] = float("nan")
    from safetensors.torch import save_file

    save_file(weights, checkpoint / "ema.safetensors")
    from fvdm.checkpoints.layout import digest

    manifest = json.loads((checkpoint / "manifest.json").read_text())
    manifest["files"]["ema.safetensors"] = digest(checkpoint / "ema.safetensors")
    (checkpoint / "manifest.json").write_text(json.dumps(manifest))
    done = fvdm("checkpoint", "export", checkpoint, tmp_path / "out")
    assert done.returncode == 2
    assert "not finite: final_layer.weight" in done.stderr
    assert not (tmp_path / "out").exists()
