"""benchmarks/train_speed.py: all subjects in one run, a peer from a file, and one sentence for misuse."""

import shutil
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from benchmarks import train_speed
from benchmarks.train_subjects import Subject
from fvdm.config import join_repeated, parse
from fvdm.models import preset
from fvdm.models.layers import GELU
from tests.tiny_models import tiny_wan

PEER = """
from torch import nn
class Peer(nn.Module):
    def __init__(self, width, depth, heads, patch, channels, size, frames):
        super().__init__()
        self.mix = nn.Conv3d(frames, frames, 1)
    def forward(self, x, t):
        return self.mix(x)
"""
WORDS = ["--models", "T/2", "--clip", "4x4x8x8", "--rounds", "2", "--precisions", "fp32", "--no-diffusers"]


@pytest.mark.slow
def test_ours_compiled_ours_and_a_peer_take_turns(tmp_path, monkeypatch, capsys):
    if not shutil.which("c++"):
        pytest.skip("torch.compile needs a C++ compiler")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "peer.py").write_text(PEER)
    words = [*WORDS, "--kinds", "forward", "forward+backward", "--compile", "--peer", "peer.py:Peer"]
    train_speed.main(words)
    shown = dict(line.strip().rsplit(maxsplit=1) for line in capsys.readouterr().out.splitlines() if line[:2] == "  ")
    assert {"compiled fp32 forward / fvdm", "peer.py:Peer fp32 forward / compiled"} <= set(shown)
    assert "fvdm fp32 forward / compiled" not in shown
    seconds = {name: float(shown[f"{name} fp32 forward+backward, s"]) for name in ("fvdm", "peer.py:Peer")}
    ratio = float(shown["peer.py:Peer fp32 forward+backward / fvdm"])
    assert 0 < ratio < 1, "a single convolution"
    assert seconds["peer.py:Peer"] <= seconds["fvdm"]


def test_misuse_ends_with_a_sentence(tmp_path, capsys):
    with pytest.raises(SystemExit) as stopped:
        train_speed.main([*WORDS, "--peer", str(tmp_path / "none.py:Peer")])
    assert stopped.value.code == 2
    assert "there is no file" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        train_speed.main([*WORDS, "--clip", "4x4x8"])
    assert "give frames x channels x height x width" in capsys.readouterr().err
    many = join_repeated(["--peer", "a.py:A", "--depth", "1", "--peer=b.py:B"], "peer")
    assert parse(train_speed.TrainSpeedConfig, many).peer == ("a.py:A", "b.py:B")


def test_both_forms_of_gelu_are_one_function():
    x = torch.linspace(-30, 30, 2001, dtype=torch.float64, requires_grad=True)
    compiled = torch.compile(GELU(), fullgraph=True, backend="aot_eager")(x)
    plain = F.gelu(x, approximate="tanh")
    torch.testing.assert_close(compiled, plain, rtol=1e-12, atol=1e-12)
    slopes = [torch.autograd.grad(y.sum(), x)[0] for y in (compiled, plain)]
    torch.testing.assert_close(*slopes, rtol=1e-12, atol=1e-12)


def test_wan_beside_diffusers_with_a_timestep_per_token(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    folder = tiny_wan(tmp_path / "wan")
    words = [
        "--models",
        f"wan:{folder}",
        "--depth",
        "1",
        "--clip",
        "3x4x4x6",
        "--rounds",
        "1",
        "--kinds",
        "forward+backward",
    ]
    train_speed.main(words)
    shown = dict(line.strip().rsplit(maxsplit=1) for line in capsys.readouterr().out.splitlines() if line[:2] == "  ")
    for precision in ("fp32", "bf16"):
        assert float(shown[f"diffusers {precision} forward+backward / fvdm"]) > 0
    config = replace(preset(f"wan:{folder}").fit((4, 4, 6), 3, 0, False), depth=1)
    ours, theirs = (Subject(name, config, "fp32", 1, torch.device("cpu")) for name in ("fvdm", "diffusers"))
    ours.net.load_state_dict(theirs.net.net.state_dict())
    with torch.no_grad():
        torch.testing.assert_close(ours.net(*ours.inputs), theirs.net(*ours.inputs), rtol=1e-4, atol=1e-5)
    with pytest.raises(SystemExit):
        train_speed.main([*words, "--parity"])
    assert "takes texts" in capsys.readouterr().err
