"""Videos from a model: `python -m fvdm.generate --checkpoint runs/demo --task image-to-video --given cat.png`.

docs/tasks.md shows every task. Under torchrun the ranks share the samples, and write the same files.
"""

import hashlib
import json
import logging
import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from types import ModuleType
from typing import Any, Literal, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from fvdm import config as settings
from fvdm.distributed import Ranks, from_environment
from fvdm.files import write_text
from fvdm.inputs import choose, read_frames, read_source
from fvdm.matrices import Plan, text
from fvdm.media import FORMATS, GIF_RATE, gif_interval, spread, tile, write, write_strips
from fvdm.pipeline import Trained, encode_given, generate, length_of, load, make_frames, make_plan, stream
from fvdm.recipe import Recipe
from fvdm.tracking import Tracker, TrackingConfig, run_of

__all__ = ["GenerateConfig", "Trained", "generate", "load", "main", "read_frames", "stream"]
logger = logging.getLogger(__name__)
STEP_IN_TIME = 8.0  # frames per second where nothing given has a rate
GRID, ROWS, COLUMNS = 16, 8, 8  # videos side by side; rows, and frames of each, of the picture: at most
SHOWN = 256  # frames that are shown side by side, at most: they are held until all videos are made


@dataclass(frozen=True)
class GenerateConfig(Recipe):
    """What to make, from what, and where to put it.

    Attributes:
        checkpoint: a run's folder (its newest checkpoint is taken) or a checkpoint; a folder of fvdm.convert; a
            checkpoint file of Latte or of the official FVDM code; or `example`, a small model that ships with this.
        given: an image, a video, a folder of frames, or a list of them, [a.png,b.png]. One video gives the frames that
            the task wants, at the model's interval; two give the end of the first and the beginning of the second.
        out: folder for the videos.
        formats: mp4, gif, webm or frames (a folder of PNG files); several with commas.
        fps: frames per second of the files; 0 keeps the speed of the given video, or is 8 without one.
        num: number of samples.
        show_matrix: print the timestep matrix, and make nothing.
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
    show_matrix: bool = False
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


@dataclass(frozen=True)
class Job:
    """What the settings come to, once model and given files are read.

    Attributes:
        plan: the task.
        clip: latents `(1 f c h w)`, the given ones at their places.
        length: frames of a video.
        fps: of the files.
        said: what was done to the given files, a line each.
    """

    plan: Plan
    clip: Tensor
    length: int
    fps: float
    said: tuple[str, ...]


class Shown(NamedTuple):
    """What the overview shows of a video, uint8 `(n 3 h w)` each; it does not grow with the video.

    Attributes:
        first: its first frames, up to `SHOWN`.
        spread: frames from all over it.
    """

    first: Tensor
    spread: Tensor


def prepare(trained: Trained, config: GenerateConfig) -> Job:
    """Read the given files and make the plan.

    Raises:
        ValueError: if a file cannot be read, or does not fit the task.
    """
    sources = [read_source(path, trained.size) for path in config.paths]
    clips = [source.frames for source in sources]
    plan = make_plan(trained, config, clips, whole=config.show_matrix)
    said = [str(source) for source in sources]
    if clips:
        said.append("given: " + "; ".join(choose(clips, plan, trained.interval)[1]))
    rates = [source.fps for source in sources if source.fps]
    fps = config.fps or (rates[0] / trained.interval if rates else STEP_IN_TIME)
    if rates and not config.fps:
        said.append(
            f"fps: {fps:g}, the given speed at every {trained.interval}. frame"
            if trained.interval > 1
            else f"fps: {fps:g}"
        )
    if "gif" in config.forms and gif_interval(fps) > 1:
        said.append(f"gif: every {gif_interval(fps)}. frame, as a gif shows at most {GIF_RATE} a second")
    return Job(plan, encode_given(trained, plan, clips), length_of(trained, config), fps, tuple(said))


def batches(config: GenerateConfig, ranks: Ranks) -> list[range]:
    """The seeds of every batch that this rank draws: of at most `batch_size`, and as many as ranks where it can be."""
    size = min(config.batch_size, -(-config.num // ranks.world_size))
    firsts = range(config.seed, config.seed + config.num, size)
    every = [range(first, min(first + size, config.seed + config.num)) for first in firsts]
    return [every[k] for k in ranks.share(len(every))]


def make(trained: Trained, config: GenerateConfig, job: Job, ranks: Ranks) -> tuple[dict[int, Shown], list[Path]]:
    """Draw and write this rank's samples; what is shown of them, by seed, and the files.

    Raises:
        ValueError: if the class or a setting does not fit the model.
    """
    shown: dict[int, Shown] = {}
    files: list[Path] = []
    for seeds in batches(config, ranks):
        frames = make_frames(trained, config, job.plan, job.clip, seeds, _progress)
        videos, written = write_samples(islice(frames, job.length), seeds, config, job)
        shown |= videos
        files += written
    return shown, files


def _progress(steps: Sequence[int]) -> Iterator[int]:
    from tqdm import tqdm

    return iter(tqdm(steps, "sampling", leave=False, disable=not sys.stderr.isatty()))


def write_samples(
    frames: Iterable[Tensor], seeds: Sequence[int], config: GenerateConfig, job: Job
) -> tuple[dict[int, Shown], list[Path]]:
    """Write samples in every format, as their frames come; what is shown of them, by seed, and the files.

    Args:
        frames: uint8 `(b 3 h w)`, of all samples at once.
        seeds: of the samples.
        config: the formats, and where to.
        job: length and speed.
    """
    stem = Path(config.out) / config.task
    endings = {form: "" if form == "frames" else f".{form}" for form in config.forms}
    files = {seed: {form: Path(f"{stem}-{seed:05d}{end}") for form, end in endings.items()} for seed in seeds}
    picked = set(spread(job.length, COLUMNS))
    first, far = [], []
    with ExitStack() as stack:
        puts = [
            [stack.enter_context(FORMATS[form](path, job.fps)) for form, path in each.items()]
            for each in files.values()
        ]
        for k, frame in enumerate(frames):
            for own, writers in zip(frame, puts, strict=True):
                for put in writers:
                    put(own)
            first += [frame] if k < SHOWN else []
            far += [frame] if k in picked else []
    shown = {
        seed: Shown(torch.stack([frame[k] for frame in first]), torch.stack([frame[k] for frame in far]))
        for k, seed in enumerate(seeds)
        if seed < config.seed + GRID
    }
    return shown, [path for each in files.values() for path in each.values()]


def write_overview(shown: dict[int, Shown], config: GenerateConfig, trained: Trained, job: Job) -> list[Path]:
    """Write the videos side by side, a picture of their frames, and a record of how they were made."""
    out = Path(config.out)
    several = [shown[seed] for seed in sorted(shown)]
    forms = [form for form in config.forms if form != "frames"] or ["mp4"]
    files = [out / f"{config.task}.{form}" for form in forms]
    for form, path in zip(forms, files, strict=True):
        write(tile([video.first for video in several]), path, job.fps, form)
    write_strips(torch.stack([video.spread for video in several[:ROWS]]), out / f"{config.task}.png", COLUMNS)
    record = settings.plain(config) | {"checkpoint": str(trained.folder), "step": trained.step, "fps": job.fps}
    write_text(out / f"{config.task}.json", json.dumps(record, indent=1))
    return [*files, out / f"{config.task}.png", out / f"{config.task}.json"]


def report(files: Sequence[Path], config: GenerateConfig, trained: Trained) -> None:
    """Log the files to the MLflow run that trained the model; to one of their own where that is not known."""
    journal = hashlib.sha256(str(trained.folder.resolve()).encode()).hexdigest()[:16]  # one for each model
    tracker = Tracker(
        Path(config.out) / ".tracking" / journal,
        config.tracking,
        f"generate-{config.task}",
        tags={"kind": "generate"},
        into=run_of(trained.folder),
    )
    for path in files:
        if path.suffix == ".png":
            tracker.image(path, f"generate/{config.task}", trained.step)
        tracker.artifact(path, f"generate/{config.task}")
    tracker.close()


def gather(shown: dict[int, Shown], files: list[Path], ranks: Ranks) -> tuple[dict[int, Shown], list[Path]]:
    """What the ranks made, on rank 0; there is nothing to do for one rank alone."""
    if ranks.world_size == 1:
        return shown, files
    parts: list[Any] | None = [None] * ranks.world_size if ranks.is_main else None
    dist.gather_object((shown, files), parts)
    if parts is None:
        return {}, []
    return {k: v for part, _ in parts for k, v in part.items()}, sorted(path for _, some in parts for path in some)


def run(config: GenerateConfig, ranks: Ranks) -> None:
    """Make, write, and report; rank 0 alone speaks.

    Raises:
        ValueError: if settings, files and model do not fit each other.
    """
    if ranks.world_size > 1 and torch.cuda.is_available() and not config.device:
        config = replace(config, device=f"cuda:{ranks.local_rank}")
    trained = load(config.checkpoint, config.weights, config.vae, config.device, config.precision, config.compile)
    job = prepare(trained, config)
    if ranks.is_main:
        print("\n".join(job.said), end="\n" if job.said else "", flush=True)
    if config.show_matrix:
        if ranks.is_main:
            print(text(job.plan.matrix))
        return
    try:
        Path(config.out).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"cannot write to {config.out}: {error.strerror}") from None
    shown, files = gather(*make(trained, config, job, ranks), ranks)
    if ranks.is_main:
        overview = write_overview(shown, config, trained, job)
        report([*(path for path in files if path.is_file()), *overview], config, trained)
        print(f"{config.task}: {config.num} video(s) of {job.length} frames in {config.out}; all in one: {overview[0]}")


def main() -> None:
    """Command line."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    try:
        config = settings.parse(GenerateConfig, description=__doc__)
        ranks = from_environment() if "RANK" in os.environ else Ranks()
        if ranks.world_size > 1:
            dist.init_process_group("gloo")
        run(config, ranks)
    except ValueError as error:
        settings.fail(error)
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()


class _Callable(ModuleType):
    """`from fvdm import generate` gives this module once something has imported it: so it can be called like its
    function of that name."""

    def __call__(self, *args: Any, **settings: Any) -> Tensor:
        """See `fvdm.pipeline.generate`."""
        return generate(*args, **settings)


sys.modules[__name__].__class__ = _Callable


if __name__ == "__main__":
    main()
