"""A task, carried out: its matrix (`fvdm.matrices`) is handed to the one sampling loop (`fvdm.samplers`).

`draw` makes a video of known length, `draw_stream` one without an end. Nothing below asks which task it is.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fvdm.diffusion import Diffusion, Model
from fvdm.guidance import Guidance
from fvdm.matrices import TASKS, Wish, find, given_frames, kept, long, rolling_blocks
from fvdm.samplers import How, Progress, generators, start, stream, windows
from fvdm.solvers import Solver, ddim
from fvdm.timesteps import hold_clean, spaced

__all__ = ["TASKS", "Sampling", "draw", "draw_stream", "find", "given_frames", "place", "run"]


def draw(
    model: Model,
    diffusion: Diffusion,
    clip: Tensor,
    matrix: Tensor,
    seeds: Sequence[int],
    how: How | None = None,
    y: Tensor | None = None,
    window: int = 0,
) -> Tensor:
    """Draw a video under a matrix.

    Args:
        model: the denoiser.
        diffusion: its noise process.
        clip: latents `(b f c h w)`; what stands in frames that begin at T is ignored.
        matrix: int `(s + 1, f)`; see `fvdm.tasks`.
        seeds: one per sample; a sample is the same in every batch.
        how: solver, guidance and so on.
        y: class labels `(b)`.
        window: frames that the model takes; 0 is f.

    Returns:
        latents `(b f c h w)`; frames whose column stands at 0 are bit-identical to those of `clip`.

    Raises:
        ValueError: if a setting is out of range.
    """
    generator = generators(seeds)
    x = start(clip, matrix, diffusion, generator)
    rest = iter(x.split(1, dim=1))
    blocks = windows(matrix, window or clip.shape[1])

    def fresh(n: int) -> Tensor:
        return torch.cat([next(rest) for _ in range(n)], dim=1)

    made = list(stream(model, fresh, blocks, diffusion, how, y=y, generator=generator))
    return torch.cat([*made, *rest], dim=1)  # The rest lies right of all that moves.


def draw_stream(
    model: Model,
    diffusion: Diffusion,
    given: Tensor,
    want: Wish,
    seeds: Sequence[int],
    how: How | None = None,
    y: Tensor | None = None,
) -> Iterator[Tensor]:
    """Frames of a video without an end, one by one, in the memory of one window.

    Args:
        model: the denoiser.
        diffusion: its noise process.
        given: latents `(b g c h w)` that the video begins with, g >= 0; those `want` holds are taken.
        want: levels, window, context and delay.
        seeds: one per sample.
        how: solver, guidance and so on.
        y: class labels `(b)`.

    Yields:
        latents `(b 1 c h w)`; stop asking when there are enough.

    Raises:
        ValueError: if a setting is out of range.
    """
    generator = generators(seeds)
    held = replace(want, length=want.window).first(kept(want))
    if given.shape[1] < len(held):
        raise ValueError(f"{len(held)} given frames are wanted, {given.shape[1]} came")
    before = [given[:, k : k + 1] for k in held]
    shape = (given.shape[0], 1, *given.shape[2:])
    top = want.levels[:1]

    def one() -> Tensor:
        empty = torch.zeros(shape, device=given.device, dtype=given.dtype)
        return before.pop(0) if before else start(empty, top[:, None], diffusion, generator)

    def fresh(n: int) -> Tensor:
        return torch.cat([one() for _ in range(n)], dim=1)

    for frames in stream(model, fresh, rolling_blocks(want), diffusion, how, y=y, generator=generator):
        yield from frames.split(1, dim=1)


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


@dataclass(frozen=True)
class Sampling:
    """The short form of how to sample, for `run`.

    Attributes:
        steps: sampling steps, 1 to T, spaced as suits the solver.
        guidance: classifier-free guidance scale of a class-conditional model; 1 is none.
        solver: one of `fvdm.solvers`; None is DDIM with eta 0.
        overlap: frames that a window of a long video shares with the one before; 0 is half the window.
        null_class: the label that stands for no class.
        progress: wraps the sequence of steps, such as `tqdm`.
    """

    steps: int = 50
    guidance: float = 1.0
    solver: Solver | None = None
    overlap: int = 0
    null_class: int = 0
    progress: Progress = iter


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
    window = clip.shape[1]
    solver = how.solver or ddim()
    levels = spaced(solver.spacing, how.steps, diffusion.noise_levels())
    matrix = hold_clean(long(Wish(levels, window, length or window, context=how.overlap)).matrix, given)
    whole = torch.cat([clip, clip.new_zeros(clip.shape[0], matrix.shape[1] - window, *clip.shape[2:])], dim=1)
    walked = How(solver, Guidance(how.guidance, null_class=how.null_class), progress=how.progress)
    return draw(model, diffusion, whole, matrix, seeds, walked, y, window)
