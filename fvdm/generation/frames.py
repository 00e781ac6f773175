"""From a plan to the frames of videos: conditions, the sampler, and decoding, piece by piece."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from fvdm.diffusion.guidance import Guidance
from fvdm.diffusion.sampling import Block, OnStep, Progress, SamplerConfig, generators, windows
from fvdm.diffusion.solvers import solver
from fvdm.diffusion.tasks import TaskPlan, find, noise_given
from fvdm.diffusion.video import sample_video, stream_video
from fvdm.generation.components import Components
from fvdm.generation.config import GenerationConfig, given_noise
from fvdm.generation.plan import task_spec, with_noise


def class_numbers(name: str, classes: Sequence[str], seeds: Sequence[int]) -> Tensor | None:
    """The class of each sample, int64 `(b)`: the one named, or one drawn by the sample's seed; None without classes.

    Raises:
        ValueError: if the model has no such class.
    """
    if not classes:
        if name:
            raise ValueError(f"class {name!r}: this model has no classes")
        return None
    if not name:
        numbers = [torch.randint(len(classes), (), generator=generator) for generator in generators(seeds)]
        return torch.stack(numbers)
    if name in classes:
        return torch.full((len(seeds),), list(classes).index(name))
    if name.isdigit() and int(name) < len(classes):
        return torch.full((len(seeds),), int(name))
    raise ValueError(f"this model has no class {name!r}; choose one of {', '.join(classes)}")


def conditions(
    trained: Components, config: GenerationConfig, seeds: Sequence[int], prompts: Sequence[str] = ()
) -> tuple[Tensor | None, Tensor | None]:
    """The condition `(b ...)` of each sample, and the one that guidance pushes away from.

    Args:
        trained: from `load`.
        config: class or prompt, and guidance.
        seeds: of the samples.
        prompts: of each sample, in place of `config.prompt`.

    Returns:
        Both on the model's device; None for a model that takes no condition, and where `model.null` is meant.

    Raises:
        ValueError: if the model takes another condition, or the text encoder cannot be loaded.
    """
    y = class_numbers(config.class_, trained.classes, seeds)
    if trained.text is None:
        if config.prompt or config.negative_prompt or any(prompts):
            raise ValueError("this model was trained without texts: leave the prompts out")
        if config.guidance != 1.0 and y is None:
            raise ValueError(f"guidance {config.guidance:g} needs classes, and this model has no classes")
        return None if y is None else y.to(trained.device), None
    guided = config.guidance != 1.0
    if config.negative_prompt and not guided:
        raise ValueError("a negative prompt acts through guidance: add --guidance 5")
    y = trained.text.encode(prompts or [config.prompt] * len(seeds)).to(trained.device)
    return y, trained.text.encode([config.negative_prompt] * len(seeds)).to(trained.device) if guided else None


def make_frames(
    trained: Components,
    config: GenerationConfig,
    plan: TaskPlan,
    clip: Tensor,
    seeds: Sequence[int],
    progress: Progress = iter,
    on_step: OnStep | None = None,
    prompts: Sequence[str] = (),
) -> Iterator[Tensor]:
    """Samples of these seeds, frame by frame, uint8 `(b 3 h w)` on the CPU.

    Those of a task without an end are sampled one at a time, in constant memory; stop when there are enough.

    Args:
        trained: from `load`.
        config: the settings.
        plan: from `make_plan`.
        clip: latents `(1 f c h w)` from `encode_given`.
        seeds: one per sample.
        progress: wraps the sequence of steps.
        on_step: see `SamplerConfig`.
        prompts: of each sample, in place of `config.prompt`.

    Raises:
        ValueError: if a setting does not fit the model.
    """
    y, negative = conditions(trained, config, seeds, prompts)
    guidance = Guidance(config.guidance, config.history_guidance, config.guidance_interval, config.guidance_rescale)
    plan, shown_at = with_noise(trained, config, plan)
    sampler = SamplerConfig(solver(config.solver, config.eta), guidance, shown_at, progress, on_step)
    batch = clip.expand(len(seeds), *clip.shape[1:])
    endless = find(config.task).endless
    if endless is None:
        return _known_length(trained, config, plan, batch, seeds, sampler, y, negative)
    given = batch[:, : len(plan.given)]
    blocks = endless(replace(task_spec(trained, config, []), given=given.shape[1]))
    drawn = stream_video(trained.model, trained.diffusion, given, blocks, seeds, sampler, y, negative)
    if trained.vae.is_video:
        return _decoded(trained, (latents[:, 0] for latents in drawn))
    return (trained.vae.decode(latents[:, 0]).cpu() for latents in drawn)


def _decoded(trained: Components, latents: Iterable[Tensor]) -> Iterator[Tensor]:
    """Frames, uint8 `(b 3 h w)` on the CPU, of latent frames `(b c h w)`, as early as a video VAE has them."""
    for part in trained.vae.decode_stream(latents):
        yield from part.cpu().unbind(1)


def _known_length(
    trained: Components,
    config: GenerationConfig,
    plan: TaskPlan,
    batch: Tensor,
    seeds: Sequence[int],
    sampler: SamplerConfig,
    y: Tensor | None,
    negative: Tensor | None,
) -> Iterator[Tensor]:
    def sample(clip: Tensor, schedule: Tensor, seeds: Sequence[int], sampler: SamplerConfig) -> Tensor:
        model, diffusion = trained.model, trained.diffusion
        return sample_video(model, diffusion, clip, schedule, seeds, sampler, y, trained.window, negative)

    if not trained.vae.is_video:
        return iter(trained.vae.decode(sample(batch, plan.schedule, seeds, sampler)).cpu().unbind(1))
    pieces = split(plan.schedule, trained.window)
    if config.overlap == "keep" or len(pieces) == 1:
        return _decoded(trained, sample(batch, plan.schedule, seeds, sampler).unbind(1))

    def frames() -> Iterator[Tensor]:
        shown = sampler.given_noise
        values = given_noise(config.given_noise, trained.diffusion.num_timesteps)
        multiple = values[0].multiple if len(values) == 1 else 0.0
        before = torch.empty(0)
        for number, piece in enumerate(pieces):
            own = replace(sampler, given_noise=shown if isinstance(shown, int) else shown[piece.first : piece.end])
            clip, schedule, skipped = batch[:, piece.first : piece.end], piece.schedule, 0
            if piece.shared:
                skipped = trained.frame_map.pixel_frames(piece.shared)
                again = trained.vae.encode_mean(before[:, -skipped:]).to(clip)
                clip = torch.cat([again, clip[:, piece.shared :]], dim=1)
                shared = TaskPlan(schedule, tuple(range(piece.shared)))
                schedule = noise_given(shared, trained.window, [multiple] * piece.shared).schedule
            latents = sample(clip, schedule, [_seed(seed, number) for seed in seeds], own)
            before = torch.stack(list(_decoded(trained, latents.unbind(1))), dim=1)
            yield from before[:, skipped:].unbind(1)

    return frames()


@dataclass(frozen=True)
class Piece:
    """Part of a video that is decoded as a clip of its own.

    Attributes:
        first: its first latent frame.
        schedule: `(s + 1, f)` of its frames.
        shared: latent frames that it shares with the piece before, all of them clean.
    """

    first: int
    schedule: Tensor
    shared: int

    @property
    def end(self) -> int:
        """The latent frame after its last one."""
        return self.first + self.schedule.shape[1]


def split(schedule: Tensor, window: int) -> list[Piece]:
    """Cut the schedule of a video where a window slides and all the frames that it keeps are clean.

    Such a window can be a clip of its own, whose first frames are the last ones of the piece before. Nothing is cut
    where a frame in view is still being denoised.

    Args:
        schedule: int `(s + 1, frames)`.
        window: latent frames that the model takes.
    """
    blocks = windows(schedule, window)
    groups: list[list[Block]] = []
    for block in blocks:
        shared = max(0, groups[-1][-1][0] + window - block[0]) if groups else 0
        if not groups or block[0] == groups[-1][-1][0] or not shared or block[1][0, :shared].any():
            groups[-1:] = [[*groups[-1], block]] if groups else [[block]]
        else:
            groups.append([block])
    rows = [sum(len(part) - 1 for _, part in group) for group in groups]
    start = len(schedule) - 1 - sum(rows)
    pieces: list[Piece] = []
    for group, count in zip(groups, rows, strict=True):
        first, end = group[0][0], min(group[-1][0] + window, schedule.shape[1])
        shared = pieces[-1].end - first if pieces else 0
        pieces.append(Piece(first, schedule[start : start + count + 1, first:end], shared))
        start += count
    return pieces


def _seed(seed: int, piece: int) -> int:
    """The seed of a sample's noise in a piece; the first piece has the sample's own."""
    if not piece:
        return seed
    state = np.random.SeedSequence([seed % 2**63, piece]).generate_state(1, np.uint64)[0]
    return int(state >> np.uint64(1))
