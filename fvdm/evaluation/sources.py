"""Where the clips of a measurement come from: files, latent shards, or a checkpoint that is sampled on the fly.

A source says how many frames each of its videos has; a protocol then chooses clips; `read` gives their pixels, a
few at a time, so that a measurement needs the memory of a few clips only.
"""

import fnmatch
import json
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from fvdm.data.shards import LatentShards
from fvdm.diffusion.solvers import solver
from fvdm.evaluation.protocols import Clip
from fvdm.generation.pipeline import Trained, load
from fvdm.media.layouts import PAPER, list_videos
from fvdm.media.vae import load_vae, sample_latents
from fvdm.media.videos import Info, VideoError, codec_of, count_frames, read_video

CHUNK = 32  # frames decoded at once


class Source(Protocol):
    """Numbered videos, from which clips are read."""

    path: str
    size: int
    lengths: list[int]
    generated: bool

    def read(self, clips: Sequence[Clip]) -> Tensor:
        """uint8 `(b f 3 size size)`."""

    def describe(self) -> dict[str, str]:
        """What the card says of it."""


def open_source(
    path: str, size: int, pattern: str = "*", split: str = "train", sampling: "Sampled | None" = None
) -> Source:
    """The source behind a path: latent shards, a run or checkpoint, or a folder of videos or of frame folders.

    Args:
        path: folder, or a URL of shards.
        size: pixels at which videos are read; shards and checkpoints have a size of their own.
        pattern: which of the videos of a folder, by name.
        split: which split of latent shards.
        sampling: how a checkpoint is sampled.

    Raises:
        ValueError: if it is none of these, or holds nothing.
    """
    if re.match(r"^(pipe:|[a-z0-9]+://)", path) or ((Path(path) / "manifest.json").is_file() and not _is_run(path)):
        return Shards(path, split)
    if _is_run(path):
        return Samples(path, sampling or Sampled())
    return Files(path, size, pattern)


def _is_run(path: str) -> bool:
    return (Path(path) / "state.json").is_file() or (Path(path) / "checkpoints").is_dir()


class Files:
    """Video files and frame folders below a folder, in sorted order; squares as the encoder makes them."""

    generated = False

    def __init__(self, path: str, size: int, pattern: str = "*") -> None:
        listing = list_videos(path)
        self.path, self.size, self.layout = path, size, listing.layout
        names = [source.name for source in listing.sources]
        self.names = [
            name for name in names if fnmatch.fnmatch(name, pattern) or fnmatch.fnmatch(Path(name).name, pattern)
        ]
        if not self.names:
            raise ValueError(f"{path} holds no videos named {pattern}: give a folder of videos or of frame folders")
        self.how = replace(PAPER[listing.layout], min_frames=1, antialias=False, flip=False)
        self.lengths = [self._count(name) for name in self.names]

    def _count(self, name: str) -> int:
        try:
            return count_frames(os.path.join(self.path, name), self.how.frame_order)
        except VideoError as error:
            raise ValueError(f"cannot read {os.path.join(self.path, name)}: {error}") from None

    def read(self, clips: Sequence[Clip]) -> Tensor:
        """uint8 `(b f 3 size size)`. ValueError for a video that cannot be decoded."""
        return torch.stack([self._clip(clip) for clip in clips])

    def _clip(self, clip: Clip) -> Tensor:
        path = os.path.join(self.path, self.names[clip.video])
        frames: dict[int, np.ndarray] = {}
        begin, wanted = 0, set(clip.frames)
        try:
            for part in read_video(path, self.size, self.how, CHUNK):
                if isinstance(part, Info):
                    break
                frames |= {begin + k: picture for k, picture in enumerate(part) if begin + k in wanted}
                begin += len(part)
                if begin > clip.frames[-1]:
                    break
        except VideoError as error:
            raise ValueError(f"cannot read {path}: {error}; mend it or take it away") from None
        if len(frames) < len(wanted):
            raise ValueError(f"{path} ends at frame {begin}, its header promises more: mend it or take it away")
        return torch.from_numpy(np.stack([frames[k] for k in clip.frames]))

    def describe(self) -> dict[str, str]:
        """What the card says of it."""
        crop = "shorter side, then centre" if self.how.resize == "shorter-side" else "centre square, then scaled"
        return {
            "data": str(Path(self.path).resolve()),
            "split": "as the folder has it",
            "videos": str(len(self.names)),
            "codec": ", ".join(sorted({codec_of(os.path.join(self.path, name)) for name in self.names})),
            "first resize": f"to {self.size} x {self.size}: {crop}; bilinear, no antialias",
        }


