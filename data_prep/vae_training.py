"""Trains the small image VAE that ships with the package; `data_prep/train_vae.py` is the command."""

import math
import os
import shutil
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from data_prep.config import TrainVAEConfig
from fvdm.files import atomic_write

IMAGES = {".jpg", ".jpeg", ".png"}
VIDEOS = {".mp4", ".avi", ".mkv", ".webm"}
SHORT_SIDE = 320  # sources are kept at this size; crops are taken from them
CROP = 64  # pixels of a crop for training; the network is convolutional
FRAME = 128  # pixels of a frame that is evaluated


def architecture() -> dict[str, Any]:
    """Configuration of the diffusers AutoencoderKL: 4x smaller, 6 channels, narrow where pixels are many."""
    return {
        "in_channels": 3,
        "out_channels": 3,
        "down_block_types": ("DownEncoderBlock2D",) * 3,
        "up_block_types": ("UpDecoderBlock2D",) * 3,
        "block_out_channels": (16, 32, 64),
        "layers_per_block": 1,
        "latent_channels": 6,
        "norm_num_groups": 8,
        "sample_size": FRAME,
        "mid_block_add_attention": False,
    }


def read_images(source: Path, every: int) -> Iterator[np.ndarray]:
    """uint8 `(h w 3)` images of a file: the photograph itself, or every n-th frame of a video."""
    from PIL import Image, ImageOps

    Image.MAX_IMAGE_PIXELS = None

    def shrink(image: Image.Image) -> np.ndarray:
        factor = SHORT_SIDE / min(image.size)
        size = [max(SHORT_SIDE, round(side * factor)) for side in image.size]
        return np.asarray(image.convert("RGB").resize((size[0], size[1]), Image.Resampling.LANCZOS, reducing_gap=3))

    if source.suffix.lower() in IMAGES:
        with Image.open(source) as image:
            yield shrink(ImageOps.exif_transpose(image))
        return
    import av

    with av.open(str(source)) as container:
        for number, frame in enumerate(container.decode(video=0)):
            if number % every == 0:
                yield shrink(frame.to_image())


def collect(sources: Sequence[str], holdout: Sequence[str], every: int) -> tuple[list[Tensor], dict[str, list[Tensor]]]:
    """Images to train on, uint8 `(3 h w)`, and those held out, by the word that holds them out.

    Raises:
        ValueError: if there is nothing to train on.
    """
    files = []
    for source in map(Path, sources):
        found = sorted(source.rglob("*")) if source.is_dir() else [source]
        files += [path for path in found if path.suffix.lower() in IMAGES | VIDEOS and path.is_file()]
    train: list[Tensor] = []
    held: dict[str, list[Tensor]] = {word: [] for word in holdout}
    for file in files:
        word = next((word for word in holdout if word in str(file)), None)
        for image in read_images(file, every):
            tensor = torch.from_numpy(image.copy()).permute(2, 0, 1)
            (train if word is None else held[word]).append(tensor)
    if not train:
        raise ValueError(
            f"no photographs or videos in {', '.join(sources)}: name folders of jpg, png, mp4 or avi files"
        )
    print(f"{len(files)} files: {len(train)} images to train on, {sum(map(len, held.values()))} held out", flush=True)
    return train, held


def crop(image: Tensor, random: np.random.Generator) -> Tensor:
    """A random square of an image at a random scale, flipped half of the time, as float `(3 CROP CROP)` in -1..1.

    Half an image's side shown at CROP pixels is what a complete one at FRAME pixels looks like; scales lie around that.
    """
    _, height, width = image.shape
    side = int(min(height, width) * 2 ** random.uniform(-2, 0))
    top, left = random.integers(0, height - side + 1), random.integers(0, width - side + 1)
    square = image[None, :, top : top + side, left : left + side].float() / 127.5 - 1
    square = F.interpolate(square, (CROP, CROP), mode="bilinear", antialias=True, align_corners=False)[0]
    return square.flip(2) if random.random() < 0.5 else square


def frame(image: Tensor) -> Tensor:
    """The centre square of an image at FRAME pixels: uint8 `(3 FRAME FRAME)`."""
    _, height, width = image.shape
    side = min(height, width)
    top, left = (height - side) // 2, (width - side) // 2
    square = image[None, :, top : top + side, left : left + side].float()
    square = F.interpolate(square, (FRAME, FRAME), mode="bicubic", antialias=True, align_corners=False)
    return square[0].round().clamp(0, 255).byte()


