"""A trained model and what it can do, in five lines of Python:

    from fvdm import load

    model = load("runs/demo")
    video = model.generate(task="image-to-video", given=image, seed=7)  # uint8 (3 h w) -> (1 f 3 h w)

Tensors in, tensors out; no state but the model.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fvdm.diffusion.guidance import Guidance
from fvdm.diffusion.process import Diffusion
from fvdm.diffusion.sampling import OnStep, Progress, SamplerConfig, generators
from fvdm.diffusion.solvers import solver
from fvdm.diffusion.tasks import TaskPlan, TaskSpec, find
from fvdm.diffusion.timesteps import spaced
from fvdm.diffusion.video import place, sample_video, stream_video
from fvdm.generation.config import GenerationConfig, generation_config, indices, read_schedule
from fvdm.generation.inputs import as_frames, available, choose
from fvdm.media.vae import VAE, load_vae
from fvdm.models.backbone import Backbone
from fvdm.models.compilation import compile_blocks
from fvdm.models.inference import read_inference_config
from fvdm.models.loading import read_backbone, resolve


@dataclass(frozen=True)
class Trained:
    """A trained model with all that is needed to use it.

    Attributes:
        model: on its device, in eval mode.
        diffusion: its noise process.
        vae: turns its latents into images.
        classes: names of its classes; empty without.
        size: side of a frame in pixels.
        stride: the clips it was trained on take every stride-th frame.
        step: optimizer steps it was trained for; 0 where that is not known.
        folder: where it came from.
    """

    model: Backbone
    diffusion: Diffusion
    vae: VAE
    classes: tuple[str, ...]
    size: int
    stride: int
    step: int
    folder: Path

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return self.model.device

    def generate(
        self,
        task: str = "generate",
        *,
        given: Tensor | Sequence[Tensor] | None = None,
        progress: Progress = iter,
        **settings: Any,
    ) -> Tensor:
        """Make videos.

        Args:
            task: a name of docs/tasks.md.
            given: images or clips, uint8 `(3 h w)` or `(n 3 h w)`; several in a list.
            progress: wraps the sequence of steps, such as `tqdm`.
            **settings: of `GenerationConfig`, such as `seed=3, steps=25, solver="dpm++", class_="dog"`.

        Returns:
            uint8 `(num f 3 h w)` on the CPU.

        Raises:
            ValueError: if the settings or the given frames do not fit the task or the model.
        """
        config = generation_config(task, settings)
        clips = fitted(self, given)
        plan = make_plan(self, config, clips)
        latents = encode_given(self, plan, clips)
        seeds = range(config.seed, config.seed + config.num)
        batches = [seeds[k : k + config.batch_size] for k in range(0, config.num, config.batch_size)]
        length = length_of(self, config)
        made = (make_frames(self, config, plan, latents, batch, progress) for batch in batches)
        return torch.cat([torch.stack(list(islice(frames, length)), dim=1) for frames in made])

    def stream(self, *, given: Tensor | Sequence[Tensor] | None = None, **settings: Any) -> Iterator[Tensor]:
        """Frames of a video without an end, one by one, in constant memory.

        Args:
            given: what the video begins with; see `generate`.
            **settings: of `GenerationConfig`.

        Yields:
            uint8 `(num 3 h w)` on the CPU; stop asking when there are enough.

        Raises:
            ValueError: if the settings do not fit the model.
        """
        config = generation_config("stream", settings)
        clips = fitted(self, given)
        plan = make_plan(self, config, clips)
        latents = encode_given(self, plan, clips)
        return make_frames(self, config, plan, latents, range(config.seed, config.seed + config.num))


def load(
    checkpoint: str | Path,
    weights: str = "ema",
    vae: str = "",
    device: str = "",
    precision: str = "",
    compile: bool = False,
) -> Trained:
    """Load a model for use.

    Args:
        checkpoint: a run's folder, or a checkpoint; a folder of `save_pretrained` or of `fvdm convert`; a
            checkpoint file of Latte or of the official FVDM code; or `example`, the small model that ships with this.
        weights: `ema` or `model`, of a run.
        vae: VAE by name or path; empty takes the one the model was trained with.
        device: empty takes a GPU if there is one.
        precision: `bf16`, `fp32`; empty takes bf16 on a GPU.
        compile: make the blocks faster with `torch.compile`; the first clip then takes a minute longer.

    Raises:
        ValueError: if there is no complete checkpoint, its VAE cannot be found, or this machine cannot compile.
    """
    place = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    dtype = torch.bfloat16 if (precision or ("bf16" if place.type == "cuda" else "fp32")) == "bf16" else torch.float32
    path = resolve(checkpoint)
    model = read_backbone(path, weights)
    inference = read_inference_config(path, model.config)
    decoder = load_vae(vae or inference.vae, place)
    channels, height, width = model.config.latent_shape
    if decoder.channels != channels:
        raise ValueError(f"the model has {channels} latent channels, its VAE {decoder.channels}")
    if height != width:
        raise ValueError(f"the model makes latent frames of {height} x {width}; fvdm generate makes square videos only")
    model = model.to(place, dtype).eval().requires_grad_(False)
    return Trained(
        compile_blocks(model) if compile else model,
        Diffusion(inference.diffusion),
        decoder,
        inference.classes,
        height * decoder.factor,
        inference.stride,
        inference.step,
        path,
    )


def fitted(trained: Trained, given: Tensor | Sequence[Tensor] | None) -> list[Tensor]:
    """Given images as clips of the model's size, uint8 `(n 3 size size)` each."""
    clips = [] if given is None else [given] if isinstance(given, Tensor) else list(given)
    return [as_frames(clip, trained.size) for clip in clips]


