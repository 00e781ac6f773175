"""A checkpoint of a training run as a model folder for use: what `fvdm.load` takes, without what only training needs.

config.json                              the network, as diffusers lays it out
diffusion_pytorch_model.safetensors      its weights
inference.json                           noise process, classes, stride, VAE
vae/                                     the VAE, where it is a folder
"""

import shutil
from dataclasses import replace
from pathlib import Path

import torch

from fvdm.files import fsync_folder
from fvdm.models.inference import read_inference_config, write_inference_config
from fvdm.models.loading import read_backbone


def export_model(
    checkpoint: Path,
    out: Path,
    weights: str = "ema",
    dtype: torch.dtype = torch.float32,
    overwrite: bool = False,
) -> None:
    """Write a model folder, complete or not at all.

    Args:
        checkpoint: a complete checkpoint; see `fvdm.checkpoints.find.resolve`.
        out: the folder.
        weights: `ema`, the averaged weights, or `model`.
        dtype: of the weights in the file; float16 halves it, and costs three decimal digits.
        overwrite: replace the model folder that is there.

    Raises:
        ValueError: if `out` exists, the checkpoint cannot be read, or the folder cannot be written.
    """
    if out.exists() and not (overwrite and (out / "config.json").is_file()):
        raise ValueError(f"{out} exists; choose another folder")
    model = read_backbone(checkpoint, weights)
    inference = read_inference_config(checkpoint, model.config)
    # Attention backend and memory saving belong to the machine that trained, not to the model.
    model.config = replace(model.config, attention="auto", activation_checkpointing=0)
    temporary = out.with_name(f".tmp-{out.name}")
    try:
        shutil.rmtree(temporary, ignore_errors=True)
        model.save_pretrained(temporary, dtype)
        if Path(inference.vae).is_dir():
            shutil.copytree(inference.vae, temporary / "vae")
        write_inference_config(temporary, inference)
        if out.exists():
            shutil.rmtree(out)
        temporary.rename(out)
        fsync_folder(out.parent)
    except OSError as error:
        shutil.rmtree(temporary, ignore_errors=True)
        raise ValueError(f"cannot write the model to {out}: {error.strerror or error}") from None
