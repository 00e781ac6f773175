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
        text_encoder: text encoder of its texts; empty without, or where that is not known.
        text_length: tokens to which its texts are padded; 0 where that is not known.
        shift: of the spacing `shift`.
    """

    diffusion: DiffusionConfig = field(default_factory=DiffusionConfig)
    vae: str = "stabilityai/sd-vae-ft-ema"
    classes: tuple[str, ...] = ()
    stride: int = 3
    step: int = 0
    text_encoder: str = ""
    text_length: int = 0
    shift: float = 3.0


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
    if found is None and model.source:
        return _of_pipeline(path, model)
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


def _of_pipeline(folder: Path, model: BackboneConfig) -> InferenceConfig:
    """The settings of a pretrained transformer, whose VAE and text encoder lie beside it in a pipeline of diffusers."""
    pipeline = folder.parent
    return InferenceConfig(
        DiffusionConfig(objective="flow", learned_variance=False),
        vae=str(pipeline / "vae") if (pipeline / "vae").is_dir() else f"{model.source}/vae",
        stride=1,
        text_encoder=str(pipeline) if (pipeline / "text_encoder").is_dir() else f"{model.source}/text_encoder",
        text_length=model.text_length,
    )


def _of_checkpoint(folder: Path, model: BackboneConfig) -> InferenceConfig:
    state = read_state(folder)
    trained, text = state["settings"], state.get("text") or {}
    return InferenceConfig(
        DiffusionConfig(**trained["diffusion"]),
        state["vae"],
        tuple(state["classes"]) if model.classes else (),
        trained["data"]["stride"],
        state["step"],
        text.get("name", ""),
        text.get("max_tokens", 0),
        trained.get("timesteps", {}).get("shift", 3.0),
    )


def write_inference_config(folder: Path, config: InferenceConfig) -> None:
    """Write what `read_inference_config` reads, beside a network in its folder."""
    write_text(folder / INFERENCE, json.dumps(settings.plain(config), indent=2) + "\n")
