"""Videos as files: read what is given, sample on every rank, write the videos and an overview, log them to MLflow."""

import hashlib
import json
import logging
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from fvdm import config as settings
from fvdm.diffusion.tasks import TaskPlan
from fvdm.diffusion.timesteps import format_schedule
from fvdm.distributed import Ranks
from fvdm.files import write_text
from fvdm.generation.config import GenerateCommand
from fvdm.generation.frames import make_frames
from fvdm.generation.grid import choose_frames
from fvdm.generation.inputs import file_rate, read_source
from fvdm.generation.pipeline import Trained, load
from fvdm.generation.plan import encode_given, length_of, make_plan, with_noise
from fvdm.generation.prompts import read_prompts
from fvdm.media.writing import FORMATS, GIF_RATE, gif_stride, spread, tile, write, write_strips
from fvdm.tracking.config import check_uri, tracking_uri
from fvdm.tracking.pages import where_to_look
from fvdm.tracking.tracker import Tracker, run_of

logger = logging.getLogger(__name__)
GRID, ROWS, COLUMNS = 16, 8, 8  # videos side by side; rows, and frames of each, of the image: at most
SHOWN = 256  # frames that are shown side by side, at most: they are held until all videos are made


@dataclass(frozen=True)
class PreparedTask:
    """The task, once model and given files are read.

    Attributes:
        plan: the task.
        clip: latents `(1 f c h w)`, the given ones at their places.
        length: frames of a video.
        fps: of the files.
        messages: what was done to the given files, a line each.
        prompts: of each sample, in place of the one of the settings.
    """

    plan: TaskPlan
    clip: Tensor
    length: int
    fps: float
    messages: tuple[str, ...]
    prompts: tuple[str, ...] = ()


class Overview(NamedTuple):
    """What the overview shows of a video, uint8 `(n 3 h w)` each; it does not grow with the video.

    Attributes:
        first: its first frames, up to `SHOWN`.
        spread: frames from all over it.
    """

    first: Tensor
    spread: Tensor


def prepare(trained: Trained, config: GenerateCommand) -> PreparedTask:
    """Read the given files and make the plan.

    Raises:
        ValueError: if a file cannot be read, or does not fit the task.
    """
    sources = [read_source(path, trained.frame_size) for path in config.paths]
    clips = [source.frames for source in sources]
    plan = make_plan(trained, config, clips, complete=config.show_schedule)
    messages = [str(source) for source in sources]
    if clips:
        chosen = choose_frames(clips, plan, trained.stride, trained.frame_map, config.given_encoding)
        messages.append("given: " + "; ".join(chosen[1]))
    fps = config.fps or file_rate(sources, trained.stride)
    if any(source.fps for source in sources) and not config.fps:
        messages.append(
            f"fps: {fps:g}, the given speed at a stride of {trained.stride} frames"
            if trained.stride > 1
            else f"fps: {fps:g}"
        )
    if "gif" in config.forms and gif_stride(fps) > 1:
        messages.append(f"gif: at a stride of {gif_stride(fps)} frames, as a gif shows at most {GIF_RATE} a second")
    prompts = (
        tuple(prompt for prompt in read_prompts(config.prompts) for _ in range(config.num)) if config.prompts else ()
    )
    clip = encode_given(trained, config, plan, clips)
    if trained.text is not None and not config.show_schedule:
        # All at once, so that the text encoder's memory is free for sampling.
        trained.text.encode([*(prompts or [config.prompt]), config.negative_prompt])
        trained.text.release()
    return PreparedTask(plan, clip, length_of(trained, config), fps, tuple(messages), prompts)


