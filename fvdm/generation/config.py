"""Settings of generation, which the command line, Python and a registered model share. Pure."""

import re
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from fvdm.choices import one_of
from fvdm.diffusion.config import NUM_TIMESTEPS
from fvdm.tracking.config import TrackingConfig

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class TaskConfig:
    """The task, such as image-to-video; docs/tasks.md shows each.

    Attributes:
        task: generate, image-to-video, interpolate, any-frame, infill, transition, long, next-frame, progressive,
            edit, pyramid, stream or custom.
        frames: indices of the frames that the task selects, such as 0,5,-1 or 4:12: the given frames of any-frame, the
            missing ones of infill, those that edit changes.
        length: frames of the video; 0 is one window of the model, or 128 for long and stream.
        context: given frames that long, next-frame, pyramid and stream continue from, and that transition takes of each
            clip; also frames that a window of long shares with the one before, and clean ones that stream keeps in
            view; 0 is the task's own number.
        delay: rows of the schedule that a frame of pyramid or stream starts after the one before; 0 is the task's own.
        strength: how much edit may change, 0 to 1.
        slope: how much nearer to pure noise each frame of progressive begins than the one before.
        schedule: file with the schedule of custom: a line per row, the timesteps of its frames separated by commas.
    """

    task: str = "generate"
    frames: str = ""
    length: int = 0
    context: int = 0
    delay: int = 0
    strength: float = 0.6
    slope: float = 0.1
    schedule: str = ""


@dataclass(frozen=True, kw_only=True)
class SamplesConfig:
    """Seeds and batches of the samples.

    Attributes:
        num: number of samples.
        seed: seed of the first sample; the k-th has seed + k, whatever the batch size.
        batch_size: samples made at once.
    """

    num: int = 1
    seed: int = 0
    batch_size: int = 4


@dataclass(frozen=True, kw_only=True)
class ConditionConfig:
    """Text or class, for a conditional model.

    Attributes:
        prompt: text of a text-conditional model; empty is the empty prompt.
        negative_prompt: text that guidance pushes away from; empty is the empty prompt.
        class_: class of a class-conditional model, by name or number; empty picks one for each sample at random, from
            its seed.
    """

    prompt: str = ""
    negative_prompt: str = ""
    class_: str = ""


@dataclass(frozen=True, kw_only=True)
class StepsConfig:
    """Sampling steps and guidance.

    Attributes:
        steps: sampling steps of a frame.
        solver: ddim, ddpm, dpm++ or unipc.
        spacing: where the steps lie: even (the paper's), trailing, leading, karras, log-snr or shift; empty is shift
            for Wan; for other models even for ddim and ddpm, karras for dpm++ and unipc.
        shift: of the spacing shift, as 3 (Wan at 480p) or 5 (720p); 0 is that of training.
        eta: noise of ddim, 0 to 1.
        guidance: classifier-free guidance scale towards class or prompt; 1 is none.
        guidance_interval: lowest and highest timestep that is guided; empty is all.
        guidance_rescale: 0 to 1: how far a guided estimate gets its standard deviation back.
        history_guidance: guidance scale towards the clean frames that are seen; 1 is none.
    """

    steps: int = 50
    solver: str = "ddim"
    spacing: str = ""
    shift: float = 0.0
    eta: float = 0.0
    guidance: float = 1.0
    guidance_interval: tuple[int, int] | None = None
    guidance_rescale: float = 0.0
    history_guidance: float = 1.0


@dataclass(frozen=True, kw_only=True)
class GivenConfig:
    """Given frames, and those that a window takes from the one before.

    Attributes:
        given_noise: noise on given frames: a timestep such as 50, a share of T such as 0.2, or a multiple of the t of
            the other frames such as 0.2t; one for all, or one for each given latent frame with commas. A timestep or a
            share is what the network is shown, and the frames stay bit-identical (one value is for all clean frames in
            view); a multiple is sampled with the other frames, and changes. Empty is none.
        given_encoding: how given frames after the first become latent frames of a video VAE: clip, as the group of
            frames that they are in a clip (an image stands for the whole group); single, each run of them as if a clip
            began there, an image alone (Pusa).
        overlap: what a window of long takes over from the one before, with a video VAE: encode, its frames, encoded
            again as the beginning of a clip of its own; keep, its latent frames as they are.
    """

    given_noise: str = ""
    given_encoding: Literal["clip", "single"] = "clip"
    overlap: Literal["encode", "keep"] = "encode"


