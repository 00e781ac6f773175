"""The held-out loss: the same on any number of ranks, right by hand, and without any effect on training."""

import json
from dataclasses import replace

import pytest
import torch

from fvdm.data.config import DataConfig
from fvdm.data.shards import LatentShards
from fvdm.diffusion.config import DiffusionConfig
from fvdm.diffusion.process import Diffusion
from fvdm.distributed import Ranks
from fvdm.models import build, preset
from fvdm.training.config import ValidationConfig
from fvdm.training.validation import HeldOutLoss, held_out_shards
from tests.data_fixtures import make_shards
from tests.latte import randomised
from tests.runs import losses, state, train, words


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    return LatentShards(str(make_shards(tmp_path_factory.mktemp("held-out"), [12, 9, 10, 30, 8])))


def network(shards, frames=6, **changes):
    config = preset("T/2").fit(shards.latent_shape, frames, 0, True)
    return randomised(build(replace(config, **changes))).eval()


ONE_RANK = Ranks()


def held_out(shards, ranks=ONE_RANK, frames=6, micro_batch=2, diffusion=None, **settings):
    config = ValidationConfig(**{"every": 1, "num": 5, "levels": 3} | settings)
    data = DataConfig(path="-", frames=frames, stride=1, workers=0)
    return HeldOutLoss(diffusion or Diffusion(), shards, data, config, ranks, torch.device("cpu"), micro_batch)


@pytest.mark.parametrize(("world_size", "micro_batch"), [(2, 2), (4, 1), (8, 3)])
def test_it_is_the_same_on_any_number_of_ranks(shards, world_size, micro_batch):
    model = network(shards)
    alone = held_out(shards)
    parts = [held_out(shards, Ranks(rank, rank, world_size), micro_batch=micro_batch) for rank in range(world_size)]
    whole, split = alone.losses(model), sum(part.losses(model) for part in parts)
    assert torch.allclose(whole, split, rtol=0, atol=1e-6)
    first, second = alone.summary(whole), alone.summary(split)
    assert first == pytest.approx(second, abs=1e-6)
    assert torch.equal(whole, alone.losses(model)), "fixed clips, noise and timesteps"


def test_each_cell_is_the_error_of_the_noise_by_own_and_neighbours_t(shards):
    """Against a direct computation of one cell, of one clip."""
    model, measure = network(shards), held_out(shards)
    grid = measure.losses(model)
    x_0, noise = measure._load(1)[0][0], measure._noise(0, torch.Size((6, 4, 4, 4)))[None]
    assert measure.levels == [167, 500, 833]
    t = torch.tensor([[167, 833] * 3])
    x_t = measure.diffusion.q_sample(x_0, t, noise)
    with torch.no_grad():
        error = (model(x_t, t, None)[:, :, :4] - noise).double().square().mean((2, 3, 4))[0]
    assert grid[0, 0, 2].item() == pytest.approx(error[::2].mean().item(), rel=1e-5)
    assert grid[0, 2, 0].item() == pytest.approx(error[1::2].mean().item(), rel=1e-5)
    values = measure.summary(grid)
    assert values["validation/t_0167_neighbours_0833"] == pytest.approx(grid[:, 0, 2].mean().item())
    assert values["validation/loss_one_t"] == pytest.approx(grid.mean(0).diagonal().mean().item())
    assert values["validation/loss"] == pytest.approx(grid.mean().item())
    assert len(values) == 3 + 9


@pytest.mark.parametrize("objective", ["eps", "v", "flow"])
def test_a_model_that_knows_the_clip_has_no_loss_whatever_the_objective(shards, objective):
    diffusion = Diffusion(DiffusionConfig(objective=objective, learned_variance=False))
    measure = held_out(shards, diffusion=diffusion, micro_batch=5)
    x_0 = torch.cat([clip for clip, _ in measure._load(5)])
    noise = torch.stack([measure._noise(number, x_0.shape[1:]) for number in range(5)])

    class Oracle(torch.nn.Module):
        config = preset("T/2")

        def forward(self, x, t, y=None):
            return diffusion.target(x_0, t, noise)

    assert measure.losses(Oracle()).max() < 1e-6


def test_a_clip_of_one_frame_has_no_neighbours(shards):
    values = held_out(shards, frames=1).summary(held_out(shards, frames=1).losses(network(shards, frames=1)))
    assert "validation/loss_t_per_frame" not in values
    assert values["validation/loss"] == values["validation/loss_one_t"] > 0
    assert len(values) == 2 + 3


def test_held_out_shards_must_fit(shards, tmp_path):
    data = DataConfig(path=str(shards.location.path))
    with pytest.raises(ValueError, match="test"):
        held_out_shards(ValidationConfig(), data, shards)
    other = make_shards(tmp_path / "other", [12, 9], vae_identity="4567")
    with pytest.raises(ValueError, match="4567"):
        held_out_shards(ValidationConfig(path=str(other), split="train"), data, shards)


@pytest.mark.slow
def test_training_is_the_same_with_it_and_it_is_logged(latents, undisturbed, tmp_path):
    more = ("--validation.every", 3, "--validation.path", latents, "--validation.split", "train", "--validation.num", 3)
    train(2, words(latents, tmp_path, "run", "--steps", 8, *more), tmp_path)
    assert losses(tmp_path, "run") == losses(undisturbed, "run")
    (_, slices), (_, reference) = state(tmp_path, "run"), state(undisturbed, "run")
    assert all(torch.equal(slices[name], reference[name]) for name in slices)
    events = [json.loads(line) for line in (tmp_path / "runs/run/events.jsonl").read_text().splitlines()]
    found = {e["step"]: e["metrics"]["validation/loss"] for e in events if "validation/loss" in e.get("metrics", {})}
    assert list(found) == [0, 3, 6, 8], "at the start, every three steps, and at the end"
    assert found[8] < found[0]
