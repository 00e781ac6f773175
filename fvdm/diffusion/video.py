"""Videos of any length, sampled under a schedule by the one loop of `fvdm.diffusion.sampling`.

`sample_video` samples a video of known length, `stream_video` one without an end. Nothing below asks which task it is.
"""

from collections.abc import Iterable, Iterator, Sequence
from itertools import chain

import torch
from torch import Tensor

from fvdm.diffusion.process import Denoiser, Diffusion
from fvdm.diffusion.sampling import Block, SamplerConfig, generators, start, stream, windows


def sample_video(
    model: Denoiser,
    diffusion: Diffusion,
    clip: Tensor,
    schedule: Tensor,
    seeds: Sequence[int],
    sampler: SamplerConfig | None = None,
    y: Tensor | None = None,
    window: int = 0,
    negative: Tensor | None = None,
) -> Tensor:
    """Sample a video under a schedule.

    Args:
        model: the denoiser.
        diffusion: its noise process.
        clip: latents `(b f c h w)`; what stands in frames that begin at T is ignored, and the last of these may be left
            out.
        schedule: int `(s + 1, frames)`; see `fvdm.diffusion.tasks`.
        seeds: one per sample; a sample is the same in every batch.
        sampler: solver, guidance and so on.
        y: condition `(b ...)`, such as class labels.
        window: frames that the model takes; 0 is f.
        negative: condition that guidance pushes away from; None is the one that says nothing.

    Returns:
        latents `(b frames c h w)`; frames whose column stands at 0 are bit-identical to those of `clip`.

    Raises:
        ValueError: if a setting is out of range.
    """
    generator = generators(seeds)
    more = clip.new_zeros(clip.shape[0], max(0, schedule.shape[1] - clip.shape[1]), *clip.shape[2:])
    x = start(torch.cat([clip, more], dim=1), schedule, diffusion, generator)
    rest = iter(x.split(1, dim=1))
    blocks = windows(schedule, window or clip.shape[1])

    def next_frames(n: int) -> Tensor:
        return torch.cat([next(rest) for _ in range(n)], dim=1)

    frames = list(stream(model, next_frames, blocks, diffusion, sampler, y=y, negative=negative, generator=generator))
    return torch.cat([*frames, *rest], dim=1)  # The rest lies right of all that moves.


def stream_video(
    model: Denoiser,
    diffusion: Diffusion,
    given: Tensor,
    blocks: Iterable[Block],
    seeds: Sequence[int],
    sampler: SamplerConfig | None = None,
    y: Tensor | None = None,
    negative: Tensor | None = None,
) -> Iterator[Tensor]:
    """Frames of a video without an end, one by one, in the memory of one window.

    Args:
        model: the denoiser.
        diffusion: its noise process.
        given: latents `(b g c h w)` that the video begins with, g >= 0; those that the first block holds are taken.
        blocks: of a task without an end, see `fvdm.diffusion.tasks.Task.endless`; every frame that is not given begins
            where the last one of the first block does.
        seeds: one per sample.
        sampler: solver, guidance and so on.
        y: condition `(b ...)`, such as class labels.
        negative: condition that guidance pushes away from; None is the one that says nothing.

    Yields:
        latents `(b 1 c h w)`; stop asking when there are enough.

    Raises:
        ValueError: if a setting is out of range.
    """
    generator = generators(seeds)
    blocks = iter(blocks)
    head = next(blocks)
    top = head[1][:1, -1:]
    held = int((head[1][0] == 0).sum())
    if given.shape[1] < held:
        raise ValueError(f"{held} given frames are needed, {given.shape[1]} came")
    before = [given[:, k : k + 1] for k in range(held)]
    shape = (given.shape[0], 1, *given.shape[2:])

    def next_one() -> Tensor:
        empty = torch.zeros(shape, device=given.device, dtype=given.dtype)
        return before.pop(0) if before else start(empty, top, diffusion, generator)

    def next_frames(n: int) -> Tensor:
        return torch.cat([next_one() for _ in range(n)], dim=1)

    chained = chain([head], blocks)
    for frames in stream(model, next_frames, chained, diffusion, sampler, y=y, negative=negative, generator=generator):
        yield from frames.split(1, dim=1)


def place(given: Tensor, indices: Sequence[int], frames: int) -> Tensor:
    """Put given latents `(b g c h w)` at their indices in a clip `(b frames c h w)` of zeros.

    Raises:
        ValueError: if their number is not that of the indices.
    """
    if given.shape[1] != len(indices):
        raise ValueError(f"{len(indices)} given frames are needed, {given.shape[1]} came")
    clip = torch.zeros((given.shape[0], frames, *given.shape[2:]), dtype=given.dtype, device=given.device)
    clip[:, list(indices)] = given
    return clip
