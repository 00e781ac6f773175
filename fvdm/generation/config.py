"""Settings of generation, which the command line, Python and a registered model share. Pure."""

import re
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from fvdm.tracking.config import TrackingConfig

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class GenerationConfig:
    """Settings of a video to generate. docs/tasks.md shows every task.

    Attributes:
        task: generate, image-to-video, interpolate, any-frame, infill, transition, long, next-frame, progressive,
            edit, pyramid, stream or custom.
        frames: indices of the frames that the task selects, such as 0,5,-1 or 4:12: the given frames of any-frame, the
            missing ones of infill, those that edit changes.
        length: frames of the video; 0 is one window of the model, or 128 for long and stream.
        context: given frames that long, next-frame, pyramid and stream go on from, and that transition takes of each
            clip; also frames that a window of long shares with the one before, and clean ones that stream keeps in
            view; 0 is the task's own number.
        delay: rows of the schedule that a frame of pyramid or stream starts after the one before; 0 is the task's own.
        strength: how much edit may change, 0 to 1.
        slope: how much nearer to pure noise each frame of progressive begins than the one before.
        schedule: file with the schedule of custom: a line per row, the timesteps of its frames separated by commas.
        num: number of samples.
        seed: seed of the first sample; the k-th has seed + k, whatever the batch size.
        batch_size: samples made at once.
        class_: class of a class-conditional model, by name or number; empty picks one for each sample at random, from
            its seed.
        steps: sampling steps of a frame.
        solver: ddim, ddpm, dpm++ or unipc.
        spacing: where the steps lie: even (the paper's), trailing, leading, karras or log-snr; empty is even for ddim
            and ddpm, karras for dpm++ and unipc.
        eta: noise of ddim, 0 to 1.
        guidance: classifier-free guidance scale of a class-conditional model; 1 is none.
        guidance_interval: lowest and highest timestep that is guided; empty is all.
        guidance_rescale: 0 to 1: how far a guided estimate gets its standard deviation back.
        history_guidance: guidance scale towards the clean frames that are seen; 1 is none.
        given_noise: timestep that clean frames are shown to the network at; 0 is none.
    """

    task: str = "generate"
    frames: str = ""
    length: int = 0
    context: int = 0
    delay: int = 0
    strength: float = 0.6
    slope: float = 0.1
    schedule: str = ""
    num: int = 1
    seed: int = 0
    batch_size: int = 4
    class_: str = ""
    steps: int = 50
    solver: str = "ddim"
    spacing: str = ""
    eta: float = 0.0
    guidance: float = 1.0
    guidance_interval: tuple[int, int] | None = None
    guidance_rescale: float = 0.0
    history_guidance: float = 1.0
    given_noise: int = 0

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


@dataclass(frozen=True)
class GenerateCommand(GenerationConfig):
    """Settings of a video to generate, what it starts from, and where to write it.

    Attributes:
        checkpoint: a run's folder (its newest checkpoint is taken) or a checkpoint; a folder of `fvdm convert`; a
            checkpoint file of Latte or of the official FVDM code; or `example`, a small model that ships with this.
        given: an image, a video, a folder of frames, or a list of them, [a.png,b.png]. One video gives the frames that
            the task needs, at the model's stride; two give the end of the first and the beginning of the second.
        out: folder for the videos.
        formats: mp4, gif, webm or frames (a folder of PNG files); several with commas.
        fps: frames per second of the files; 0 keeps the speed of the given video, or is 8 without one.
        num: number of samples.
        show_schedule: print the timestep schedule, and generate nothing.
        weights: ema (the average) or model (the weights themselves).
        vae: VAE by name or path; empty takes the one the model was trained with.
        device: where to run, such as cuda or cpu; empty takes a GPU if there is one.
        precision: bf16 or fp32; empty takes bf16 on a GPU, fp32 on the CPU.
        compile: make the model faster with torch.compile; needs a C++ compiler, and a minute at the start.
        tracking: where the videos are reported, beside the folder.
    """

    checkpoint: str
    given: str | list[str] = ""
    out: str = "out"
    formats: str = "mp4,gif"
    fps: float = 0.0
    num: int = field(default=4, kw_only=True)
    show_schedule: bool = False
    weights: Literal["ema", "model"] = "ema"
    vae: str = ""
    device: str = ""
    precision: Literal["", "bf16", "fp32"] = ""
    compile: bool = False
    tracking: TrackingConfig = field(default_factory=lambda: TrackingConfig(system_metrics=False))

    def __post_init__(self) -> None:
        """Refuse numbers out of range."""
        super().__post_init__()
        if not 0 <= self.fps <= 240:
            raise ValueError(f"fps is {self.fps}: choose up to 240, or 0 for that of the given video")
        from fvdm.media.writing import FORMATS

        for form in self.forms or [""]:
            if form not in FORMATS:
                raise ValueError(f"format {form!r} is unknown; choose among {', '.join(FORMATS)}")

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
