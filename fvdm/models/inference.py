"""What sampling from a network needs beside its weights: `inference.json` in its folder."""

import json
from dataclasses import dataclass, field
from pathlib import Path

from fvdm import config as settings
from fvdm.checkpoints.read import read_state
from fvdm.diffusion.config import DiffusionConfig
from fvdm.files import write_text
from fvdm.models.config import BackboneConfig

INFERENCE = "inference.json"
FORMER = "use.json"  # its name up to version 0.1


@dataclass(frozen=True)
class InferenceConfig:
    """What sampling from a network needs beside its weights. The defaults are the paper's.

    Attributes:
        diffusion: its noise process.
        vae: VAE of its latents.
        classes: names of its classes.
        stride: the clips it was trained on take every stride-th frame.
        step: optimizer steps it was trained for; 0 where that is not known.
    """

    diffusion: DiffusionConfig = field(default_factory=DiffusionConfig)
    vae: str = "stabilityai/sd-vae-ft-ema"
    classes: tuple[str, ...] = ()
    stride: int = 3
    step: int = 0


def read_inference_config(path: Path, model: BackboneConfig) -> InferenceConfig:
    """The inference settings in a network's folder, with the VAE in `vae/` if there is one; else the paper's settings.

    Args:
        path: a model's folder, a checkpoint of a run, or a file of weights, as `fvdm.models.loading.resolve` finds it.
        model: the network's settings.

    Raises:
        ValueError: if it cannot be read.
    """
    if (path / "state.json").is_file():
        return _of_checkpoint(path, model)
    found = next((path / name for name in (INFERENCE, FORMER) if (path / name).exists()), None)
    if found is None:
        return InferenceConfig(
            DiffusionConfig(learned_variance=model.learned_variance), classes=tuple(map(str, range(model.classes)))
        )
    try:
        values = settings.current_names(json.loads(found.read_text()))
        values |= {"diffusion": DiffusionConfig(**values["diffusion"]), "classes": tuple(values["classes"])}
        if (path / "vae").is_dir():
            values["vae"] = str(path / "vae")
        return InferenceConfig(**values)
    except (OSError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{found} cannot be read: {error}") from None


def _of_checkpoint(folder: Path, model: BackboneConfig) -> InferenceConfig:
    state = read_state(folder)
    trained = state["settings"]
    return InferenceConfig(
        DiffusionConfig(**trained["diffusion"]),
        state["vae"],
        tuple(state["classes"]) if model.classes else (),
        trained["data"]["stride"],
        state["step"],
    )


def write_inference_config(folder: Path, config: InferenceConfig) -> None:
    """Write what `read_inference_config` reads, beside a network in its folder."""
    write_text(folder / INFERENCE, json.dumps(settings.plain(config), indent=2) + "\n")
