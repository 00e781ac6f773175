"""What one must know of a network beside its weights to sample from it: `inference.json` in its folder."""

import json
from dataclasses import dataclass, field
from pathlib import Path

from fvdm import config as settings
from fvdm.diffusion.config import DiffusionConfig
from fvdm.files import write_text
from fvdm.models.latte import Latte

INFERENCE = "inference.json"
FORMER = "use.json"  # its name up to version 0.1


@dataclass(frozen=True)
class InferenceConfig:
    """What one must know of a folder's network to sample from it. The defaults are the paper's.

    Attributes:
        diffusion: its noise process.
        vae: VAE of its latents.
        classes: names of its classes.
        stride: the clips it was trained on take every stride-th frame.
    """

    diffusion: DiffusionConfig = field(default_factory=DiffusionConfig)
    vae: str = "stabilityai/sd-vae-ft-ema"
    classes: tuple[str, ...] = ()
    stride: int = 3


def read_inference_config(folder: Path, model: Latte) -> InferenceConfig:
    """What lies beside a network in its folder, its VAE in `vae/` before any other; else the paper's settings.

    Raises:
        ValueError: if it cannot be read.
    """
    learned, count = model.config.learned_variance, model.config.num_classes
    path = next((folder / name for name in (INFERENCE, FORMER) if (folder / name).exists()), None)
    if path is None:
        return InferenceConfig(DiffusionConfig(learned_variance=learned), classes=tuple(map(str, range(count))))
    try:
        values = settings.current_names(json.loads(path.read_text()))
        values |= {"diffusion": DiffusionConfig(**values["diffusion"]), "classes": tuple(values["classes"])}
        if (folder / "vae").is_dir():
            values["vae"] = str(folder / "vae")
        return InferenceConfig(**values)
    except (OSError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} cannot be read: {error}") from None


def write_inference_config(folder: Path, config: InferenceConfig) -> None:
    """Write what `read_inference_config` reads, beside a network in its folder."""
    write_text(folder / INFERENCE, json.dumps(settings.plain(config), indent=2) + "\n")
