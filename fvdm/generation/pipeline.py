"""A trained model and what it can do, in five lines of Python:

    from fvdm import load

    model = load("runs/demo")
    video = model.generate(task="image-to-video", given=image, seed=7)  # uint8 (3 h w) -> (1 f 3 h w)

Tensors in, tensors out; no state but the model.
"""

from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fvdm.diffusion.process import Diffusion
from fvdm.diffusion.sampling import Progress
from fvdm.generation.components import Components
from fvdm.generation.config import generation_config
from fvdm.generation.frames import make_frames
from fvdm.generation.plan import encode_given, fitted, length_of, make_plan
from fvdm.generation.prompts import PromptEncoder
from fvdm.media.vae import load_vae
from fvdm.models.compilation import compile_blocks
from fvdm.models.inference import read_inference_config
from fvdm.models.loading import find_model, read_backbone


class Trained(Components):
    """A trained model, and what it can do."""

    def generate(
        self,
        task: str = "generate",
        *,
        given: Tensor | Sequence[Tensor] | None = None,
        progress: Progress = iter,
        prompts: Sequence[str] = (),
        **settings: Any,
    ) -> Tensor:
        """Make videos.

        Args:
            task: a name of docs/tasks.md.
            given: images or clips, uint8 `(3 h w)` or `(n 3 h w)`; several in a list.
            progress: wraps the sequence of steps, such as `tqdm`.
            prompts: one for each of the `num` samples, in place of `prompt`.
            **settings: of `GenerationConfig`, such as `seed=3, steps=25, solver="dpm++", class_="dog"`, or
                `prompt="a dog runs"`.

        Returns:
            uint8 `(num f 3 h w)` on the CPU.

        Raises:
            ValueError: if the settings or the given frames do not fit the task or the model.
        """
        config = generation_config(task, settings)
        clips = fitted(self, given)
        plan = make_plan(self, config, clips)
        latents = encode_given(self, config, plan, clips)
        if prompts and len(prompts) != config.num:
            raise ValueError(f"{len(prompts)} prompts for {config.num} samples: give one for each")
        seeds = range(config.seed, config.seed + config.num)
        batches = [slice(k, k + config.batch_size) for k in range(0, config.num, config.batch_size)]
        length = length_of(self, config)
        made = (
            make_frames(self, config, plan, latents, seeds[batch], progress, prompts=prompts[batch])
            for batch in batches
        )
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
        latents = encode_given(self, config, plan, clips)
        return make_frames(self, config, plan, latents, range(config.seed, config.seed + config.num))


def load(
    checkpoint: str | Path,
    weights: str = "ema",
    vae: str = "",
    device: str = "",
    precision: str = "",
    compile: bool = False,
    text_encoder: str = "",
    base: str = "",
) -> Trained:
    """Load a model for use.

    Args:
        checkpoint: a run's folder, or a checkpoint; a folder of `save_pretrained` or of `fvdm convert`; a
            checkpoint file of Latte or of the official FVDM code; `example`, the small model that ships with this; or
            `wan:` and a folder or hub name of diffusers.
        weights: `ema` or `model`, of a run.
        vae: VAE by name or path; empty takes the one the model was trained with.
        device: empty takes a GPU if there is one.
        precision: `bf16`, `fp32`; empty takes bf16 on a GPU.
        compile: make the blocks faster with `torch.compile`; the first clip then takes a minute longer.
        text_encoder: by name or path, as for `vae`; it is loaded when the first prompt is encoded.
        base: base model of a LoRA; empty is where it was in training.

    Raises:
        ValueError: if there is no complete checkpoint, its VAE cannot be found, this machine cannot compile, or a text
            encoder is named for a model that takes no text.
    """
    place = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    dtype = torch.bfloat16 if (precision or ("bf16" if place.type == "cuda" else "fp32")) == "bf16" else torch.float32
    path = find_model(checkpoint)
    model = read_backbone(path, weights, base=base)
    inference = read_inference_config(path, model.config)
    decoder = load_vae(vae or inference.vae, place)
    channels, height, _ = model.config.latent_shape
    if decoder.channels != channels:
        raise ValueError(f"the model has {channels} latent channels, its VAE {decoder.channels}")
    text = None
    if model.config.text_width:
        name, length = text_encoder or inference.text_encoder, inference.text_length or model.config.text_length
        text = PromptEncoder(name, length, model.config.text_width, place)
    elif text_encoder:
        raise ValueError(f"text encoder {text_encoder}: this model was trained without texts")
    model = model.to(place, dtype).eval().requires_grad_(False)
    return Trained(
        compile_blocks(model) if compile else model,
        Diffusion(inference.diffusion),
        decoder,
        inference.classes,
        height * decoder.factor,
        # The frames of a video VAE's clips follow each other.
        1 if decoder.is_video else inference.stride,
        inference.step,
        path,
        text,
        inference.shift,
    )
