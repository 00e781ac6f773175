"""From settings and given frames to a plan: the schedule of the latent frames, and the latents of the given ones."""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from fvdm.diffusion.solvers import solver
from fvdm.diffusion.tasks import TaskPlan, TaskSpec, find, noise_given
from fvdm.diffusion.timesteps import spaced
from fvdm.diffusion.video import place
from fvdm.generation.components import Components
from fvdm.generation.config import GenerationConfig, given_noise, indices, read_schedule
from fvdm.generation.grid import choose_frames, encode_frames, latent_indices, latent_length
from fvdm.generation.inputs import as_frames, available


def fitted(trained: Components, given: Tensor | Sequence[Tensor] | None) -> list[Tensor]:
    """Given images as clips of the model's size, uint8 `(n 3 size size)` each."""
    clips = [] if given is None else [given] if isinstance(given, Tensor) else list(given)
    return [as_frames(clip, trained.frame_size) for clip in clips]


def length_of(trained: Components, config: GenerationConfig) -> int:
    """Frames of a sample."""
    if config.schedule:
        return trained.frame_map.pixel_frames(read_schedule(config.schedule).shape[1])
    return config.length or find(config.task).length or trained.frame_map.pixel_frames(trained.window)


def task_spec(trained: Components, config: GenerationConfig, clips: Sequence[Tensor]) -> TaskSpec:
    """The settings of the task, in latent frames."""
    frame_map, length = trained.frame_map, length_of(trained, config)
    noise = trained.diffusion.noise_levels()
    spacing = config.spacing or trained.model.config.spacing or solver(config.solver).spacing
    spec = TaskSpec(
        levels=spaced(spacing, config.steps, noise, config.shift or trained.shift),
        window=trained.window,
        length=latent_length(frame_map, length),
        given=frame_map.latent_frames(available(clips, trained.stride)),
        frames=latent_indices(frame_map, indices(config.frames), length),
        context=latent_length(frame_map, config.context),
        delay=config.delay,
        strength=config.strength,
        slope=config.slope,
        schedule=read_schedule(config.schedule) if config.schedule else None,
    )
    count, context = sum(map(len, clips)), find(config.task).context(spec)
    # Exactly as many frames as are needed are taken as they are, without a stride.
    return replace(spec, given=context) if count in (context, frame_map.pixel_frames(context)) else spec


def make_plan(
    trained: Components, config: GenerationConfig, clips: Sequence[Tensor], complete: bool = False
) -> TaskPlan:
    """The task's schedule and given frames, all of them latent frames.

    Args:
        trained: from `load`.
        config: the task and its settings.
        clips: the given frames.
        complete: the complete schedule of a task without an end, too; else that of its first window.

    Raises:
        ValueError: if the task needs given frames and there are none, or takes none and there are some.
    """
    task, spec = find(config.task), task_spec(trained, config, clips)
    if task.endless is not None and not complete:
        spec = replace(spec, length=min(spec.length, spec.window))
    plan = task.plan(spec)
    if task.needs_given and not clips:
        raise ValueError(f"{config.task} starts from {len(plan.given)} given frame(s); name them with --given")
    if clips and not plan.given:
        raise ValueError(f"{config.task} takes no given frames")
    return plan


def with_noise(trained: Components, config: GenerationConfig, plan: TaskPlan) -> tuple[TaskPlan, int | Tensor]:
    """The plan with the noise of `given_noise` on its given frames, and the timesteps they are shown at.

    Noise that is a multiple of the row's t is in the schedule; a fixed level is for `SamplerConfig.given_noise`.

    Raises:
        ValueError: if there are neither one value nor one for each given frame, or one is out of range.
    """
    values = given_noise(config.given_noise, trained.diffusion.num_timesteps)
    if len(values) == 1 and not values[0].multiple:
        return plan, values[0].level
    if not values or not plan.given:
        return plan, 0
    if find(config.task).endless is not None:
        raise ValueError(f"{config.task} holds its given frames: write --given-noise as one timestep or share of T")
    each = values * len(plan.given) if len(values) == 1 else values
    noisy = noise_given(plan, trained.window, [value.multiple for value in each])
    levels = torch.zeros(plan.schedule.shape[1], dtype=torch.long)
    levels[list(plan.given)] = torch.tensor([value.level for value in each])
    return noisy, levels if levels.any() else 0


def encode_given(trained: Components, config: GenerationConfig, plan: TaskPlan, clips: Sequence[Tensor]) -> Tensor:
    """Latents `(1 f c h w)` of a plan's clip: those of the given frames at their places, zeros elsewhere.

    Raises:
        ValueError: if there are too few frames.
    """
    latents = torch.zeros(1, 0, *trained.model.config.latent_shape)
    if plan.given:
        frames = choose_frames(clips, plan, trained.stride, trained.frame_map, config.given_encoding)[0]
        latents = encode_frames(trained.vae, frames, plan.given, config.given_encoding)[None]
    return place(latents.to(trained.device), plan.given, plan.schedule.shape[1])
