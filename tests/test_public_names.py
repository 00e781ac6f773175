"""The names that others build on, each used as the documentation shows it."""

from dataclasses import replace

import pytest
import torch

import fvdm
from fvdm.diffusion import Diffusion, full_sequence, hold_clean, sample, sample_timesteps
from fvdm.evaluation import features, frechet_distance, load_i3d
from fvdm.media import load_vae
from fvdm.models import build, from_official, load_backbone, preset
from tests.latte import OfficialLatte, randomised

FRAMES = 16


@pytest.fixture(scope="module")
def model():
    return randomised(build(replace(preset("T/2"), size=8, frames=FRAMES))).eval()


def test_a_training_step(model):
    diffusion, generator = Diffusion(), torch.Generator().manual_seed(0)
    x_0 = torch.randn(2, FRAMES, 4, 8, 8)
    t = sample_timesteps(x_0.shape[:2], generator=generator)
    loss = diffusion.training_losses(model, x_0, t)
    assert loss.shape == t.shape == (2, FRAMES)
    assert diffusion.training_losses(model, x_0, t, y=None, noise=torch.randn_like(x_0)).isfinite().all()
    assert torch.equal(diffusion.q_sample(x_0, torch.zeros_like(t), torch.randn_like(x_0)), x_0)


def test_image_to_video_in_two_lines(model):
    diffusion, generator = Diffusion(), torch.Generator().manual_seed(0)
    x = torch.randn(2, FRAMES, 4, 8, 8, generator=generator)
    schedule = hold_clean(full_sequence(steps=5, frames=16), frames=[0])
    out = sample(model, x, schedule, diffusion, guidance=4.0, generator=generator)
    assert out.shape == x.shape
    assert torch.equal(out[:, 0], x[:, 0])
    assert not torch.equal(out[:, 1:], x[:, 1:])


def test_a_condition_is_passed_through():
    model = randomised(build(replace(preset("T/2"), size=8, frames=4, num_classes=3))).eval()
    x, y = torch.randn(2, 4, 4, 8, 8), torch.tensor([0, 2])
    schedule = full_sequence(steps=3, frames=4)
    guided = sample(model, x, schedule, Diffusion(), y=y, guidance=4.0)
    assert not torch.equal(guided, sample(model, x, schedule, Diffusion(), y=y))


def test_a_backbone_is_loaded_by_path_or_name(model, tmp_path):
    model.save_pretrained(tmp_path)
    x, t = torch.randn(1, FRAMES, 4, 8, 8), torch.full((1, FRAMES), 500)
    assert torch.equal(load_backbone(tmp_path)(x, t, None), model(x, t, None))
    assert load_backbone("example").config.latent_shape[1:] == (16, 16)


def test_official_weights_are_taken():
    official = OfficialLatte(4, 64, 4, 2, 4, 8, 6)
    assert from_official(official.state_dict(), num_heads=4).config.frames == 6


def test_load_makes_videos():
    video = fvdm.load("example").generate("generate", steps=2)
    assert video.dtype == torch.uint8
    assert video.ndim == 5


def test_a_vae_by_name():
    assert load_vae("builtin").channels > 0


def test_the_frechet_video_distance():
    clips = torch.randint(0, 256, (4, 16, 3, 32, 32), dtype=torch.uint8)
    try:
        net = load_i3d(path=None)
    except ValueError as error:
        pytest.skip(str(error))
    found = features(net, clips)
    assert found.shape == (4, 400)
    assert frechet_distance(found, found) == pytest.approx(0, abs=1e-3)
