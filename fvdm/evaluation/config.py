"""Settings of measurements; imports no torch."""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class SampleConfig:
    """How a checkpoint is sampled.

    Attributes:
        steps: sampling steps of a checkpoint.
        solver: solver of a checkpoint.
        guidance: guidance of a checkpoint with classes or texts; 1 is none.
        weights: weights of a checkpoint.
        vae: VAE of a checkpoint; empty takes the one it was trained with.
        precision: of sampling; empty takes bf16 on a GPU.
        text_encoder: text encoder of a checkpoint; empty takes the one it was trained with.
        base: base model of a LoRA, where it is no longer where it was in training; a path, or wan: and a hub name.
    """

    steps: int = 50
    solver: str = "ddim"
    guidance: float = 1.0
    weights: Literal["ema", "model"] = "ema"
    vae: str = ""
    precision: Literal["", "bf16", "fp32"] = ""
    text_encoder: str = ""
    base: str = ""


@dataclass(frozen=True, kw_only=True)
class SourcesConfig:
    """How videos and latent shards are read.

    Attributes:
        size: pixels at which videos are read, the side of a square or HxW; a checkpoint has its own size.
        real_pattern: which of the real videos, by name.
        fake_pattern: which of the generated videos, by name.
        real_split: split of real latent shards; empty takes the protocol's.
        fake_split: split of generated latent shards.
    """

    size: int | str = 256
    real_pattern: str = "*"
    fake_pattern: str = "*"
    real_split: str = ""
    fake_split: str = "train"


@dataclass(frozen=True)
class FVDConfig(SampleConfig, SourcesConfig):
    """A Fréchet video distance.

    Attributes:
        real: real videos, frame folders or latent shards.
        fake: generated videos, frame folders or latent shards; or a run or checkpoint.
        protocol: styleganv, latte, tats, videogpt, cdfvd or even.
        dataset: name of the data set, for protocols that have a stride of their own for it, such as taichi.
        frames: frames of a clip, 9 or more; published are 16 and 128.
        clips: most clips of either side; 0 takes the protocol's.
        real_stride: take every n-th frame of the real videos; 0 takes the protocol's.
        repeats: choices of clips, whose mean is taken; 0 takes the protocol's.
        seed: of the choice of clips, and of the first sample; the protocol's when not given.
        prompts: file of prompts for a checkpoint that takes texts, one a line, used in turn; empty takes the captions
            of the real clips.
        still: also compare the middle frames alone, as still clips.
        bootstrap: resamplings behind the interval; 0 is none.
        chunk: clips that go through the networks at once.
        run: folder of the training run whose MLflow run gets the result; empty takes that of `fake`.
        out: folder for the result.
    """

    real: str
    fake: str
    protocol: str = "styleganv"
    dataset: str = ""
    frames: int = 16
    clips: int = 0
    real_stride: int = 0
    repeats: int = 0
    seed: int | None = None
    prompts: str = ""
    still: bool = False
    bootstrap: int = 100
    chunk: int = 4
    run: str = ""
    out: str = "fvd"
