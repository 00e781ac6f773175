"""Videos from a checkpoint: `python -m fvdm.generate --checkpoint runs/demo --task image-to-video --given cat.png`."""

import contextlib
import json
import logging
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from fvdm import checkpoint as ckpt
from fvdm import config as settings
from fvdm.diffusion import Diffusion, DiffusionConfig
from fvdm.media import tile, write_gif, write_mp4, write_strips
from fvdm.model import ModelConfig, VideoDiT
from fvdm.samplers import generators
from fvdm.solvers import solver
from fvdm.tasks import Sampling, given_frames, place, run
from fvdm.tracking import Tracker, TrackingConfig
from fvdm.vae import VAE, load_vae

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class GenerateConfig:
    """What to make, and from what.

    Attributes:
        checkpoint: a run's folder (its newest checkpoint is taken), or a checkpoint.
        task: generate, image-to-video, interpolate or long.
        given: an image, a video, a folder of frames, or a list of images, [a.png,b.png]; the task takes from it the
            frames it wants: one for image-to-video, two for interpolate, half a clip (or none) for long.
        out: folder for the videos.
        num: number of samples.
        seed: seed of the first sample; the k-th has seed + k, whatever the batch size.
        steps: sampling steps.
        solver: ddim or ddpm.
        eta: noise of DDIM, 0 to 1.
        guidance: classifier-free guidance scale of a class-conditional model; 1 is none.
        label: class of a class-conditional model, by name or number; empty draws one for each sample, from its seed.
        length: frames of the task long; the paper's is 128.
        batch_size: samples drawn at once.
        weights: ema (the average) or model (the weights themselves).
        vae: VAE by name or path; empty takes the one the model was trained with.
        device: where to run, such as cuda or cpu; empty takes a GPU if there is one.
        precision: bf16 or fp32; empty takes bf16 on a GPU, fp32 on the CPU.
        fps: frames per second of the files.
        tracking: where the videos are reported, beside the folder.
    """

    checkpoint: str
    task: str = "generate"
    given: str | list[str] = ""
    out: str = "out"
    num: int = 4
    seed: int = 0
    steps: int = 50
    solver: str = "ddim"
    eta: float = 0.0
    guidance: float = 1.0
    label: str = ""
    length: int = 128
    batch_size: int = 4
    weights: Literal["ema", "model"] = "ema"
    vae: str = ""
    device: str = ""
    precision: Literal["", "bf16", "fp32"] = ""
    fps: float = 8.0
    tracking: TrackingConfig = field(default_factory=lambda: TrackingConfig(system_metrics=False))

    def __post_init__(self) -> None:
        """Refuse numbers out of range."""
        for name in ("num", "steps", "length", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}: it must be at least 1")


@dataclass(frozen=True)
class Trained:
    """A trained model with all that is needed to use it.

    Attributes:
        model: on its device, in eval mode.
        diffusion: its noise process.
        vae: turns its latents into pictures.
        classes: names of its classes; empty without.
        size: side of a frame in pixels.
        interval: the clips it was trained on take every interval-th frame.
        step: optimizer steps it was trained for.
        folder: the checkpoint.
    """

    model: VideoDiT
    diffusion: Diffusion
    vae: VAE
    classes: tuple[str, ...]
    size: int
    interval: int
    step: int
    folder: Path