def length_of(trained: Trained, config: GenerationConfig) -> int:
    """Frames of a sample."""
    if config.schedule:
        return read_schedule(config.schedule).shape[1]
    return config.length or find(config.task).length or trained.model.config.frames


def task_spec(trained: Trained, config: GenerationConfig, clips: Sequence[Tensor]) -> TaskSpec:
    """The settings of the task."""
    noise = trained.diffusion.noise_levels()
    schedule = read_schedule(config.schedule) if config.schedule else None
    spec = TaskSpec(
        levels=spaced(config.spacing or solver(config.solver).spacing, config.steps, noise),
        window=trained.model.config.frames,
        length=length_of(trained, config),
        given=available(clips, trained.stride),
        frames=indices(config.frames),
        context=config.context,
        delay=config.delay,
        strength=config.strength,
        slope=config.slope,
        schedule=schedule,
    )
    count = sum(map(len, clips))
    # Exactly as many frames as are needed are taken as they are, without a stride.
    return replace(spec, given=count) if count == find(config.task).context(spec) else spec


def make_plan(trained: Trained, config: GenerationConfig, clips: Sequence[Tensor], complete: bool = False) -> TaskPlan:
    """The task's schedule and given frames.

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


def encode_given(trained: Trained, plan: TaskPlan, clips: Sequence[Tensor]) -> Tensor:
    """Latents `(1 f c h w)` of a plan's clip: those of the given frames at their places, zeros elsewhere.

    Raises:
        ValueError: if there are too few frames.
    """
    empty = torch.zeros(1, 0, *trained.model.config.latent_shape)
    frames = choose(clips, plan, trained.stride)[0] if plan.given else None
    latents = empty if frames is None else trained.vae.encode_mean(frames)[None]
    return place(latents.to(trained.device), plan.given, plan.schedule.shape[1])


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


def make_frames(
    trained: Trained,
    config: GenerationConfig,
    plan: TaskPlan,
    clip: Tensor,
    seeds: Sequence[int],
    progress: Progress = iter,
    on_step: OnStep | None = None,
) -> Iterator[Tensor]:
    """Samples of these seeds, frame by frame, uint8 `(b 3 h w)` on the CPU.

    Those of a task without an end are sampled one at a time, in constant memory; stop when there are enough.

    Raises:
        ValueError: if a setting does not fit the model.
    """
    y, sampler = sampler_inputs(trained, config, seeds, progress)
    sampler = replace(sampler, on_step=on_step)
    batch = clip.expand(len(seeds), *clip.shape[1:])
    endless = find(config.task).endless
    if endless is None:
        window = trained.model.config.frames
        latents = sample_video(trained.model, trained.diffusion, batch, plan.schedule, seeds, sampler, y, window)
        return iter(trained.vae.decode(latents).cpu().unbind(1))
    given = batch[:, : len(plan.given)]
    blocks = endless(replace(task_spec(trained, config, []), given=given.shape[1]))
    drawn = stream_video(trained.model, trained.diffusion, given, blocks, seeds, sampler, y)
    return (trained.vae.decode(latents[:, 0]).cpu() for latents in drawn)


def sampler_inputs(
    trained: Trained, config: GenerationConfig, seeds: Sequence[int], progress: Progress
) -> tuple[Tensor | None, SamplerConfig]:
    """Classes and settings of the sampler."""
    y = class_numbers(config.class_, trained.classes, seeds)
    if config.guidance != 1.0 and y is None:
        raise ValueError(f"guidance {config.guidance:g} needs classes, and this model has no classes")
    guidance = Guidance(
        config.guidance,
        config.history_guidance,
        config.guidance_interval,
        config.guidance_rescale,
    )
    sampler = SamplerConfig(solver(config.solver, config.eta), guidance, config.given_noise, progress)
    return None if y is None else y.to(trained.device), sampler
