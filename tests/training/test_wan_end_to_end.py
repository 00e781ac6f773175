"""From captioned clips to a fine-tuned Wan, one command each, with the tiny random models of tests/tiny_models.py.

Encoded, trained on two ranks, killed, resumed on one, generated from, exported; and diffusers' own pipeline, with the
exported weights, makes our videos.
"""

import subprocess
import sys

import numpy as np
import pytest

from fvdm import load
from fvdm.checkpoints.find import newest
from fvdm.checkpoints.read import read_state
from fvdm.cli import checkpoint
from fvdm.diffusion.guidance import Guidance
from fvdm.diffusion.sampling import SamplerConfig, draw_noise, generators
from fvdm.diffusion.solvers import solver
from fvdm.diffusion.timesteps import full_sequence
from fvdm.diffusion.video import sample_video
from fvdm.models import load_backbone
from tests.data_fixtures import real_frames, write_video
from tests.runs import ROOT, environment, losses, start, train, wait_until, words
from tests.tiny_models import tiny_pipeline

SIDE, FRAMES, TOKENS, SEED, STEPS, GUIDANCE = 32, 17, 8, 7, 4, 2.0
PROMPT = "a talking man"
WAN = ["--diffusion.objective", "flow", "--diffusion.learned_variance", "false", "--data.frames", "5"]
WAN += ["--timesteps.level", "shift", "--engine.lr", "1e-2", "--activation_checkpointing", "1"]
KINDS = {"lora": ["--lora.rank", "4", "--lora.alpha", "8"], "all weights": []}


def command(folder, *arguments, script=("-m", "fvdm")):
    words = [sys.executable, *script, *map(str, arguments)]
    done = subprocess.run(words, cwd=folder, env=environment(0, 1, 0), capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def encoded(tmp_path_factory):
    """A folder with `pipeline`, as diffusers saves it, and `latents` of six captioned clips of a real video."""
    folder = tmp_path_factory.mktemp("wan")
    tiny_pipeline(folder / "pipeline")
    for k in range(6):
        frames = real_frames()[FRAMES * k : FRAMES * (k + 1), ::4, ::4][:, :SIDE, :SIDE]
        write_video(folder / "videos" / f"{k}.mp4", frames, fps=16)
        (folder / "videos" / f"{k}.txt").write_text(PROMPT if k % 2 else "a red car drives along the street")
    models = ["--vae", folder / "pipeline/vae", "--text-encoder", folder / "pipeline", "--max-tokens", TOKENS]
    what = ["--videos", folder / "videos", "--out", folder / "latents", "--size", SIDE, "--clip-frames", FRAMES]
    command(folder, *what, *models, "--mlflow", "none", script=(str(ROOT / "data_prep/encode_latents.py"),))
    return folder


def diffusers_pipeline(folder, exported, kind):
    """Diffusers' own pipeline with what was exported."""
    from diffusers import AutoencoderKLWan, FlowMatchEulerDiscreteScheduler, WanPipeline, WanTransformer3DModel
    from transformers import AutoTokenizer, UMT5EncoderModel

    base = folder / "pipeline"
    pipeline = WanPipeline(
        tokenizer=AutoTokenizer.from_pretrained(base / "tokenizer"),
        text_encoder=UMT5EncoderModel.from_pretrained(base / "text_encoder"),
        vae=AutoencoderKLWan.from_pretrained(base / "vae"),
        scheduler=FlowMatchEulerDiscreteScheduler(),
        transformer=WanTransformer3DModel.from_pretrained(base / "transformer" if kind == "lora" else exported),
    )
    if kind == "lora":
        pipeline.load_lora_weights(exported)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_from_captioned_clips_to_what_diffusers_makes(encoded, tmp_path, kind):
    more = [*WAN, *KINDS[kind], "--model", f"wan:{encoded}/pipeline", "--checkpoint.every", 2]
    arguments = words(encoded / "latents", tmp_path, "mine", *more, "--steps")
    ranks = start(2, [*arguments, "100000"], tmp_path)
    checkpoints = tmp_path / "runs/mine/checkpoints"
    wait_until(lambda: newest(checkpoints))
    for rank in ranks:
        rank.kill()
        rank.communicate()
    killed = read_state(newest(checkpoints))
    train(1, [*arguments, str(killed["step"] + 2)], tmp_path)
    resumed = read_state(newest(checkpoints))
    assert (killed["world_size"], resumed["world_size"], resumed["step"]) == (2, 1, killed["step"] + 2)
    assert losses(tmp_path, "mine")[resumed["step"]] > 0

    given = ["--task", "image-to-video", "--given", encoded / "videos/1.mp4", "--prompt", PROMPT, "--num", 1]
    command(tmp_path, "generate", "--checkpoint", "runs/mine", *given, "--steps", STEPS, "--formats", "frames")
    assert len([*(tmp_path / "out").rglob("*.png")]) >= FRAMES

    checkpoint.main(["export", str(tmp_path / "runs/mine"), str(tmp_path / "exported")])
    theirs = diffusers_pipeline(encoded, tmp_path / "exported", kind)
    trained = load(tmp_path / "runs/mine", device="cpu")
    schedule = full_sequence(STEPS, 5)
    noise = draw_noise((1, 5, 4, SIDE // 8, SIDE // 8), generators([SEED]), "cpu")
    y, negative = (trained.text.encode([text]) for text in (PROMPT, ""))
    sampler = SamplerConfig(solver("ddim"), Guidance(GUIDANCE))
    ours, before = (
        sample_video(model, trained.diffusion, noise, schedule, [SEED], sampler, y, 5, negative)
        for model in (trained.model, load_backbone(f"wan:{encoded}/pipeline"))
    )
    set_timesteps, sigmas = theirs.scheduler.set_timesteps, (schedule[:-1, 0] / 1000).tolist()
    theirs.scheduler.set_timesteps = lambda _, device: set_timesteps(sigmas=sigmas, device=device)
    prompts = {"prompt": PROMPT, "negative_prompt": "", "guidance_scale": GUIDANCE, "max_sequence_length": TOKENS}
    shape = {"height": SIDE, "width": SIDE, "num_frames": FRAMES, "num_inference_steps": STEPS}
    made = theirs(**prompts, **shape, latents=noise.transpose(1, 2), output_type="latent").frames.transpose(1, 2)
    assert (made - ours).abs().max() < 1e-4
    assert (ours - before).abs().max() > 1e-2
    video = theirs(**prompts, **shape, latents=noise.transpose(1, 2), output_type="np").frames[0]
    frames = trained.vae.decode(ours)[0].permute(0, 2, 3, 1).numpy()
    assert np.abs(np.rint(video * 255) - frames).max() <= 1
