"""A trained model and what it can do, in five lines of Python:

    from fvdm import load, generate

    model = load("runs/demo")
    video = generate(model, task="image-to-video", given=picture, seed=7)  # uint8 (3 h w) -> (1 f 3 h w)

Tensors in, tensors out; no state but the model.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fvdm import checkpoint as ckpt
from fvdm.compilation import compile_blocks
from fvdm.convert import read_model, read_use
from fvdm.diffusion import Diffusion, DiffusionConfig
from fvdm.guidance import Guidance
from fvdm.inputs import as_frames, available, choose
from fvdm.matrices import Plan, Wish, find
from fvdm.model import ModelConfig, VideoDiT
from fvdm.recipe import Recipe, indices, recipe_of
from fvdm.samplers import How, Progress, generators
from fvdm.solvers import solver
from fvdm.tasks import draw, draw_stream, place
from fvdm.timesteps import spaced
from fvdm.vae import VAE, load_vae

EXAMPLE = Path(__file__).parent / "weights" / "example"  # the model of `make demo`; docs/examples/README.md


@dataclass(frozen=True)
class Trained:
    """A trained model with all that is needed to use it.

    Attributes:
        model: on its device, in eval mode.
        diffusion: its noise process.
        vae: turns its latents into pictures.
        classes: names of its classes; empty without.
        size: side of a frame in pixels.
        interval: the clips it was trained on take every interval-th frame.
        step: optimizer steps it was trained for; 0 where that is not known.
        folder: where it came from.
    """

    model: VideoDiT
    diffusion: Diffusion
    vae: VAE
    classes: tuple[str, ...]
    size: int
    interval: int
    step: int
    folder: Path

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return self.model.space.device


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
        checkpoint: a run's folder, or a checkpoint; a folder of `save_pretrained` or of `python -m fvdm.convert`; a
            checkpoint file of Latte or of the official FVDM code; or `example`, the small model that ships with this.
        weights: `ema` or `model`, of a run.
        vae: VAE by name or path; empty takes the one the model was trained with.
        device: empty takes a GPU if there is one.
        precision: `bf16`, `fp32`; empty takes bf16 on a GPU.
        compile: make the blocks faster with `torch.compile`; the first clip then takes a minute longer.

    Raises:
        ValueError: if there is no whole checkpoint, its VAE cannot be found, or this machine cannot compile.
    """
    place = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    dtype = torch.bfloat16 if (precision or ("bf16" if place.type == "cuda" else "fp32")) == "bf16" else torch.float32
    path = Path(checkpoint)
    if str(checkpoint) == "example" and not path.exists():
        path = EXAMPLE
    if path.is_file() or (path / "config.json").is_file():
        model = read_model(path)
        use = read_use(path, model)
        decoder = load_vae(vae or use.vae, place)
        if decoder.channels != model.config.channels:
            raise ValueError(f"the model has {model.config.channels} latent channels, its VAE {decoder.channels}")
        about: dict[str, Any] = {"classes": use.classes, "interval": use.interval, "step": 0, "folder": path}
        about |= {"size": model.config.size * decoder.factor, "diffusion": Diffusion(use.diffusion)}
    else:
        folder = ckpt.resolve(path)
        state = ckpt.read_state(folder)
        model = VideoDiT(ModelConfig(**state["network"]))
        model.load_state_dict(ckpt.read_weights(folder, weights))
        decoder = load_vae(vae or state["vae"], place)
        about = {"classes": tuple(state["classes"]) if state["network"]["num_classes"] else ()}
        about |= {"interval": state["settings"]["data"]["interval"], "step": state["step"], "folder": folder}
        about |= {"size": state["size"], "diffusion": Diffusion(DiffusionConfig(**state["settings"]["diffusion"]))}
    model = model.to(place, dtype).eval().requires_grad_(False)
    return Trained(compile_blocks(model) if compile else model, vae=decoder, **about)


def generate(
    trained: Trained,
    task: str = "generate",
    *,
    given: Tensor | Sequence[Tensor] | None = None,
    progress: Progress = iter,
    **settings: Any,
) -> Tensor:
    """Make videos.

    Args:
        trained: from `load`.
        task: a name of docs/tasks.md.
        given: pictures or clips, uint8 `(3 h w)` or `(n 3 h w)`; several in a list.
        progress: wraps the sequence of steps, such as `tqdm`.
        **settings: of `Recipe`, such as `seed=3, steps=25, solver="dpm++", class_="dog"`.

    Returns:
        uint8 `(num f 3 h w)` on the CPU.

    Raises:
        ValueError: if the settings or the given frames do not fit the task or the model.
    """
    recipe = recipe_of(task, settings)
    clips = fitted(trained, given)
    plan = make_plan(trained, recipe, clips)
    latents = encode_given(trained, plan, clips)
    seeds = range(recipe.seed, recipe.seed + recipe.num)
    batches = [seeds[k : k + recipe.batch_size] for k in range(0, recipe.num, recipe.batch_size)]
    return torch.cat([make_batch(trained, recipe, plan, latents, batch, progress) for batch in batches])


def stream(trained: Trained, *, given: Tensor | Sequence[Tensor] | None = None, **settings: Any) -> Iterator[Tensor]:
    """Frames of a video without an end, one by one, in constant memory.

    Args:
        trained: from `load`.
        given: what the video begins with; see `generate`.
        **settings: of `Recipe`.

    Yields:
        uint8 `(num 3 h w)` on the CPU; stop asking when there are enough.

    Raises:
        ValueError: if the settings do not fit the model.
    """
    recipe = recipe_of("stream", settings)
    clips = fitted(trained, given)
    plan = make_plan(trained, recipe, clips)
    latents = encode_given(trained, plan, clips)
    seeds = range(recipe.seed, recipe.seed + recipe.num)
    return _stream(trained, recipe, plan, latents, seeds, iter)


