"""Weights that are not finite are refused by tensor name, by every command that reads them."""

import pytest
import torch

from fvdm.cli.main import main
from fvdm.models import build, load_backbone, preset
from fvdm.training.setup import initial_weights
from tests.latte import OfficialLatte, randomised

NAME = "blocks.0.mlp.fc1.weight"


@pytest.fixture
def checkpoint(tmp_path):
    """A checkpoint of Latte with a single NaN."""
    weights = dict(randomised(OfficialLatte(2, 64, 2, 2, 6, 8, 8, 0)).state_dict())
    weights[NAME] = weights[NAME].clone()
    weights[NAME][0, 0] = float("nan")
    torch.save({"ema": weights}, tmp_path / "nan.pt")
    return tmp_path / "nan.pt"


@pytest.mark.parametrize("command", ["convert", "generate"])
def test_commands_end_with_a_sentence_and_write_nothing(checkpoint, tmp_path, capsys, command):
    out = tmp_path / "out"
    words = {
        "convert": ["convert", str(checkpoint), str(out), "--heads", "2"],
        "generate": ["generate", "--checkpoint", str(checkpoint), "--out", str(out)],
    }
    if command == "generate":  # A model folder: the file alone would need the number of heads.
        model = build(preset("T/2").fit((6, 8, 8), 4))
        with torch.no_grad():
            model.blocks[0].mlp[0].weight[0, 0] = float("inf")
        model.save_pretrained(checkpoint.parent / "folder")
        words["generate"][2] = str(checkpoint.parent / "folder")
    with pytest.raises(SystemExit) as exit:
        main(words[command])
    assert exit.value.code == 2
    message = capsys.readouterr().err
    assert "are not finite: " + (NAME if command == "convert" else "blocks.0.mlp.0.weight") in message
    assert not out.exists()


def test_a_run_does_not_start_from_them(tmp_path):
    model = build(preset("T/2").fit((4, 4, 4), 6))
    with torch.no_grad():
        model.x_embedder.bias[1] = float("nan")
    model.save_pretrained(tmp_path / "folder")
    with pytest.raises(ValueError, match=r"not finite: x_embedder\.bias"):
        initial_weights(str(tmp_path / "folder"), build(preset("T/2").fit((4, 4, 4), 6)))
    with pytest.raises(ValueError, match=r"not finite: x_embedder\.bias"):
        load_backbone(tmp_path / "folder")
