"""Fine-tuning on real DeepSpeed ranks: LoRA and all weights, killed, resumed, and of another base."""

import shutil

import pytest
import torch

from fvdm import config as settings
from fvdm.checkpoints.find import newest
from fvdm.checkpoints.layout import SLICES
from fvdm.checkpoints.read import read_state
from fvdm.cli import checkpoint
from fvdm.data.shards import LatentShards
from fvdm.models import build, load_backbone
from fvdm.models.lora_files import Base, weights_hash
from fvdm.training.config import TrainConfig
from fvdm.training.finetuning import base_of, check_resumed_lora, place
from fvdm.training.setup import check, initial_model, model_config
from tests.data_fixtures import make_clip_shards
from tests.latte import randomised
from tests.models.test_wan import diffusers_model
from tests.runs import losses, start, state, train, wait_until, words

FLOW = ["--diffusion.objective", "flow", "--diffusion.learned_variance", "false", "--data.frames", "5"]
LORA = ["--lora.rank", "3", "--lora.alpha", "6", "--lora.dropout", "0.2", "--activation_checkpointing", "1"]
# Sums of two ranks are those of two micro-batches to the last bit, if nothing is clipped: a norm is summed in order.
EXACT = ["--engine.micro_batch", "2", "--engine.grad_clip_start", "1000"]


@pytest.fixture(scope="module")
def captioned(tmp_path_factory):
    clips = [(0, 1), (0, 2), (0, 0), (0, 3), (0, 1)]
    return make_clip_shards(tmp_path_factory.mktemp("captioned"), clips, buckets=((5, 4, 6),))