def load(checkpoint: str | Path, weights: str = "ema", vae: str = "", device: str = "", precision: str = "") -> Trained:
    """Load a checkpoint for use.

    Args:
        checkpoint: a run's folder, or a checkpoint.
        weights: `ema` or `model`.
        vae: VAE by name or path; empty takes the one the model was trained with.
        device: empty takes a GPU if there is one.
        precision: `bf16`, `fp32`; empty takes bf16 on a GPU.

    Raises:
        ValueError: if there is no whole checkpoint, or its VAE cannot be found.
    """
    folder = ckpt.resolve(Path(checkpoint))
    state = ckpt.read_state(folder)
    place = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    dtype = torch.bfloat16 if (precision or ("bf16" if place.type == "cuda" else "fp32")) == "bf16" else torch.float32
    model = VideoDiT(ModelConfig(**state["network"]))
    model.load_state_dict(ckpt.read_weights(folder, weights))
    return Trained(
        model.to(place, dtype).eval().requires_grad_(False),
        Diffusion(DiffusionConfig(**state["settings"]["diffusion"])),
        load_vae(vae or state["vae"], place),
        tuple(state["classes"]) if state["network"]["num_classes"] else (),
        state["size"],
        state["settings"]["data"]["interval"],
        state["step"],
        folder,
    )


def read_frames(path: str, size: int) -> Tensor:
    """All frames of an image, a video or a folder of images: uint8 `(n 3 size size)`, shorter side resized, then the
    centre cropped, as the training data were.

    Raises:
        ValueError: if it cannot be read.
    """
    import numpy as np
    from PIL import Image, ImageOps, UnidentifiedImageError

    from fvdm.videos import IMAGE_SUFFIXES, Info, Preprocess, VideoError, read_video, to_square

    how = Preprocess(min_frames=1)
    try:
        if Path(path).suffix.lower() in IMAGE_SUFFIXES:
            with Image.open(path) as image:
                picture = np.asarray(ImageOps.exif_transpose(image).convert("RGB"))
            return torch.from_numpy(to_square(picture, size, how))[None]
        parts = [part for part in read_video(path, size, how, 64) if not isinstance(part, Info)]
    except (OSError, UnidentifiedImageError, VideoError) as error:
        raise ValueError(f"cannot read frames from {path}: {error}") from None
    return torch.from_numpy(np.concatenate(parts))


def read_given(paths: Sequence[str], indices: Sequence[int], trained: Trained) -> Tensor:
    """Latents of the given frames, `(1 g c h w)`.

    Args:
        paths: as many images as there are indices; or one video or folder of frames, from which the frames at
            `indices`, counted at the model's interval, are taken.
        indices: indices of the given frames in the model's clip.
        trained: the model.

    Raises:
        ValueError: if a file cannot be read, or there are too few frames.
    """
    if len(paths) == 1:
        frames = read_frames(paths[0], trained.size)  # (n 3 h w)
        wanted = [k * trained.interval for k in indices]
        if len(frames) == len(indices):
            wanted = list(range(len(indices)))
        if wanted and wanted[-1] >= len(frames):
            raise ValueError(
                f"{paths[0]} has {len(frames)} frames; the task takes frames {', '.join(map(str, wanted))}: give a "
                f"longer video, or exactly {len(indices)} images"
            )
        frames = frames[wanted]
    else:
        if len(paths) != len(indices):
            raise ValueError(f"the task wants {len(indices)} given frames, {len(paths)} files came")
        frames = torch.cat([read_frames(path, trained.size)[:1] for path in paths])
    return trained.vae.encode_mean(frames)[None]


def class_numbers(label: str, classes: Sequence[str], seeds: Sequence[int]) -> Tensor | None:
    """The class of each sample, int64 `(b)`: the one named, or one drawn from the sample's seed; None without classes.

    Raises:
        ValueError: if the model has no such class.
    """
    if not classes:
        if label:
            raise ValueError(f"label {label!r}: this model has no classes")
        return None
    if not label:
        draws = [torch.randint(len(classes), (), generator=generator) for generator in generators(seeds)]
        return torch.stack(draws)
    if label in classes:
        return torch.full((len(seeds),), list(classes).index(label))
    if label.isdigit() and int(label) < len(classes):
        return torch.full((len(seeds),), int(label))
    raise ValueError(f"label {label!r} is no class of this model; choose one of {', '.join(classes)}")


