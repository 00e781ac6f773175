"""Where the clips of a measurement come from: files, latent shards, or a checkpoint that is sampled on the fly.

A source says how many frames each of its videos has; a protocol then chooses clips; `read` gives their pixels, a
few at a time, so that a measurement needs the memory of a few clips only.
"""

import fnmatch
import json
import math
import os
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from fvdm.data.format import filled_buckets
from fvdm.data.shards import LatentShards
from fvdm.diffusion.solvers import solver
from fvdm.evaluation.config import SampleConfig
from fvdm.evaluation.protocols import Clip
from fvdm.generation.grid import latent_length
from fvdm.generation.pipeline import load
from fvdm.media.layouts import PAPER, caption_file, list_videos
from fvdm.media.preprocess import one_spelling, sides
from fvdm.media.vae import load_vae, sample_latents
from fvdm.media.videos import Info, VideoError, codec_of, count_frames, frame_rate_of, read_video

CHUNK = 32  # frames decoded at once
RATES = 64  # videos of a folder whose frame rates are read for the card


class ClipSource(Protocol):
    """Numbered videos, from which clips are read."""

    path: str
    size: int | tuple[int, int]
    lengths: list[int]
    generated: bool

    def read(self, clips: Sequence[Clip]) -> Tensor:
        """uint8 `(b f 3 h w)`."""

    def frame_rate(self, stride: int) -> str:
        """Frames per second of clips that take every `stride`-th frame."""

    def captions(self, video: int) -> Sequence[str]:
        """The texts that describe a video; none where nothing does."""

    def describe(self) -> dict[str, str]:
        """What the card says of it."""


def open_source(path: str, size: int | tuple[int, int], pattern: str = "*", split: str = "train") -> ClipSource:
    """The source behind a path: latent shards, a run or checkpoint, or a folder of videos or of frame folders.

    Args:
        path: folder, or a URL of shards.
        size: at which videos are read, the side of a square or (height, width), in pixels; shards and checkpoints have
            a size of their own.
        pattern: which of the videos of a folder, by name.
        split: which split of latent shards.

    Raises:
        ValueError: if it is none of these, or holds nothing.
    """
    if re.match(r"^(pipe:|[a-z0-9]+://)", path) or ((Path(path) / "manifest.json").is_file() and not is_run(path)):
        return Shards(path, split)
    if is_run(path):
        return Samples(path, SampleConfig())
    return Files(path, size, pattern)


def is_run(path: str) -> bool:
    """Whether a path is that of a run or a checkpoint."""
    return (Path(path) / "state.json").is_file() or (Path(path) / "checkpoints").is_dir()


