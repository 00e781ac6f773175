"""Training Wan on latents with texts: from pretrained weights, and what does not fit."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from fvdm import config as settings
from fvdm.data.loader import batches
from fvdm.data.shards import LatentShards
from fvdm.diffusion.process import Diffusion
from fvdm.distributed import Ranks
from fvdm.training.config import PreviewConfig, TrainConfig
from fvdm.training.data_identity import data_mismatch, text_encoder
from fvdm.training.noise import NoiseSampler
from fvdm.training.previews import Previews
from fvdm.training.setup import check, initial_model, model_config
from tests.data_fixtures import make_clip_shards, make_shards
from tests.models.test_wan import diffusers_model
from tests.runs import losses, train, words

FLOW = ["--diffusion.objective", "flow", "--diffusion.learned_variance", "false", "--data.frames", "5"]


@pytest.fixture(scope="module")
def captioned(tmp_path_factory):
    """Seven clips of two sizes with up to three captions; the texts have 3 numbers a token and 4 tokens."""
    clips = [(0, 1), (0, 2), (0, 0), (0, 3), (0, 1), (1, 1), (1, 2)]
    return make_clip_shards(tmp_path_factory.mktemp("captioned"), clips, buckets=((5, 4, 6), (5, 6, 4)))


@pytest.fixture(scope="module")
def wan(tmp_path_factory):
    """A folder of diffusers with a tiny Wan that takes such texts."""
    folder = tmp_path_factory.mktemp("wan")
    diffusers_model(text_dim=3).save_pretrained(folder)
    return folder


def configure(shards, folder, *more):
    return settings.parse(TrainConfig, words(shards, folder, "wan", *FLOW, *more))


def test_it_begins_from_the_pretrained_weights_or_from_new_ones(captioned, wan, tmp_path):
    shards = LatentShards(captioned)
    config = configure(captioned, tmp_path, "--model", f"wan:{wan}")
    check(config, 1)
    network = model_config(config, shards)
    assert (network.frames, network.size, network.text_length) == (5, (4, 6), 4)
    expected = diffusers_model(text_dim=3).state_dict()
    model = initial_model(config, network, shards, resumed=False)
    assert all(torch.equal(weight, expected[name]) for name, weight in model.state_dict().items())
    new = initial_model(replace(config, init="none"), network, shards, resumed=False)
    assert not torch.equal(new.blocks[0].ffn.net[2].weight, expected["blocks.0.ffn.net.2.weight"])
    same = initial_model(replace(config, init=f"wan:{wan}"), network, shards, resumed=False)
    assert torch.equal(same.blocks[0].ffn.net[2].weight, expected["blocks.0.ffn.net.2.weight"])


def test_a_dropped_text_is_the_empty_prompt_of_the_data(captioned, wan, tmp_path):
    shards = LatentShards(captioned)
    config = configure(captioned, tmp_path, "--model", f"wan:{wan}", "--condition_dropout", "0.5")
    model = initial_model(config, model_config(config, shards), shards, resumed=False)
    sample_noise, data = NoiseSampler(config, model, torch.device("cpu")), batches(shards, config.data)
    empty = torch.zeros(4, 3)
    empty[0] = -1
    assert torch.equal(model.null(2), empty.expand(2, -1, -1))
    found = 0
    for batch in (next(data) for _ in range(10)):
        _, _, y = sample_noise(batch)
        dropped = [not torch.equal(a, b) for a, b in zip(y, batch.y, strict=True)]
        assert all(torch.equal(a, empty) for a, gone in zip(y, dropped, strict=True) if gone)
        found += sum(dropped)
    assert 8 <= found <= 28  # of 40, of which some have the empty prompt anyway


def test_previews_follow_the_texts_of_the_data_and_the_shift_of_training(captioned, wan, tmp_path, monkeypatch):
    shards = LatentShards(captioned)
    config = configure(captioned, tmp_path, "--model", f"wan:{wan}")
    model = initial_model(config, model_config(config, shards), shards, resumed=False)
    asked = []
    forward = model.forward
    monkeypatch.setattr(model, "forward", lambda x, t, y: asked.append((t, y)) or forward(x, t, y))
    settings_of = PreviewConfig(tasks=("image-to-video",), num=2, steps=4, guidance=3.0)
    previews = Previews(
        Diffusion(config.diffusion), shards, config.data, settings_of, Ranks(), model.device, tmp_path, shift=5.0
    )
    assert previews.sample(model)["image-to-video"].shape[:2] == (2, 5)
    assert [int(t[0, -1]) for t, _ in asked] == [1000, 938, 833, 625]
    assert all(torch.equal(y[2:], model.null(2)) and not t[:, 0].any() for t, y in asked)


@pytest.mark.slow
def test_without_a_t_per_frame_the_loss_is_that_of_plain_flow_matching_around_diffusers(captioned, wan, tmp_path):
    steps, more = 6, [*FLOW, "--model", f"wan:{wan}", "--p", "0", "--condition_dropout", "0.3"]
    train(1, words(captioned, tmp_path, "wan", *more, "--steps", steps), tmp_path)
    config = settings.parse(TrainConfig, words(captioned, tmp_path, "wan", *more))
    shards = LatentShards(captioned)
    own = initial_model(config, model_config(config, shards), shards, resumed=False)
    draw, data = NoiseSampler(config, own, torch.device("cpu")), batches(shards, config.data)  # the same draws

    network, expected = diffusers_model(text_dim=3), []
    optimizer = torch.optim.AdamW(network.parameters(), config.engine.lr, config.engine.betas, weight_decay=0)
    for _ in range(steps):
        x_0 = (batch := next(data)).x_0
        t, noise, y = draw(batch)
        sigma = t[:, 0].view(-1, 1, 1, 1, 1) / 1000
        x_t = (1 - sigma) * x_0 + sigma * noise
        velocity = network(x_t.transpose(1, 2), t[:, 0], y, return_dict=False)[0].transpose(1, 2)
        loss = F.mse_loss(velocity, noise - x_0)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), config.engine.grad_clip)
        optimizer.step()
        expected.append(loss.item())
    assert list(losses(tmp_path, "wan").values()) == pytest.approx(expected, abs=1e-5)


def test_data_that_do_not_fit_are_refused_in_one_sentence(captioned, latents, wan, tmp_path):
    def refused(shards, sentence, *more):
        config = configure(shards, tmp_path, "--model", f"wan:{wan}", *more)
        with pytest.raises(ValueError, match=sentence) as caught:
            check(config, 1)
        assert "\n" not in str(caught.value)

    refused(latents, "the shards in .* have none: encode the videos again, with captions")
    refused(captioned, "takes texts, not class labels|no class labels", "--conditional", "true")
    refused(captioned, "set diffusion.objective to flow", "--diffusion.objective", "v")
    refused(captioned, "set diffusion.objective to flow", "--diffusion.learned_variance", "true")
    other = make_clip_shards(tmp_path / "others", [(0, 1)] * 4, buckets=((5, 4, 5),))
    refused(other, "patches of 2 do not tile latent frames of 4 x 5")
    wide = tmp_path / "wide"
    diffusers_model(text_dim=7).save_pretrained(wide)
    refused(captioned, "embeddings of 7 numbers a token, those here have 3", "--model", f"wan:{wide}")
    (wide / "diffusion_pytorch_model.safetensors").unlink()
    refused(captioned, "embeddings of 7 numbers a token", "--model", f"wan:{wide}")


def test_missing_weights_are_found_before_a_job_waits(captioned, tmp_path):
    folder = tmp_path / "wan"
    diffusers_model(text_dim=3).save_pretrained(folder, max_shard_size="10KB")
    next(iter(sorted(folder.glob("*.safetensors")))).unlink()
    with pytest.raises(ValueError, match="lacks 1 of"):
        check(configure(captioned, tmp_path, "--model", f"wan:{folder}"), 1)
    with pytest.raises(ValueError, match="lacks 1 of"):
        check(configure(captioned, tmp_path, "--model", f"wan:{folder}", "--init", f"wan:{folder}"), 1)
    check(configure(captioned, tmp_path, "--model", f"wan:{folder}", "--init", "none"), 1)


def test_a_run_goes_on_with_the_same_text_encoder_alone(captioned, tmp_path):
    shards = LatentShards(captioned)
    config = settings.flatten(configure(captioned, tmp_path))
    state = {"latent_shape": (4, 4, 6), "settings": settings.plain(configure(captioned, tmp_path))}
    assert data_mismatch(state | {"text": text_encoder(shards)}, config, shards) == []
    with pytest.raises(ValueError, match=r"of the encoder other .* have those of t5 "):
        data_mismatch(state | {"text": {"name": "other", "identity": "0"}}, config, shards)


def test_class_labels_are_not_confused_with_texts(captioned, tmp_path):
    config = configure(captioned, tmp_path, "--model", "T/2", "--conditional", "true")
    with pytest.raises(ValueError, match="no class labels"):
        model_config(config, LatentShards(captioned))
    labelled = LatentShards(make_shards(tmp_path / "labelled", [8] * 4, labels=True))
    assert model_config(replace(config, data=replace(config.data, path=str(labelled.location.path))), labelled).classes