def generate(trained: Trained, config: GenerateConfig) -> Tensor:
    """Make the samples of a task.

    Returns:
        uint8 `(num f 3 h w)` on the CPU.

    Raises:
        ValueError: if the given frames or the class do not fit the task or the model.
    """
    network = trained.model.config
    indices = given_frames(config.task, network.frames)
    paths = [config.given] if isinstance(config.given, str) else config.given
    if not any(paths):
        if indices and config.task != "long":
            raise ValueError(f"{config.task} starts from {len(indices)} given frame(s); name them with --given")
        indices = ()
    device = trained.model.space.device
    empty = torch.zeros(1, 0, network.channels, network.size, network.size)
    clip = place((read_given(paths, indices, trained) if indices else empty).to(device), indices, network.frames)
    how = Sampling(
        config.steps,
        config.guidance if trained.classes else 1.0,
        solver(config.solver, config.eta),
        null_class=network.num_classes,
        progress=_progress,
    )
    length = config.length if config.task == "long" else network.frames
    videos = []
    for first in range(0, config.num, config.batch_size):
        seeds = [config.seed + k for k in range(first, min(first + config.batch_size, config.num))]
        y = class_numbers(config.label, trained.classes, seeds)
        y = None if y is None else y.to(device)
        batch = clip.expand(len(seeds), *clip.shape[1:])
        latents = run(trained.model, trained.diffusion, batch, indices, seeds, how, length, y)
        videos.append(trained.vae.decode(latents).cpu())
    return torch.cat(videos)


def _progress(steps: Sequence[int]) -> Iterator[int]:
    from tqdm import tqdm

    return iter(tqdm(steps, "sampling", leave=False, disable=not sys.stderr.isatty()))


def write(videos: Tensor, config: GenerateConfig, trained: Trained) -> list[Path]:
    """Write every sample as mp4 and gif, all of them as one mp4 side by side, and a picture of their frames."""
    out = Path(config.out)
    out.mkdir(parents=True, exist_ok=True)
    files = []
    writers: dict[str, Callable[..., None]] = {"mp4": write_mp4, "gif": write_gif}
    for k, video in enumerate(videos):
        for suffix, writer in writers.items():
            files.append(out / f"{config.task}-{config.seed + k:05d}.{suffix}")
            writer(video, files[-1], config.fps)
    files += [out / f"{config.task}.mp4", out / f"{config.task}.png"]
    write_mp4(tile(list(videos[:16])), files[-2], config.fps)
    write_strips(videos[:8], files[-1])
    record = settings.plain(config) | {"checkpoint": str(trained.folder), "step": trained.step}
    ckpt.write_text(out / f"{config.task}.json", json.dumps(record, indent=1))
    return [*files, out / f"{config.task}.json"]


def report(files: Sequence[Path], config: GenerateConfig, trained: Trained) -> None:
    """Log the files to the MLflow run that trained the model; to one of their own where that is not known."""
    run_id = ""
    with contextlib.suppress(OSError, ValueError, KeyError):
        run_id = json.loads((trained.folder.parent.parent / "tracking.json").read_text())["run_id"]
    tracker = Tracker(
        Path(config.out) / ".tracking",
        config.tracking,
        f"generate-{config.task}",
        tags={"kind": "generate"},
        into=run_id,
    )
    for path in files:
        if path.suffix == ".png":
            tracker.image(path, f"generate/{config.task}", trained.step)
        tracker.artifact(path, f"generate/{config.task}")
    tracker.close()


def main() -> None:
    """Command line."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    try:
        config = settings.parse(GenerateConfig, description=__doc__)
        solver(config.solver, config.eta)
        given_frames(config.task, 16)
        trained = load(config.checkpoint, config.weights, config.vae, config.device, config.precision)
        videos = generate(trained, config)
        files = write(videos, config, trained)
    except ValueError as error:
        settings.fail(error)
    report(files, config, trained)
    shown = next(path for path in files if path.name == f"{config.task}.mp4")
    print(f"{config.task}: {len(videos)} video(s) of {videos.shape[1]} frames in {config.out}; all in one: {shown}")


if __name__ == "__main__":
    main()
