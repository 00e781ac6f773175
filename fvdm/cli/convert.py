"""`fvdm convert SRC DST`: a checkpoint of Latte or FVDM, to a folder that generate and load take."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

from fvdm import config as settings
from fvdm.diffusion.config import DiffusionConfig

if TYPE_CHECKING:
    from fvdm.models.backbone import Backbone


@dataclass(frozen=True)
class ConvertConfig:
    """Weights of Latte or of the official FVDM code, to a folder that generate and load take.

    Attributes:
        src: their checkpoint, .pt or .safetensors.
        dst: folder to write.
        heads: attention heads; 0 takes those of the sizes S, B, L and XL.
        vae: VAE of its latents.
        classes: names of its classes in their order; empty numbers them.
        stride: the clips it was trained on take every stride-th frame.
        diffusion: the noise process it was trained with; the variance is read off the weights.
    """

    src: str
    dst: str
    heads: int = 0
    vae: str = "stabilityai/sd-vae-ft-ema"
    classes: tuple[str, ...] = ()
    stride: int = 3
    diffusion: DiffusionConfig = field(default_factory=DiffusionConfig)


def convert(config: ConvertConfig) -> "Backbone":
    """Read, rename, write.

    Raises:
        ValueError: if the checkpoint is another model's, or the folder holds something already.
    """
    from fvdm.cli.progress import reading, writing
    from fvdm.models.inference import InferenceConfig, write_inference_config
    from fvdm.models.official import from_official, load_torch

    if Path(config.dst).exists() and (not Path(config.dst).is_dir() or any(Path(config.dst).iterdir())):
        raise ValueError(f"{config.dst} exists: name a new folder")
    with reading(Path(config.src)) as on_read:
        weights = load_torch(config.src, on_read)
    model = from_official(weights, config.heads or None, config.src)
    count = model.config.classes
    if config.classes and len(config.classes) != count:
        raise ValueError(f"{len(config.classes)} class names came, the checkpoint has {count} classes")
    with writing(Path(config.dst), sum(p.nbytes for p in model.parameters())):
        model.save_pretrained(config.dst)
    diffusion = replace(config.diffusion, learned_variance=model.config.learned_variance)
    inference = InferenceConfig(diffusion, config.vae, config.classes or tuple(map(str, range(count))), config.stride)
    write_inference_config(Path(config.dst), inference)
    return model


def main(argv: Sequence[str] | None = None) -> None:
    """Command line."""
    try:
        config = settings.parse(ConvertConfig, argv, __doc__, ("src", "dst"), "fvdm convert")
        model = convert(config)
    except ValueError as error:
        settings.fail(error)
    c, millions = model.config, model.num_parameters() / 1e6
    print(f"{config.dst}: {c.summary()}, {millions:.1f}M;")
    print(f"  {c.frames} frames of {' x '.join(map(str, c.latent_shape))}, {c.classes} classes")
    print(f"  fvdm generate --checkpoint {config.dst}")