class Files:
    """Video files and frame folders below a folder, in sorted order; of one size, as the encoder makes them."""

    generated = False

    def __init__(self, path: str, size: int | tuple[int, int], pattern: str = "*") -> None:
        listing = list_videos(path)
        self.path, self.size, self.layout = path, size, listing.layout
        names = [source.name for source in listing.sources]
        self.names = [
            name for name in names if fnmatch.fnmatch(name, pattern) or fnmatch.fnmatch(Path(name).name, pattern)
        ]
        if not self.names:
            raise ValueError(f"{path} holds no videos named {pattern}: give a folder of videos or of frame folders")
        self.preprocess = replace(PAPER[listing.layout], min_frames=1, antialias=False, flip=False)
        self.lengths = [self._count(name) for name in self.names]

    def _count(self, name: str) -> int:
        try:
            return count_frames(os.path.join(self.path, name), self.preprocess.frame_order)
        except VideoError as error:
            raise ValueError(f"cannot read {os.path.join(self.path, name)}: {error}") from None

    def read(self, clips: Sequence[Clip]) -> Tensor:
        """uint8 `(b f 3 h w)`. ValueError for a video that cannot be decoded."""
        return torch.stack([self._clip(clip) for clip in clips])

    def _clip(self, clip: Clip) -> Tensor:
        path = os.path.join(self.path, self.names[clip.video])
        frames: dict[int, np.ndarray] = {}
        start, needed = 0, set(clip.frames)
        try:
            for part in read_video(path, self.size, self.preprocess, CHUNK):
                if isinstance(part, Info):
                    break
                frames |= {start + k: frame for k, frame in enumerate(part) if start + k in needed}
                start += len(part)
                if start > clip.frames[-1]:
                    break
        except VideoError as error:
            raise ValueError(f"cannot read {path}: {error}; repair it or take it away") from None
        if len(frames) < len(needed):
            raise ValueError(f"{path} ends at frame {start}, its header promises more: repair it or take it away")
        return torch.from_numpy(np.stack([frames[k] for k in clip.frames]))

    def frame_rate(self, stride: int) -> str:
        """Frames per second of clips that take every `stride`-th frame; of many videos, some are looked at."""
        looked_at = self.names[:: -(-len(self.names) // RATES)]
        return describe_rates([frame_rate_of(os.path.join(self.path, name)) for name in looked_at], stride)

    def captions(self, video: int) -> Sequence[str]:
        """The lines of the text file beside a video. ValueError if it cannot be read."""
        file = caption_file(Path(self.path, self.names[video]))
        try:
            lines = file.read_text(encoding="utf-8-sig").splitlines() if file else []
        except (OSError, UnicodeError) as error:
            raise ValueError(f"cannot read the captions in {file}: {error}") from None
        return [line.strip() for line in lines if line.strip()]

    def describe(self) -> dict[str, str]:
        """What the card says of it."""
        centre = "centre square" if isinstance(self.size, int) else "centre of that shape"
        crop = "shorter side, then centre" if self.preprocess.resize == "shorter-side" else f"{centre}, then scaled"
        return {
            "data": str(Path(self.path).resolve()),
            "split": "as the folder has it",
            "videos": str(len(self.names)),
            "codec": ", ".join(sorted({codec_of(os.path.join(self.path, name)) for name in self.names})),
            "first resize": f"to {shape(self.size)}: {crop}; bilinear, no antialias",
        }


class Shards:
    """Latent shards, decoded: what the VAE makes of the videos."""

    generated = False

    def __init__(self, path: str, split: str) -> None:
        self.path, self.split = path, split
        self.shards = LatentShards(path, split)
        shapes = {bucket.size for bucket in filled_buckets(self.shards.manifest.buckets)}
        if len(shapes) > 1:
            found = ", ".join(shape(size) for size in sorted(shapes))
            raise ValueError(f"{path} holds clips of {found}: FVD compares clips of one size; encode one alone")
        self.size = one_spelling(shapes.pop())
        self.vae = load_vae(self.shards.manifest.vae, device())
        self.shards.require(vae_identity=self.vae.identity)
        self.lengths = [self.vae.frame_map.pixel_frames(frames) for frames in self.shards.frames.tolist()]

    def read(self, clips: Sequence[Clip]) -> Tensor:
        """uint8 `(b f 3 h w)` of the means of the stored posteriors."""
        if self.vae.is_video:
            return torch.cat([self._decode(clip.video, clip.frames[-1] + 1)[:, list(clip.frames)] for clip in clips])
        moments = np.stack([self.shards.read(clip.video, np.array(clip.frames)) for clip in clips])
        latents = sample_latents(torch.from_numpy(moments), self.shards.normalisation, None)
        return self.vae.decode(latents).cpu()

    def _decode(self, video: int, frames: int) -> Tensor:
        """uint8 `(1 f 3 h w)`, the first frames of a clip of a causal VAE, whole latent frames of them."""
        latent_frames = np.arange(latent_length(self.vae.frame_map, frames))
        moments = torch.from_numpy(self.shards.read(video, latent_frames))
        return self.vae.decode(sample_latents(moments, self.shards.normalisation, None)[None]).cpu()

    def captions(self, video: int) -> Sequence[str]:
        """Those that were stored with a clip."""
        return self.shards.captions(video)

    def frame_rate(self, stride: int) -> str:
        """Frames per second of clips that take every `stride`-th frame."""
        rates = self.shards.samples.numbers("fps", 0, len(self.shards)).tolist()
        return describe_rates([None if math.isnan(rate) else rate for rate in rates], stride)

    def describe(self) -> dict[str, str]:
        """What the card says of it."""
        made = self.shards.manifest
        return {
            "data": self.path,
            "split": self.split,
            "videos": str(len(self.lengths)),
            "codec": f"latents as {made.dtype}, decoded by the VAE",
            "first resize": f"to {shape(self.size)}, when they were encoded: {made.preprocess}",
            "VAE": f"{made.vae} ({made.vae_identity[:23]})",
        }


class Samples:
    """Videos of a checkpoint, made when they are asked for; video k from the seed `seed + k`.

    Attributes:
        seed: of the first video.
        prompts: of the videos, for a model that takes texts; whoever compares them with real videos sets it.
        origin: where the prompts are from, in words.
    """

    generated = True
    prompts: Sequence[str] = ()
    origin = ""

    def __init__(self, path: str, config: SampleConfig, *, frames: int = 16, num: int = 2048, seed: int = 0) -> None:
        """Of `num` videos of `frames` frames; more frames than the model's window make long videos.

        Raises:
            ValueError: if the checkpoint cannot be opened.
        """
        self.path, self.config, self.seed = path, config, seed
        self.trained = load(
            path,
            config.weights,
            config.vae,
            str(device()),
            config.precision,
            text_encoder=config.text_encoder,
            base=config.base,
        )
        self.size = one_spelling(self.trained.frame_size)
        window = self.trained.frame_map.pixel_frames(self.trained.window)
        self.task = "long" if frames > window else "generate"
        self.lengths = [max(frames, window)] * num

    def read(self, clips: Sequence[Clip]) -> Tensor:
        """uint8 `(b f 3 h w)`; the clips' videos follow each other.

        Raises:
            ValueError: if they do not, or a setting does not fit the model.
        """
        first = clips[0].video
        if [clip.video for clip in clips] != list(range(first, first + len(clips))):
            raise ValueError(f"samples are drawn in order; {self.path} can be generated clips, not real ones")
        videos = self.trained.generate(
            self.task,
            num=len(clips),
            batch_size=len(clips),
            seed=self.seed + first,
            steps=self.config.steps,
            solver=self.config.solver,
            guidance=self.config.guidance,
            length=self.lengths[0],
            prompts=self.prompts[first : first + len(clips)],
        )
        return videos[:, list(clips[0].frames)]

    def frame_rate(self, stride: int) -> str:
        """Frames per second of clips that take every `stride`-th frame: the model knows its training data's stride."""
        every = self.trained.stride * stride
        return "that of its training data" + (f", every {ordinal(every)} frame" if every > 1 else "")

    def captions(self, video: int) -> Sequence[str]:
        """The prompt of a video."""
        return self.prompts[video : video + 1]

    def describe(self) -> dict[str, str]:
        """What the card says of it."""
        trained, config = self.trained, self.config
        names = json.loads((trained.folder / "state.json").read_text())["settings"]
        origin = f"{names['model']}, p = {names['p']}, step {trained.step}, {config.weights}"
        return {
            "data": f"sampled, task {self.task}, seeds {self.seed} to {self.seed + len(self.lengths) - 1}",
            "split": "-",
            "videos": str(len(self.lengths)),
            "codec": "none: pixels of the VAE",
            "first resize": f"none: {shape(self.size)}",
            "checkpoint": f"{trained.folder} ({origin})",
            "sampler": f"{config.solver}, steps spaced {solver(config.solver).spacing}",
            "steps": str(config.steps),
            "guidance": f"{config.guidance:g}" if trained.classes or trained.text else "none: no classes",
            **({"prompts": self.origin, "text encoder": trained.text.name} if trained.text else {}),
            "precision": str(next(trained.model.parameters()).dtype).removeprefix("torch."),
            "VAE": f"{trained.vae.name} ({trained.vae.identity[:23]})",
        }


def describe_rates(rates: Sequence[float | None], stride: int) -> str:
    """Frames per second of some videos, and of clips that take every `stride`-th frame of them.

    Args:
        rates: of the videos; None where it is unknown.
        stride: of the clips.
    """
    found = sorted(rate for rate in rates if rate is not None)
    if not found:
        return "unknown: images have none"
    low, high = found[0], found[-1]
    text = f"{low:.4g}" if high - low < 0.01 * high else f"{low:.4g} to {high:.4g}"
    if stride > 1:
        clips = f"{low / stride:.4g}" if high - low < 0.01 * high else f"{low / stride:.4g} to {high / stride:.4g}"
        text = f"{clips}, every {ordinal(stride)} frame of {text}"
    return text + (f"; unknown for {len(rates) - len(found)} of {len(rates)}" if len(found) < len(rates) else "")


def ordinal(number: int) -> str:
    """Such as 2nd."""
    suffix = {1: "st", 2: "nd", 3: "rd"}.get(number % 10 if number % 100 not in (11, 12, 13) else 0, "th")
    return f"{number}{suffix}"


def shape(size: int | tuple[int, int]) -> str:
    """Such as 480 x 832."""
    return " x ".join(map(str, sides(size)))


def device() -> torch.device:
    """This rank's GPU, or the CPU."""
    rank = int(os.environ.get("LOCAL_RANK", "0"))
    return torch.device("cuda", rank % torch.cuda.device_count()) if torch.cuda.is_available() else torch.device("cpu")
