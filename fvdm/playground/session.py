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

import torch
from torch import Tensor

from fvdm.generation.config import GenerationConfig
from fvdm.generation.frames import make_frames
from fvdm.generation.pipeline import Trained
from fvdm.generation.plan import encode_given, length_of, make_plan, with_noise


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
    """

    config: GenerationConfig
    clips: tuple[Tensor, ...]
    names: tuple[str, ...]


def command_line(checkpoint: str, request: Request) -> str:
    """The command that makes the same clip: `fvdm generate ...` with every setting that is not the default."""
    words = ["fvdm", "generate", "--checkpoint", checkpoint, "--task", request.config.task, "--num", "1"]
    if request.names:
        words += ["--given", request.names[0] if len(request.names) == 1 else f"[{','.join(request.names)}]"]
    for field in fields(GenerationConfig):
        value = getattr(request.config, field.name)
        if field.name not in ("task", "num", "batch_size") and value != field.default:
            words += [f"--{field.name.rstrip('_').replace('_', '-')}", str(value)]
    return shlex.join(words)


def plan_of(model: Trained, request: Request) -> tuple[Tensor, tuple[int, ...]]:
    """The schedule `(s + 1, f)` of a request, and the frames that are given.

    Raises:
        ValueError: if the task and the given frames do not fit each other.
    """
    plan = make_plan(model, request.config, request.clips, complete=True)
    return with_noise(model, request.config, plan)[0].schedule, plan.given


def run(model: Trained, request: Request, cancel: threading.Event) -> Iterator[Snapshot]:
    """Sample, and yield the clip after each step. Closing the iterator stops the sampling.

    Raises:
        ValueError: if the request does not fit the model.
        CancelledError: once `cancel` is set.
    """
    found: queue.Queue[Snapshot | BaseException] = queue.Queue()
    thread = threading.Thread(target=_work, args=(model, request, cancel, found), name="sampling", daemon=True)
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
        cancel.set()
        thread.join()


@torch.no_grad()
def _work(
    model: Trained, request: Request, cancel: threading.Event, found: "queue.Queue[Snapshot | BaseException]"
) -> None:
    step = 0

    def on_step(window: Tensor) -> None:
        nonlocal step
        if cancel.is_set():
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


def read_given(paths: Sequence[str], size: int) -> tuple[Tensor, ...]:
    """Given files as clips of the model's size, uint8 `(n 3 size size)` each.

    Raises:
        ValueError: if a file is neither an image nor a video.
    """
    from fvdm.generation.inputs import read_source

    return tuple(read_source(path, size).frames for path in paths)


def write_schedule(schedule: Tensor, path: Path) -> None:
    """Write a schedule as `--schedule` reads it: a line per row, the timesteps of its frames with commas."""
    from fvdm.files import write_text

    write_text(path, "".join(",".join(map(str, row)) + "\n" for row in schedule.tolist()))