# The fields of the last base come first: --help begins with the task.
@dataclass(frozen=True, kw_only=True)
class GenerationConfig(GivenConfig, StepsConfig, ConditionConfig, SamplesConfig, TaskConfig):
    """Settings of a video to generate."""

    def __post_init__(self) -> None:
        """Refuse what can be refused before a model is loaded."""
        for name in ("num", "steps", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}: it must be at least 1")
        if self.length < 0:
            raise ValueError(f"length is {self.length}: it must be positive, or 0 for the task's own")
        from fvdm.diffusion.solvers import solver
        from fvdm.diffusion.tasks import find

        find(self.task)
        if bool(self.schedule) != (self.task == "custom"):
            raise ValueError("the task custom needs --schedule FILE, and no other task takes one")
        solver(self.solver, self.eta)
        for name, choices in (("given_encoding", ("clip", "single")), ("overlap", ("encode", "keep"))):
            if getattr(self, name) not in choices:
                raise ValueError(f"{name} is {getattr(self, name)!r}: choose {' or '.join(choices)}")
        object.__setattr__(self, "given_noise", str(self.given_noise))  # a number from Python
        given_noise(self.given_noise)


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """How a trained model is opened.

    Attributes:
        weights: ema (the average) or model (the weights themselves).
        base: base model of a LoRA, where it is no longer where it was in training; a path, or wan: and a hub name.
        vae: VAE by name or path; empty takes the one the model was trained with.
        text_encoder: text encoder by name or path; empty takes the one the model was trained with.
        device: where to run, such as cuda or cpu; empty takes a GPU if there is one.
        precision: bf16 or fp32; empty takes bf16 on a GPU, fp32 on the CPU.
    """

    weights: Literal["ema", "model"] = "ema"
    base: str = ""
    vae: str = ""
    text_encoder: str = ""
    device: str = ""
    precision: Literal["", "bf16", "fp32"] = ""


@dataclass(frozen=True)
class GenerateCommand(ModelConfig, GenerationConfig):
    """Settings of a video to generate, what it starts from, and where to write it.

    Attributes:
        checkpoint: a run's folder (its newest checkpoint is taken) or a checkpoint; a folder of `fvdm convert`; a
            checkpoint file of Latte or of the official FVDM code; `example`, a small model that ships with this; or
            `wan:` and a folder or hub name of diffusers.
        prompts: file of prompts, one a line; `num` videos are made of each.
        given: an image, a video, a folder of frames, or a list of them, [a.png,b.png]. One video gives the frames that
            the task needs, at the model's stride; two give the end of the first and the beginning of the second.
        out: folder for the videos.
        formats: mp4, gif, webm or frames (a folder of PNG files); several with commas.
        fps: frames per second of the files; 0 keeps the speed of the given video, or is 8 without one.
        num: number of samples.
        show_schedule: print the timestep schedule, and generate nothing.
        compile: make the model faster with torch.compile; needs a C++ compiler, and a minute at the start.
        tracking: where the videos are reported, beside the folder.
    """

    checkpoint: str
    prompts: str = ""
    given: str | list[str] = ""
    out: str = "out"
    formats: str = "mp4,gif"
    fps: float = 0.0
    num: int = field(default=4, kw_only=True)
    show_schedule: bool = False
    compile: bool = False
    tracking: TrackingConfig = field(default_factory=lambda: TrackingConfig(system_metrics=False))

    def __post_init__(self) -> None:
        """Refuse numbers out of range."""
        super().__post_init__()
        if self.prompt and self.prompts:
            raise ValueError("prompt and prompts: give one prompt, or a file of prompts")
        if not 0 <= self.fps <= 240:
            raise ValueError(f"fps is {self.fps}: choose up to 240, or 0 for that of the given video")
        from fvdm.media.writing import FORMATS

        for form in self.forms or [""]:
            one_of("format", form, FORMATS)

    @property
    def forms(self) -> list[str]:
        """The formats, one by one."""
        return [form.strip() for form in self.formats.split(",") if form.strip()]

    @property
    def paths(self) -> list[str]:
        """The given files."""
        return [path for path in ([self.given] if isinstance(self.given, str) else self.given) if path]