class Shards:
    """Latent shards, decoded: what the VAE makes of the videos."""

    generated = False

    def __init__(self, path: str, split: str) -> None:
        self.path, self.split = path, split
        self.shards = LatentShards(path, split)
        self.size = self.shards.manifest.size
        self.lengths = self.shards.frames.tolist()
        self.vae = load_vae(self.shards.manifest.vae, device())
        self.shards.require(vae_identity=self.vae.identity)

    def read(self, clips: Sequence[Clip]) -> Tensor:
        """uint8 `(b f 3 size size)` of the means of the stored posteriors."""
        moments = np.stack([self.shards.read(clip.video, np.array(clip.frames)) for clip in clips])
        latents = sample_latents(torch.from_numpy(moments), self.shards.normalisation, None)
        return self.vae.decode(latents).cpu()

    def describe(self) -> dict[str, str]:
        """What the card says of it."""
        made = self.shards.manifest
        return {
            "data": self.path,
            "split": self.split,
            "videos": str(len(self.lengths)),
            "codec": f"latents as {made.dtype}, decoded by the VAE",
            "first resize": f"to {made.size} x {made.size}, when they were encoded: {made.preprocess}",
            "VAE": f"{made.vae} ({made.vae_identity[:23]})",
        }


@dataclass(frozen=True)
class Sampled:
    """How a checkpoint is sampled.

    Attributes:
        frames: frames of a video; more than the model's window make a long video.
        num: how many videos there are.
        seed: of the first; the k-th has seed + k.
        steps: sampling steps.
        solver: solver by name.
        guidance: classifier-free guidance scale.
        weights: ema or model.
        vae: VAE by name or path; empty takes the one the model was trained with.
        precision: bf16 or fp32; empty takes bf16 on a GPU.
    """

    frames: int = 16
    num: int = 2048
    seed: int = 0
    steps: int = 50
    solver: str = "ddim"
    guidance: float = 1.0
    weights: str = "ema"
    vae: str = ""
    precision: str = ""


class Samples:
    """Videos of a checkpoint, made when they are asked for; video k from the seed `seed + k`."""

    generated = True

    def __init__(self, path: str, how: Sampled, trained: Trained | None = None) -> None:
        self.path, self.how = path, how
        self.trained = trained or load(path, how.weights, how.vae, str(device()), how.precision)
        self.size = self.trained.size
        window = self.trained.model.config.frames
        self.task = "long" if how.frames > window else "generate"
        self.lengths = [max(how.frames, window)] * how.num

    def read(self, clips: Sequence[Clip]) -> Tensor:
        """uint8 `(b f 3 size size)`; the clips' videos follow each other.

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
            seed=self.how.seed + first,
            steps=self.how.steps,
            solver=self.how.solver,
            guidance=self.how.guidance,
            length=self.lengths[0],
        )
        return videos[:, list(clips[0].frames)]

    def describe(self) -> dict[str, str]:
        """What the card says of it."""
        trained, how = self.trained, self.how
        names = json.loads((trained.folder / "state.json").read_text())["settings"]
        return {
            "data": f"sampled, task {self.task}, seeds {how.seed} to {how.seed + how.num - 1}",
            "split": "-",
            "videos": str(how.num),
            "codec": "none: pixels of the VAE",
            "first resize": f"none: {self.size} x {self.size}",
            "checkpoint": f"{trained.folder} ({names['model']}, p = {names['p']}, step {trained.step}, {how.weights})",
            "sampler": f"{how.solver}, steps spaced {solver(how.solver).spacing}",
            "steps": str(how.steps),
            "guidance": f"{how.guidance:g}" if trained.classes else "none: no classes",
            "precision": str(next(trained.model.parameters()).dtype).removeprefix("torch."),
            "VAE": f"{trained.vae.name} ({trained.vae.identity[:23]})",
        }


def device() -> torch.device:
    """This rank's GPU, or the CPU."""
    rank = int(os.environ.get("LOCAL_RANK", "0"))
    return torch.device("cuda", rank % torch.cuda.device_count()) if torch.cuda.is_available() else torch.device("cpu")