def fitted(trained: Trained, given: Tensor | Sequence[Tensor] | None) -> list[Tensor]:
    """Given pictures as clips of the model's size, uint8 `(n 3 size size)` each."""
    clips = [] if given is None else [given] if isinstance(given, Tensor) else list(given)
    return [as_frames(clip, trained.size) for clip in clips]


def wish(trained: Trained, recipe: Recipe, clips: Sequence[Tensor]) -> Wish:
    """What a task is told."""
    window = trained.model.config.frames
    noise = trained.diffusion.noise_levels()
    exactly = sum(map(len, clips)) == recipe.context
    return Wish(
        levels=spaced(recipe.spacing or solver(recipe.solver).spacing, recipe.steps, noise),
        window=window,
        length=recipe.length or find(recipe.task).length or window,
        given=recipe.context if exactly else available(clips, trained.interval),
        frames=indices(recipe.frames),
        context=recipe.context,
        delay=recipe.delay,
        strength=recipe.strength,
        slope=recipe.slope,
    )


def make_plan(trained: Trained, recipe: Recipe, clips: Sequence[Tensor]) -> Plan:
    """The task's matrix and given frames.

    Raises:
        ValueError: if the task wants given frames and none came, or came and are not wanted.
    """
    task = find(recipe.task)
    plan = task.plan(wish(trained, recipe, clips))
    if task.needs_given and not clips:
        raise ValueError(f"{recipe.task} starts from {len(plan.given)} given frame(s); name them with --given")
    if clips and not plan.given:
        raise ValueError(f"{recipe.task} takes no given frames")
    return plan


def encode_given(trained: Trained, plan: Plan, clips: Sequence[Tensor]) -> Tensor:
    """Latents `(1 f c h w)` of a plan's clip: those of the given frames at their places, zeros elsewhere.

    Raises:
        ValueError: if there are too few frames.
    """
    c = trained.model.config
    empty = torch.zeros(1, 0, c.channels, c.size, c.size)
    frames = choose(clips, plan, trained.interval)[0] if plan.given else None
    latents = empty if frames is None else trained.vae.encode_mean(frames)[None]
    return place(latents.to(trained.device), plan.given, plan.matrix.shape[1])


def class_numbers(name: str, classes: Sequence[str], seeds: Sequence[int]) -> Tensor | None:
    """The class of each sample, int64 `(b)`: the one named, or one drawn from the sample's seed; None without classes.

    Raises:
        ValueError: if the model has no such class.
    """
    if not classes:
        if name:
            raise ValueError(f"class {name!r}: this model has no classes")
        return None
    if not name:
        draws = [torch.randint(len(classes), (), generator=generator) for generator in generators(seeds)]
        return torch.stack(draws)
    if name in classes:
        return torch.full((len(seeds),), list(classes).index(name))
    if name.isdigit() and int(name) < len(classes):
        return torch.full((len(seeds),), int(name))
    raise ValueError(f"class {name!r} is none of this model's; choose one of {', '.join(classes)}")


def make_batch(
    trained: Trained, recipe: Recipe, plan: Plan, clip: Tensor, seeds: Sequence[int], progress: Progress = iter
) -> Tensor:
    """Samples of these seeds, uint8 `(b f 3 h w)` on the CPU.

    Raises:
        ValueError: if a setting does not fit the model.
    """
    if find(recipe.task).endless is not None:
        frames = _stream(trained, recipe, plan, clip, seeds, progress)
        return torch.stack(list(islice(frames, clip.shape[1])), dim=1)
    batch = clip.expand(len(seeds), *clip.shape[1:])
    y, how = _condition(trained, recipe, seeds, progress)
    window = trained.model.config.frames
    latents = draw(trained.model, trained.diffusion, batch, plan.matrix, seeds, how, y, window)
    return trained.vae.decode(latents).cpu()


def _stream(
    trained: Trained,
    recipe: Recipe,
    plan: Plan,
    clip: Tensor,
    seeds: Sequence[int],
    progress: Progress,
) -> Iterator[Tensor]:
    y, how = _condition(trained, recipe, seeds, progress)
    batch = clip[:, : len(plan.given)].expand(len(seeds), -1, *clip.shape[2:])
    want = replace(wish(trained, recipe, []), given=len(plan.given))
    for latents in draw_stream(trained.model, trained.diffusion, batch, want, seeds, how, y):
        yield trained.vae.decode(latents[:, 0]).cpu()


def _condition(trained: Trained, recipe: Recipe, seeds: Sequence[int], progress: Progress) -> tuple[Tensor | None, How]:
    """Classes and settings of the sampler."""
    y = class_numbers(recipe.class_, trained.classes, seeds)
    if recipe.guidance != 1.0 and y is None:
        raise ValueError(f"guidance {recipe.guidance:g} is towards a class, and this model has no classes")
    guidance = Guidance(
        recipe.guidance,
        recipe.history_guidance,
        recipe.guidance_interval,
        recipe.guidance_rescale,
        trained.model.config.num_classes,
    )
    how = How(solver(recipe.solver, recipe.eta), guidance, recipe.given_noise, progress)
    return None if y is None else y.to(trained.device), how
