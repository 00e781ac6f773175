"""The clips that a tiny Wan learns by heart: every part works, with two clips and one step of everything."""

import json

import pytest
import torch
from PIL import Image

from benchmarks import overfit_wan, overfitting


@pytest.mark.slow
def test_it_trains_measures_and_draws(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(overfitting, "CLIPS", overfitting.CLIPS[1:3])
    words = ["--out", str(tmp_path), "--steps", "1", "--vae_steps", "1", "--sampling_steps", "1"]
    overfit_wan.main(words)
    found = json.loads((tmp_path / "figures.json").read_text())
    answers = found["answers"]
    assert set(answers["nearest"]) <= {0, 1}
    assert answers["captions"] == ["a man leans to the window", "a rabbit climbs out of a hole"]
    # What a still image gets depends on the clips alone, whatever the model has learned.
    assert answers["still"] == pytest.approx([16.5, 19.5], abs=0.5)
    assert [row["task"] for row in found["encodings"]].count("long") == 2
    assert "of 2 its own" in capsys.readouterr().out
    assert Image.open(tmp_path / "overfit.png").width > 3 * 5 * overfitting.SIDE


def test_the_clips_are_those_of_the_package():
    clip = overfitting.read_clip(*overfitting.CLIPS[0][:2])
    assert clip.shape == (overfitting.LENGTH, 3, overfitting.SIDE, overfitting.SIDE)
    assert clip.dtype == torch.uint8
    assert not torch.equal(clip[0], clip[1])