def batches(config: GenerateCommand, ranks: Ranks) -> list[range]:
    """The seeds of every batch that this rank draws: of at most `batch_size`, and as many as ranks where it can be."""
    size = min(config.batch_size, -(-config.num // ranks.world_size))
    firsts = range(config.seed, config.seed + config.num, size)
    every = [range(first, min(first + size, config.seed + config.num)) for first in firsts]
    return [every[k] for k in ranks.share(len(every))]


def make(
    trained: Trained, config: GenerateCommand, prepared: PreparedTask, ranks: Ranks
) -> tuple[dict[int, Overview], list[Path]]:
    """Make and write this rank's samples; returns their overviews by seed, and the files.

    Raises:
        ValueError: if the class or a setting does not fit the model.
    """
    overviews: dict[int, Overview] = {}
    files: list[Path] = []
    for seeds in batches(config, ranks):
        prompts = [prepared.prompts[seed - config.seed] for seed in seeds] if prepared.prompts else []
        frames = make_frames(trained, config, prepared.plan, prepared.clip, seeds, _progress, prompts=prompts)
        videos, written = write_samples(islice(frames, prepared.length), seeds, config, prepared)
        overviews |= videos
        files += written
    return overviews, files


def _progress(steps: Sequence[int]) -> Iterator[int]:
    from tqdm import tqdm

    return iter(tqdm(steps, "sampling", leave=False, disable=not sys.stderr.isatty()))


def write_samples(
    frames: Iterable[Tensor], seeds: Sequence[int], config: GenerateCommand, prepared: PreparedTask
) -> tuple[dict[int, Overview], list[Path]]:
    """Write samples in every format, as their frames come; returns their overviews by seed, and the files.

    Args:
        frames: uint8 `(b 3 h w)`, of all samples at once.
        seeds: of the samples.
        config: the formats, and where to.
        prepared: length and speed.
    """
    stem = Path(config.out) / config.task
    endings = {form: "" if form == "frames" else f".{form}" for form in config.forms}
    files = {seed: {form: Path(f"{stem}-{seed:05d}{end}") for form, end in endings.items()} for seed in seeds}
    picked = set(spread(prepared.length, COLUMNS))
    first, far = [], []
    with ExitStack() as stack:
        puts = [
            [stack.enter_context(FORMATS[form](path, prepared.fps)) for form, path in each.items()]
            for each in files.values()
        ]
        for k, frame in enumerate(frames):
            for own, writers in zip(frame, puts, strict=True):
                for put in writers:
                    put(own)
            first += [frame] if k < SHOWN else []
            far += [frame] if k in picked else []
    overviews = {
        seed: Overview(torch.stack([frame[k] for frame in first]), torch.stack([frame[k] for frame in far]))
        for k, seed in enumerate(seeds)
        if seed < config.seed + GRID
    }
    return overviews, [path for each in files.values() for path in each.values()]


def write_overview(
    overviews: dict[int, Overview], config: GenerateCommand, trained: Trained, prepared: PreparedTask
) -> list[Path]:
    """Write the videos side by side, an image of their frames, and a record of the settings."""
    out = Path(config.out)
    several = [overviews[seed] for seed in sorted(overviews)]
    forms = [form for form in config.forms if form != "frames"] or ["mp4"]
    files = [out / f"{config.task}.{form}" for form in forms]
    for form, path in zip(forms, files, strict=True):
        write(tile([video.first for video in several]), path, prepared.fps, form)
    write_strips(torch.stack([video.spread for video in several[:ROWS]]), out / f"{config.task}.png", COLUMNS)
    record = settings.plain(config) | {"checkpoint": str(trained.folder), "step": trained.step, "fps": prepared.fps}
    write_text(out / f"{config.task}.json", json.dumps(record, indent=1))
    return [*files, out / f"{config.task}.png", out / f"{config.task}.json"]


def report(files: Sequence[Path], config: GenerateCommand, trained: Trained) -> None:
    """Log the files to the MLflow run that trained the model; to one of their own where that is not known."""
    journal = hashlib.sha256(str(trained.folder.resolve()).encode()).hexdigest()[:16]  # one for each model
    tracker = Tracker(
        Path(config.out) / ".tracking" / journal,
        config.tracking,
        f"generate-{config.task}",
        tags={"kind": "generate"},
        run_id=run_of(trained.folder),
    )
    for path in files:
        if path.suffix == ".png":
            tracker.image(path, f"generate/{config.task}", trained.step)
        tracker.artifact(path, f"generate/{config.task}")
    tracker.close()
    print(f"MLflow: {where_to_look(tracker.folder)}")


def gather(overviews: dict[int, Overview], files: list[Path], ranks: Ranks) -> tuple[dict[int, Overview], list[Path]]:
    """What the ranks made, on rank 0; there is nothing to do for one rank alone."""
    if ranks.world_size == 1:
        return overviews, files
    parts: list[Any] | None = [None] * ranks.world_size if ranks.is_main else None
    dist.gather_object((overviews, files), parts)
    if parts is None:
        return {}, []
    return {k: v for part, _ in parts for k, v in part.items()}, sorted(path for _, some in parts for path in some)


def run(config: GenerateCommand, ranks: Ranks) -> None:
    """Make, write, and report; rank 0 alone prints.

    Raises:
        ValueError: if settings, files and model do not fit each other, or MLflow keeps no runs at the tracking address.
    """
    check_uri(tracking_uri(config.tracking.uri))
    if ranks.world_size > 1 and torch.cuda.is_available() and not config.device:
        config = replace(config, device=f"cuda:{ranks.local_rank}")
    trained = load(
        config.checkpoint,
        config.weights,
        config.vae,
        config.device,
        config.precision,
        config.compile,
        config.text_encoder,
        config.base,
    )
    prepared = prepare(trained, config)
    if prepared.prompts:
        config = replace(config, num=len(prepared.prompts))
    if ranks.is_main:
        print("\n".join(prepared.messages), end="\n" if prepared.messages else "", flush=True)
    if config.show_schedule:
        if ranks.is_main:
            print(format_schedule(with_noise(trained, config, prepared.plan)[0].schedule))
        return
    try:
        Path(config.out).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"cannot write to {config.out}: {error.strerror}") from None
    overviews, files = gather(*make(trained, config, prepared, ranks), ranks)
    if ranks.is_main:
        overview = write_overview(overviews, config, trained, prepared)
        report([*(path for path in files if path.is_file()), *overview], config, trained)
        print(
            f"{config.task}: {config.num} video(s) of {prepared.length} frames in {config.out}; "
            f"all together: {overview[0]}"
        )
