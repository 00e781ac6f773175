"""Given frames of a video on the grid of latent frames, and which pixels each latent frame is encoded from.

In a causal video VAE latent frame 0 is one frame of the video, and each later one is a group of `stride` frames,
encoded after what comes before it (`FrameMap`). So a task that gives the last frame gives the last group, and an image
that is given there has to stand for a group. With an image VAE (stride 1) both grids are one.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from fvdm.diffusion.tasks import TaskPlan
from fvdm.generation.inputs import choose
from fvdm.media.frames import FrameMap
from fvdm.media.vae import VAE

Encoding = Literal["clip", "single"]


@dataclass(frozen=True)
class Run:
    """Given latent frames that follow each other, which are encoded together.

    Attributes:
        latents: their indices.
        frames: indices of the video's frames that they are encoded from.
        lead: whether a copy of the first of these frames is encoded before them, as the clip's first frame, and its
            latent frame left out.
    """

    latents: range
    frames: range
    lead: bool = False

    def __str__(self) -> str:
        """What is done to them, in a few words."""
        words = f"{_words('frame', self.frames)} of the video as {_words('latent frame', self.latents)}"
        return f"{words}, encoded after a copy of frame {self.frames[0]}" if self.lead else words


def _words(noun: str, numbers: range) -> str:
    return f"{noun} {numbers[0]}" if len(numbers) == 1 else f"{noun}s {numbers[0]} to {numbers[-1]}"


def latent_length(frame_map: FrameMap, frames: int) -> int:
    """The least number of latent frames that stand for `frames` or more frames."""
    return -(-(frames - 1) // frame_map.stride) + 1 if frames > 0 else 0


def latent_indices(frame_map: FrameMap, frames: Sequence[int], length: int) -> tuple[int, ...]:
    """The latent frames that hold these frames of a video.

    Args:
        frame_map: of the VAE.
        frames: indices; negative ones count from the end.
        length: frames of the video.

    Raises:
        ValueError: if the video has no such frame.
    """
    if frame_map.stride == 1:
        return tuple(frames)
    for frame in frames:
        if not -length <= frame < length:
            raise ValueError(f"there is no frame {frame}: the video has frames 0 to {length - 1}")
    return tuple(sorted({latent_length(frame_map, frame % length + 1) - 1 for frame in frames}))


def runs(frame_map: FrameMap, given: Sequence[int], encoding: Encoding) -> list[Run]:
    """How given latent frames are encoded.

    Those from frame 0 on are the beginning of a clip. Later ones, with the encoding `clip`, are the groups of frames
    that they are in every clip, encoded after a copy of the first of these frames; with `single`, the last frame of the
    first group is encoded alone, as a clip's first frame is (as Pusa does), and the groups after it follow.
    """
    found: list[Run] = []
    begin = 0
    for k in range(1, len(given) + 1):
        if k < len(given) and given[k] == given[k - 1] + 1:
            continue
        latents = range(given[begin], given[k - 1] + 1)
        first, end = frame_map.span(latents[0]), frame_map.span(latents[-1]).stop
        if encoding == "clip" and latents[0] and frame_map.stride > 1:
            found.append(Run(latents, range(first.start, end), lead=True))
        else:
            found.append(Run(latents, range(first.stop - 1, end)))
        begin = k
    return found


def choose_frames(
    clips: Sequence[Tensor], plan: TaskPlan, stride: int, frame_map: FrameMap, encoding: Encoding = "clip"
) -> tuple[Tensor, list[str]]:
    """The frames that the given latent frames of a task are encoded from, and a line for each thing that was done.

    If there are exactly as many given frames as given latent frames, each stands for all frames of its latent frame;
    see `fvdm.generation.inputs.choose` for all other cases.

    Args:
        clips: uint8 `(n 3 h w)` each.
        plan: the task, on latent frames.
        stride: of the clips that the model was trained on.
        frame_map: of the VAE.
        encoding: see `runs`.

    Returns:
        uint8 `(n 3 h w)`, the frames of all runs; and the lines.

    Raises:
        ValueError: if there are too few frames.
    """
    if frame_map.stride == 1:
        return choose(clips, plan, stride)
    found = runs(frame_map, plan.given, encoding)
    needed = [k for run in found for k in run.frames]
    of_latent = [latent_length(frame_map, k + 1) - 1 for k in range(frame_map.pixel_frames(plan.schedule.shape[1]))]
    grid = "on the latent grid: " + "; ".join(map(str, found))
    if sum(map(len, clips)) == len(plan.given) != len(needed):
        order = {latent: k for k, latent in enumerate(plan.given)}
        frames = torch.cat(list(clips))[[order[of_latent[k]] for k in needed]]
        return frames, [f"each of {len(plan.given)} given frames stands for all frames of its latent frame", grid]
    frames, lines = choose(clips, TaskPlan(plan.schedule[:, of_latent], tuple(needed)), stride)
    return frames, [*lines, grid]


def encode_frames(vae: VAE, frames: Tensor, given: Sequence[int], encoding: Encoding = "clip") -> Tensor:
    """Latents `(g c h w)` of the frames `(n 3 h w)` that `choose_frames` returned for g given latent frames."""
    if not vae.is_video:
        return vae.encode_mean(frames)
    found = runs(vae.frame_map, given, encoding)
    latents = []
    for run, part in zip(found, frames.split([len(run.frames) for run in found]), strict=True):
        encoded = vae.encode_mean(torch.cat([part[:1], part]) if run.lead else part)
        latents.append(encoded[1:] if run.lead else encoded)
    return torch.cat(latents)
