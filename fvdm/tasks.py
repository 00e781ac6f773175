"""The tasks of the paper's section 2.4 as data: which frames are given. The timestep matrix follows from that.

`run` is one call of the sampler for every task; nothing below asks which task it is.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fvdm.diffusion import Diffusion, Model
from fvdm.samplers import Solver, extend, generators, sample, start
from fvdm.timesteps import full_sequence, hold_clean

TASKS: dict[str, Callable[[int], tuple[int, ...]]] = {
    "generate": lambda frames: (),
    "image-to-video": lambda frames: (0,),
    "interpolate": lambda frames: (0, frames - 1),
    "long": lambda frames: tuple(range(frames // 2)),
}
"""Task -> the indices of the given frames, in a clip of so many frames."""


def given_frames(task: str, frames: int) -> tuple[int, ...]:
    """The indices of the frames that a task wants given, in a clip of `frames`.

    Raises:
        ValueError: if there is no such task; lists those there are.
    """
    if task not in TASKS:
        raise ValueError(f"task {task!r} is unknown; choose one of {', '.join(TASKS)}")
    return TASKS[task](frames)


@dataclass(frozen=True)
class Sampling:
    """How to sample.

    Attributes:
        steps: sampling steps, 1 to T.
        guidance: classifier-free guidance scale of a class-conditional model; 1 is none.
        solver: a step of `fvdm.samplers`; None is DDIM with eta 0.
        overlap: frames that a window of a long video shares with the one before; 0 is half the window.
        null_class: the label that stands for no class.
        progress: wraps the sequence of steps, such as `tqdm`.
    """

    steps: int = 50
    guidance: float = 1.0
    solver: Solver | None = None
    overlap: int = 0
    null_class: int = 0
    progress: Callable[[Sequence[int]], Iterator[int]] = iter


def run(
    model: Model,
    diffusion: Diffusion,
    clip: Tensor,
    given: Sequence[int],
    seeds: Sequence[int],
    how: Sampling,
    length: int = 0,
    y: Tensor | None = None,
) -> Tensor:
    """Draw the frames of a clip that are not given; go on window by window where more frames are wanted.

    Args:
        model: the denoiser.
        diffusion: its noise process.
        clip: latents `(b f c h w)`, f the frames the model takes; what stands in frames not given is ignored.
        given: indices of the given frames.
        seeds: one per sample; a sample is the same in every batch.
        how: sampling settings.
        length: frames wanted; 0 is f.
        y: class labels `(b)`.

    Returns:
        latents `(b length c h w)`; given frames are bit-identical to those of `clip`.

    Raises:
        ValueError: if a setting is out of range.
    """
    generator = generators(seeds)

    def draw(latents: Tensor, held: Sequence[int]) -> Tensor:
        schedule = hold_clean(full_sequence(how.steps, latents.shape[1], diffusion.num_timesteps), held)
        return sample(
            model,
            start(latents, schedule, diffusion, generator),
            schedule,
            diffusion,
            y=y,
            guidance=how.guidance,
            null_class=how.null_class,
            solver=how.solver,
            generator=generator,
            progress=how.progress,
        )

    return extend(draw, draw(clip, given), length or clip.shape[1], how.overlap or clip.shape[1] // 2)


def place(given: Tensor, indices: Sequence[int], frames: int) -> Tensor:
    """Put given latents `(b g c h w)` at their indices in a clip `(b frames c h w)` of zeros.

    Raises:
        ValueError: if their number is not that of the indices.
    """
    if given.shape[1] != len(indices):
        raise ValueError(f"{len(indices)} given frames are wanted, {given.shape[1]} came")
    clip = torch.zeros((given.shape[0], frames, *given.shape[2:]), dtype=given.dtype, device=given.device)
    clip[:, list(indices)] = given
    return clip