def generation_config(task: str, settings: dict[str, Any]) -> GenerationConfig:
    """The settings as keyword arguments.

    Raises:
        ValueError: if there is no such setting; lists those there are.
    """
    names = [field.name for field in fields(GenerationConfig)]
    for name in settings:
        if name not in names:
            raise ValueError(f"there is no setting {name}; choose among {', '.join(names)}")
    return GenerationConfig(task=task, **settings)


class GivenNoise(NamedTuple):
    """Noise on a given frame: a timestep that it is shown at, or a multiple of the t of the frames that are sampled."""

    level: int = 0
    multiple: float = 0.0


def given_noise(words: str, num_timesteps: int = NUM_TIMESTEPS) -> list[GivenNoise]:
    """The noise of given frames, as `GenerationConfig.given_noise` writes it; empty for none.

    Args:
        words: such as `50`, `0.2,0.4` or `0.2t`.
        num_timesteps: T.

    Raises:
        ValueError: if it cannot be read, or is out of range.
    """
    found = []
    for word in filter(None, (word.strip() for word in words.split(","))):
        match = re.fullmatch(r"(\d+)(\.\d+)?(t?)", word)
        value = float(match[1] + (match[2] or "")) if match else -1.0
        if match and match[3] and value < 1:
            found.append(GivenNoise(multiple=value))
        elif match and not match[3] and value <= (1 if match[2] else num_timesteps):
            found.append(GivenNoise(level=round(value * num_timesteps) if match[2] else int(value)))
        else:
            raise ValueError(
                f"given_noise {words!r}: write timesteps up to {num_timesteps} (50), shares of them up to 1.0 (0.2), "
                f"or multiples below 1 of the others' t (0.2t), separated by commas"
            )
    return found if any(found_one != GivenNoise() for found_one in found) else []


def indices(words: str) -> tuple[int, ...]:
    """Frames by index, such as `0,5,-1` or `4:12` (the end excluded), as integers.

    Raises:
        ValueError: if it cannot be read.
    """
    found: list[int] = []
    for word in filter(None, (word.strip() for word in words.split(","))):
        match = re.fullmatch(r"(-?\d+)(?::(\d+))?(?::(\d+))?", word)
        if not match or (match[3] and not int(match[3])):
            raise ValueError(f"frames {words!r}: write indices like 0,5,-1, or a range like 4:12")
        begin = int(match[1])
        found += range(begin, int(match[2]), int(match[3] or 1)) if match[2] else [begin]
    return tuple(found)


def read_schedule(path: str) -> "Tensor":
    """The schedule in a file, int64 `(steps + 1, frames)`: a line per row, the timesteps of its frames with commas.

    Raises:
        ValueError: if the file cannot be read, or holds no schedule.
    """
    import torch

    from fvdm.diffusion.timesteps import check_schedule

    try:
        lines = [line for line in Path(path).read_text().splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"cannot read the schedule {path}: {getattr(error, 'strerror', None) or error}") from None
    try:
        rows = [[int(word) for word in line.split(",")] for line in lines]
    except ValueError:
        raise ValueError(f"{path} is no schedule: write a line per row, whole timesteps separated by commas") from None
    if len({len(row) for row in rows}) != 1:
        raise ValueError(f"{path} is no schedule: its lines must name the same number of frames")
    schedule = torch.tensor(rows)
    check_schedule(schedule)
    return schedule
