"""One request of the playground: sample in a thread of its own, hand out the clip after each step, stop when told.

The clip goes the way that `fvdm generate` takes, so the command line that the page shows makes the same frames.
"""

import queue
import shlex
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from fvdm.diffusion.tasks import find
from fvdm.generation.config import GenerationConfig
from fvdm.generation.frames import make_frames
from fvdm.generation.grid import choose_frames, runs
from fvdm.generation.inputs import STEP_IN_TIME, file_rate, read_source
from fvdm.generation.pipeline import Trained
from fvdm.generation.plan import encode_given, length_of, make_plan, task_spec, with_noise

COLUMNS = 8  # frames side by side in the image of a clip


class CancelledError(Exception):
    """The user has cancelled the request."""


class Snapshot(NamedTuple):
    """A clip on its way.

    Attributes:
        step: network evaluations so far.
        frames: uint8 `(f 3 h w)`; those of the window that is sampled at the moment, or all of them at the end.
        done: whether the clip is finished.
    """

    step: int
    frames: Tensor
    done: bool


@dataclass(frozen=True)
class Request:
    """What to sample.

    Attributes:
        config: task and sampler; `num` is 1.
        clips: the given images and videos, uint8 `(n 3 h w)` each, of the model's size.
        names: their file names, for the command line.
        fps: frames per second of the file, as `fvdm generate` chooses it.
    """

    config: GenerationConfig
    clips: tuple[Tensor, ...]
    names: tuple[str, ...]
    fps: float = STEP_IN_TIME


def command_line(checkpoint: str, request: Request) -> str:
    """The command that makes the same clip: `fvdm generate ...` with every setting that is not the default."""
    words = ["fvdm", "generate", "--checkpoint", checkpoint, "--task", request.config.task, "--num", "1"]
    if request.names:
        words += ["--given", request.names[0] if len(request.names) == 1 else f"[{','.join(request.names)}]"]
    for field in fields(GenerationConfig):
        value = getattr(request.config, field.name)
        if field.name not in ("task", "num", "batch_size") and value != field.default:
            shown = Path(value).name if field.name == "schedule" else str(value)  # The page offers the file.
            words += [f"--{field.name.rstrip('_').replace('_', '-')}", shown]
    return shlex.join(words)


def request_of(model: Trained, config: GenerationConfig, paths: Sequence[str]) -> Request:
    """The request for a task and given files; a task that takes no given frames goes without them.

    Raises:
        ValueError: if a file cannot be read, or the settings do not fit the task.
    """
    sources = [read_source(path, model.frame_size) for path in paths]
    clips = tuple(source.frames for source in sources)
    if not find(config.task).plan(task_spec(model, config, clips)).given:
        return Request(config, (), ())
    names = tuple(Path(path).name for path in paths)
    return Request(config, clips, names, file_rate(sources, model.stride))


def plan_of(model: Trained, request: Request) -> tuple[Tensor, tuple[int, ...]]:
    """The schedule `(s + 1, f)` of a request, and the frames that are given, whether or not they are at hand.

    Raises:
        ValueError: if the task and the given frames do not fit each other.
    """
    blank = torch.zeros(1, 3, *model.frame_size, dtype=torch.uint8)
    clips = request.clips or ((blank,) if find(request.config.task).needs_given else ())
    plan = make_plan(model, request.config, clips, complete=True)
    return with_noise(model, request.config, plan)[0].schedule, plan.given


def given_images(model: Trained, request: Request) -> dict[int, Tensor]:
    """The given images at the frames of the schedule that take them, uint8 `(3 h w)`; of a group its first frame.

    Raises:
        ValueError: if there are too few frames.
    """
    if not request.clips:
        return {}
    plan, encoding = make_plan(model, request.config, request.clips), request.config.given_encoding
    frames = choose_frames(request.clips, plan, model.stride, model.frame_map, encoding)[0]
    shown, first = {}, 0
    for run in runs(model.frame_map, plan.given, encoding):
        for latent in run.latents:
            shown[latent] = frames[first + max(0, model.frame_map.span(latent).start - run.frames[0])]
        first += len(run.frames)
    return shown


def missing_given(model: Trained, request: Request) -> str:
    """What must be given before the request can be sampled, as a sentence; empty if nothing is missing."""
    count = len(plan_of(model, request)[1])
    if not count or request.clips:
        return ""
    frames = "a given frame: drop an image" if count == 1 else "given frames: drop images"
    return f"{request.config.task} takes {frames} or a video on the field at the top"


def run(model: Trained, request: Request, cancel: threading.Event) -> Iterator[Snapshot]:
    """Sample, and yield the clip after each step. Closing the iterator stops the sampling.

    Raises:
        ValueError: if the request does not fit the model.
        CancelledError: once `cancel` is set.
    """
    found: queue.Queue[Snapshot | BaseException] = queue.Queue()
    closed = threading.Event()
    args = (model, request, (cancel, closed), found)
    thread = threading.Thread(target=_work, args=args, name="sampling", daemon=True)
    thread.start()
    try:
        while True:
            item = found.get()
            if isinstance(item, BaseException):
                raise item
            yield item
            if item.done:
                return
    finally:
        closed.set()
        thread.join()


@torch.no_grad()
def _work(
    model: Trained,
    request: Request,
    stops: tuple[threading.Event, ...],
    found: "queue.Queue[Snapshot | BaseException]",
) -> None:
    step = 0

    def on_step(window: Tensor) -> None:
        nonlocal step
        if any(stop.is_set() for stop in stops):
            raise CancelledError
        step += 1
        if found.empty():  # A slow page skips steps; it never holds up the sampling.
            found.put(Snapshot(step, model.vae.decode(window)[0].cpu(), done=False))

    try:
        config = request.config
        plan = make_plan(model, config, request.clips)
        latents = encode_given(model, config, plan, request.clips)
        frames = make_frames(model, config, plan, latents, [config.seed], on_step=on_step)
        clip = torch.cat(list(islice(frames, length_of(model, config))))
        found.put(Snapshot(step, clip, done=True))
    except BaseException as error:  # Whatever it is, the page must learn of it.
        found.put(error)


def strip(snapshot: Snapshot) -> np.ndarray:
    """A clip's frames in rows of eight, as one image: uint8 `(h w 3)`."""
    frames = snapshot.frames
    rest = -len(frames) % COLUMNS
    padded = torch.cat([frames, frames.new_full((rest, *frames.shape[1:]), 255)])
    rows = [torch.cat(list(row), dim=2) for row in padded.split(COLUMNS)]
    return torch.cat(rows, dim=1).permute(1, 2, 0).numpy()


def write_schedule(schedule: Tensor, path: Path) -> None:
    """Write a schedule as `--schedule` reads it: a line per row, the timesteps of its frames with commas."""
    from fvdm.files import write_text

    write_text(path, "".join(",".join(map(str, row)) + "\n" for row in schedule.tolist()))