def loss_of(model: Any, x: Tensor, kl_weight: float, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Loss and squared error of a batch `(b 3 h w)` in -1..1: error, error of edges, and a small divergence."""
    posterior = model.encode(x).latent_dist
    z = posterior.mean + posterior.std * torch.randn(posterior.mean.shape, generator=generator)
    y = model.decode(z).sample
    error = F.mse_loss(y, x)
    edges = sum(F.mse_loss(y.diff(dim=d), x.diff(dim=d)) for d in (2, 3))
    divergence = 0.5 * (posterior.mean**2 + posterior.var - 1 - posterior.logvar).mean()
    return error + 0.25 * edges + kl_weight * divergence, error.detach()


def train(images: list[Tensor], held: dict[str, list[Tensor]], config: TrainVAEConfig) -> None:
    """Train, and export every `--export-every` steps and at the end."""
    from diffusers import AutoencoderKL

    torch.manual_seed(config.seed)
    random = np.random.default_rng(config.seed)
    generator = torch.Generator().manual_seed(config.seed)
    make: Any = AutoencoderKL
    model = make(**architecture()).to(memory_format=torch.channels_last)
    with torch.no_grad():
        # Begin with little noise: thousands of steps would go by before the latents stood out from unit noise.
        model.quant_conv.bias[architecture()["latent_channels"] :] = -6.0
    average = make(**architecture())
    average.load_state_dict(model.state_dict())
    optimizer = torch.optim.AdamW(model.parameters(), lr=config.lr, betas=(0.9, 0.99), weight_decay=1e-4, fused=True)
    began = time.monotonic()
    for step in range(config.steps):
        x = torch.stack([crop(images[k], random) for k in random.integers(0, len(images), config.batch_size)])
        rate = min(1.0, (step + 1) / 100) * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * step / config.steps)))
        optimizer.param_groups[0]["lr"] = config.lr * rate
        x = x.contiguous(memory_format=torch.channels_last)
        loss, error = loss_of(model, x, config.kl_weight, generator)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        with torch.no_grad():
            decay = min(0.998, (step + 1) / (step + 10))
            torch._foreach_lerp_(list(average.parameters()), list(model.parameters()), 1 - decay)
        if (step + 1) % 100 == 0:
            speed = (step + 1) / (time.monotonic() - began)
            psnr = -10 * math.log10(error.item() / 4)
            print(f"step {step + 1}/{config.steps}  PSNR of the batch {psnr:.2f} dB  {speed:.2f} steps/s", flush=True)
        if (step + 1) % config.export_every == 0 or step + 1 == config.steps:
            export(average, images, Path(config.out))
            report(average, held)


@torch.no_grad()
def export(model: Any, images: list[Tensor], out: Path) -> None:
    """Write the model in half precision, with the mean and deviation of its latents; atomically."""
    from diffusers import AutoencoderKL

    chosen = np.random.default_rng(0).permutation(len(images))[:128]
    x = torch.stack([frame(images[k]) for k in chosen]).float() / 127.5 - 1
    posterior = torch.cat([model.encode(part).latent_dist.parameters for part in x.split(16)])
    mean, logvar = posterior.chunk(2, dim=1)
    centre = mean.mean((0, 2, 3))
    deviation = (mean.var((0, 2, 3)) + logvar.exp().mean((0, 2, 3))).sqrt()
    latents = {"latents_mean": centre.tolist(), "latents_std": deviation.tolist(), "scaling_factor": 1.0}
    copy: Any = AutoencoderKL(**architecture() | latents)
    copy.load_state_dict(model.state_dict())
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent) as temporary:
        copy.half().save_pretrained(temporary)
        for name in ("diffusion_pytorch_model.safetensors", "config.json"):
            with atomic_write(out / name) as place:
                shutil.copyfile(os.path.join(temporary, name), place)


@torch.no_grad()
def report(model: Any, held: dict[str, list[Tensor]]) -> None:
    """Print the PSNR of each held-out set, of frames at FRAME pixels, decoded from the posterior's mean."""
    for word, images in held.items():
        squared = []
        for image in images:
            x = frame(image)[None]
            y = model.decode(model.encode(x.float() / 127.5 - 1).latent_dist.mean).sample
            y = ((y + 1) * 127.5).round().clamp(0, 255)
            squared.append((y - x).square().mean().item())
        if squared:
            psnr = np.mean([10 * math.log10(255**2 / max(error, 1e-6)) for error in squared])
            print(f"  held out {word}: {psnr:.2f} dB over {len(squared)} frames of {FRAME} x {FRAME}", flush=True)
