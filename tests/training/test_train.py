"""Training on real DeepSpeed ranks over gloo: what resumes, and what is equal to what."""

import json
import re
import shutil

import pytest
import torch

from fvdm import config as settings
from fvdm.checkpoints.layout import SLICES
from fvdm.data.loader import batches
from fvdm.data.shards import LatentShards
from fvdm.diffusion.process import Diffusion
from fvdm.models import build
from fvdm.training.config import TrainConfig
from fvdm.training.data_identity import data_identity, data_mismatch
from fvdm.training.engine import accumulation
from fvdm.training.noise import NoiseSampler
from fvdm.training.setup import check, model_config
from tests.data_fixtures import make_shards
from tests.runs import losses, state, train, words


def plain(config, steps):
    """The same run in plain PyTorch, on one process: losses and weights."""
    shards = LatentShards(config.data.path)
    network = model_config(config, shards)
    torch.manual_seed(config.seed)
    model = build(network)
    optimizer = torch.optim.AdamW(model.parameters(), config.engine.lr, config.engine.betas, weight_decay=0)
    sample_noise = NoiseSampler(config, model, torch.device("cpu"))
    ema = [p.detach().clone() for p in model.parameters()]
    data = batches(shards, config.data, seed=config.seed)
    means = []
    for _ in range(steps):
        batch = next(data)
        t, noise, y = sample_noise(batch)
        loss = Diffusion().training_losses(model, batch.x_0, t, y, noise).mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), config.engine.grad_clip)
        optimizer.step()
        torch._foreach_lerp_(ema, [p.detach() for p in model.parameters()], 1 - config.ema_decay)
        means.append(loss.item())
    flat = torch.cat([p.detach().flatten() for p in model.parameters()])
    return means, flat, torch.cat([e.flatten() for e in ema])


@pytest.mark.slow
def test_zero_2_on_1_2_and_4_ranks_is_plain_adamw(latents, undisturbed, tmp_path):
    config = settings.parse(TrainConfig, words(latents, undisturbed, "run", "--steps", 8))
    means, weights, average = plain(config, 8)
    for ranks in (1, 4):
        train(ranks, words(latents, tmp_path, f"on-{ranks}", "--steps", 8), tmp_path)
    for folder, name in ((tmp_path, "on-1"), (undisturbed, "run"), (tmp_path, "on-4")):
        record, slices = state(folder, name)
        assert record["step"] == 8
        assert record["progress"]["consumed"] == 32
        assert list(losses(folder, name).values()) == pytest.approx(means, rel=1e-5)
        assert (slices["master"] - weights).abs().max() < 2e-5
        assert (slices["ema"] - average).abs().max() < 2e-5


@pytest.mark.slow
def test_an_interrupted_run_is_bit_identical_to_one_that_was_not(latents, undisturbed, tmp_path):
    train(2, words(latents, tmp_path, "run", "--steps", 3), tmp_path)
    first = json.loads((tmp_path / "runs/run/tracking.json").read_text())["run_id"]
    train(2, words(latents, tmp_path, "run", "--steps", 8), tmp_path)
    assert json.loads((tmp_path / "runs/run/tracking.json").read_text())["run_id"] == first
    (record, slices), (expected, reference) = state(tmp_path, "run"), state(undisturbed, "run")
    assert record["progress"] == expected["progress"]
    for name in SLICES:
        assert torch.equal(slices[name], reference[name]), name
    assert losses(tmp_path, "run") == losses(undisturbed, "run")


@pytest.mark.slow
def test_a_run_goes_on_with_another_number_of_ranks(latents, undisturbed, tmp_path):
    for ranks, steps in ((2, 2), (1, 4), (4, 6), (2, 8)):
        train(ranks, words(latents, tmp_path, "run", "--steps", steps), tmp_path)
    (record, slices), (expected, reference) = state(tmp_path, "run"), state(undisturbed, "run")
    assert record["progress"] == expected["progress"]
    got, wanted = losses(tmp_path, "run"), losses(undisturbed, "run")
    assert list(got.values()) == pytest.approx(list(wanted.values()), rel=1e-4)
    assert (slices["master"] - reference["master"]).abs().max() < 5e-5


@pytest.mark.slow
def test_accumulated_micro_batches_are_the_whole_batch(latents, undisturbed, tmp_path):
    train(1, words(latents, tmp_path, "run", "--steps", 8, "--engine.micro_batch", 1), tmp_path)
    (_, slices), (_, reference) = state(tmp_path, "run"), state(undisturbed, "run")
    assert (slices["master"] - reference["master"]).abs().max() < 5e-5