@pytest.fixture(scope="module")
def wan(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wan") / "base"
    diffusers_model(text_dim=3).save_pretrained(folder)
    return folder


def arguments(captioned, folder, wan, *more):
    return words(captioned, folder, "run", *FLOW, *EXACT, "--model", f"wan:{wan}", *more)


def parsed(*args):
    return settings.parse(TrainConfig, arguments(*args))


@pytest.mark.slow
def test_killed_on_two_ranks_and_resumed_on_one_it_is_the_unbroken_run(captioned, wan, tmp_path):
    (tmp_path / "whole").mkdir()
    train(1, arguments(captioned, tmp_path / "whole", wan, *LORA, "--steps", 6), tmp_path)
    every = ["--checkpoint.every", 2, "--checkpoint.keep_every", 2]
    broken = arguments(captioned, tmp_path, wan, *LORA, *every, "--steps")
    ranks = start(2, [*broken, "1000"], tmp_path)
    wait_until(lambda: newest(tmp_path / "runs/run/checkpoints"))
    for rank in ranks:
        rank.kill()
        rank.communicate()
    for folder in (tmp_path / "runs/run/checkpoints").iterdir():
        if folder.name > "step-00000004":
            shutil.rmtree(folder)
    first = newest(tmp_path / "runs/run/checkpoints")
    assert read_state(first)["world_size"] == 2
    train(1, [*broken, "6"], tmp_path)
    whole = losses(tmp_path / "whole", "run")
    assert {step: losses(tmp_path, "run")[step] for step in whole} == whole
    (record, slices), (_, expected) = state(tmp_path, "run"), state(tmp_path / "whole", "run")
    assert all(torch.equal(slices[name], expected[name]) for name in SLICES)
    assert not torch.equal(slices["ema"], slices["master"])  # of what is trained
    assert all(".lora_" in name for name in record["names"])
    sha256 = weights_hash(diffusers_model(text_dim=3).state_dict())
    assert record["base"] == {"source": f"wan:{wan}", "sha256": sha256}
    assert (record["lora"]["rank"], record["lora"]["alpha"]) == (3, 6.0)
    total = sum(slices["master"].shape)
    header = 20_000
    assert all(path.stat().st_size < 16 * total + header for path in first.glob("*.safetensors"))
    with torch.no_grad():
        (other := diffusers_model(text_dim=3)).proj_out.bias += 1
    other.save_pretrained(tmp_path / "other")
    (output,) = train(1, arguments(captioned, tmp_path, tmp_path / "other", *LORA, "--steps", 7), tmp_path, code=2)
    assert "has trained a LoRA of the base model" in output
    assert "Traceback" not in output


def test_what_a_run_cannot_begin_with_is_refused_in_one_sentence(captioned, latents, wan, tmp_path):
    def refused(sentence, *more, data=captioned):
        config = settings.parse(TrainConfig, words(data, tmp_path, "run", *more))
        with pytest.raises(ValueError, match=sentence) as caught:
            check(config, 1)
        assert "\n" not in str(caught.value)

    of_wan = [*FLOW, "--model", f"wan:{wan}", "--lora.rank", "4"]
    check(settings.parse(TrainConfig, words(captioned, tmp_path, "run", *of_wan)), 1)
    refused("no linear layer to_x", *of_wan, "--lora.targets", "to_q", "to_x")
    refused("needs a pretrained base model", *of_wan, "--init", "none")
    refused("needs a pretrained base model", "--lora.rank", "4", data=latents)
    refused("holds no complete checkpoint|no such file", "--lora.rank", "4", "--init", "nowhere", data=latents)
    refused("holds neither|holds no", *of_wan, "--init", f"wan:{tmp_path}")


def test_a_run_goes_on_with_the_same_layers_of_the_same_base(captioned, wan, tmp_path):
    config = parsed(captioned, tmp_path, wan, *LORA)
    before = {"lora": settings.plain(config.lora), "base": {"source": "wan:here", "sha256": "1" * 64}}
    check_resumed_lora(before, config, Base("wan:there", "1" * 64))
    check_resumed_lora({}, parsed(captioned, tmp_path, wan))
    check_resumed_lora(before, parsed(captioned, tmp_path, wan, *LORA, "--lora.dropout", "0"))
    with pytest.raises(ValueError, match=r"base model wan:here .* and wan:there is another"):
        check_resumed_lora(before, config, Base("wan:there", "2" * 64))
    with pytest.raises(ValueError, match=r"lora\.alpha was 6\.0 and is 1\.0"):
        check_resumed_lora(before, parsed(captioned, tmp_path, wan, *LORA, "--lora.alpha", "1"))
    for earlier, more in ((before, []), ({}, LORA)):
        with pytest.raises(ValueError, match="so far, not"):
            check_resumed_lora(earlier, parsed(captioned, tmp_path, wan, *more))


def test_the_frozen_weights_alone_lie_in_the_precision_of_training(captioned, wan, tmp_path):
    config, shards = parsed(captioned, tmp_path, wan, *LORA), LatentShards(captioned)
    model = initial_model(config, model_config(config, shards), shards, resumed=True)  # the base is not in a checkpoint
    own = base_of(config, model.config, model)
    assert own == Base(f"wan:{wan}", weights_hash(diffusers_model(text_dim=3).state_dict()))
    place(model, torch.device("cpu"), "bf16")
    assert {(p.dtype, p.requires_grad) for p in model.parameters()} == {(torch.float32, True), (torch.bfloat16, False)}


@pytest.mark.slow
def test_latte_takes_a_lora_too_and_both_exports_are_what_generates(latents, tmp_path, capsys):
    network = model_config(settings.parse(TrainConfig, words(latents, tmp_path, "lora")), LatentShards(str(latents)))
    randomised(build(network)).save_pretrained(tmp_path / "base")
    more = ["--init", tmp_path / "base", "--lora.rank", 2, "--lora.targets", "qkv", "--engine.precision", "bf16"]
    train(1, words(latents, tmp_path, "lora", *more, "--steps", 2), tmp_path)
    assert read_state(newest(tmp_path / "runs/lora/checkpoints"))["base"]["source"] == str(tmp_path / "base")
    merged, base = load_backbone(tmp_path / "runs/lora"), load_backbone(tmp_path / "base")
    changed = {
        name for name, weight in merged.state_dict().items() if not torch.equal(weight, base.get_parameter(name))
    }
    assert changed == {f"blocks.{i}.attn.qkv.weight" for i in range(2)}
    checkpoint.main(["export", str(tmp_path / "runs/lora"), str(tmp_path / "merged"), "--merge"])
    exported = load_backbone(tmp_path / "merged").state_dict()
    assert all(torch.equal(weight, exported[name]) for name, weight in merged.state_dict().items())
    checkpoint.main(["export", str(tmp_path / "runs/lora"), str(tmp_path / "small")])
    again = load_backbone(tmp_path / "small").state_dict()
    assert all(torch.equal(weight, again[name]) for name, weight in merged.state_dict().items())
    with pytest.raises(SystemExit, match="2"):
        checkpoint.main(["export", str(tmp_path / "runs/lora"), str(tmp_path / "new"), "--base", "x"])
    assert "holds no base model" in capsys.readouterr().err