@pytest.mark.slow
def test_bf16_keeps_float32_masters_and_on_1_2_and_4_ranks_follows_the_float32_losses(latents, undisturbed, tmp_path):
    wanted = list(losses(undisturbed, "run").values())
    for ranks in (1, 2, 4):
        name = f"on-{ranks}"
        train(ranks, words(latents, tmp_path, name, "--steps", 8, "--engine.precision", "bf16"), tmp_path)
        got = list(losses(tmp_path, name).values())
        assert got == pytest.approx(wanted, rel=1e-3)
        assert got == pytest.approx(list(losses(tmp_path, "on-1").values()), rel=1e-4)
        master = state(tmp_path, name)[1]["master"]
        assert not torch.equal(master, master.bfloat16().float())


@pytest.mark.slow
def test_a_run_begins_with_the_weights_of_another(latents, undisturbed, tmp_path):
    """Of a run, or of a converted folder; a network of another shape is refused."""
    from fvdm.models import load_backbone

    _, slices = state(undisturbed, "run")
    still = ("--steps", 1, "--engine.lr", 0)
    train(1, words(latents, tmp_path, "run", *still, "--init", undisturbed / "runs/run"), tmp_path)
    assert torch.equal(state(tmp_path, "run")[1]["master"], slices["ema"])
    model = build(model_config(settings.parse(TrainConfig, words(latents, tmp_path, "x")), LatentShards(str(latents))))
    model.save_pretrained(tmp_path / "folder")
    train(1, words(latents, tmp_path, "other", *still, "--init", tmp_path / "folder"), tmp_path)
    flat = torch.cat([p.detach().flatten() for p in load_backbone(tmp_path / "folder").parameters()])
    assert torch.equal(state(tmp_path, "other")[1]["master"], flat)
    wrong = words(latents, tmp_path, "wrong", *still, "--init", tmp_path / "folder", "--model", "T/1")
    (output,) = train(1, wrong, tmp_path, code=2)
    assert "do not fit the model of this run" in output


@pytest.mark.slow
def test_a_run_of_another_model_is_refused(latents, undisturbed):
    (output,) = train(1, words(latents, undisturbed, "run", "--steps", 9, "--model", "T/1"), undisturbed, code=2)
    assert "model of another shape (T/2) than T/1" in output
    assert "Traceback" not in output


@pytest.mark.slow
def test_a_run_goes_on_with_the_latents_it_has_learnt_and_tells_of_other_videos(undisturbed, tmp_path):
    shutil.copytree(undisturbed / "runs" / "run", tmp_path / "runs" / "run")
    for name, field, sentence in (
        ("vae", {"vae_identity": "4567"}, "made with the VAE 'none' (4567), not with 0123"),
        ("size", {"latent_shape": (4, 8, 8)}, "hold latents of shape (4, 8, 8)"),
    ):
        other = make_shards(tmp_path / name, [12, 9], **field)
        arguments = words(other, tmp_path, "run", "--steps", 9)
        (output,) = train(1, arguments, tmp_path, code=2)
        assert sentence in output
        assert "Traceback" not in output
        with pytest.raises(ValueError, match=re.escape(sentence)):  # before the job waits in a queue
            check(settings.parse(TrainConfig, arguments), 1)
    more = make_shards(tmp_path / "more", [12] * 9)
    (output,) = train(1, words(more, tmp_path, "run", "--steps", 9, "--seed", 1), tmp_path)
    assert "not those of the unbroken run: seed was 0 and is 1; the videos in more are others" in output


def test_a_checkpoint_that_says_nothing_of_its_data_is_still_taken(latents, tmp_path):
    config = settings.parse(TrainConfig, words(latents, tmp_path, "run"))
    shards = LatentShards(latents)
    early = {"settings": settings.plain(config), "network": settings.plain(model_config(config, shards))}
    assert data_mismatch(early, settings.flatten(config), shards) == []
    assert data_mismatch(early | data_identity(shards), settings.flatten(config), shards) == []
    early["network"]["size"] = 8
    with pytest.raises(ValueError, match="hold latents of shape"):
        data_mismatch(early, settings.flatten(config), shards)


def test_accumulation_arithmetic():
    assert accumulation(16, 0, 2) == (8, 1)
    assert accumulation(16, 2, 2) == (2, 4)
