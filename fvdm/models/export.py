"""A checkpoint of a training run as a model folder for use: what `fvdm.load` takes, without what only training needs.

config.json                              the network, as diffusers lays it out
diffusion_pytorch_model.safetensors      its weights
inference.json                           noise process, classes, stride, VAE
vae/                                     the VAE, where it is a folder

A LoRA becomes such a folder when it is merged into its base model; else `fvdm.models.lora_files` says what is written.
"""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch

from fvdm.files import fsync_folder
from fvdm.models.inference import InferenceConfig, read_inference_config, write_inference_config
from fvdm.models.loading import config_from, read_backbone
from fvdm.models.lora_files import read_lora, save_lora

TEMPORARY = ".tmp-{}"  # name of a folder that is being written


def export_model(
    checkpoint: Path,
    out: Path,
    weights: str = "ema",
    dtype: torch.dtype = torch.float32,
    overwrite: bool = False,
    base: str = "",
) -> None:
    """Write a model folder, complete or not at all.

    Args:
        checkpoint: a complete checkpoint; see `fvdm.checkpoints.find.resolve`. A LoRA is merged into its base model.
        out: the folder.
        weights: `ema`, the averaged weights, or `model`.
        dtype: of the weights in the file; float16 halves it, and costs three decimal digits.
        overwrite: replace the model folder that is there.
        base: base model of a LoRA; empty is where it was in training.

    Raises:
        ValueError: if `out` exists, the checkpoint or the base model cannot be read, or the folder cannot be written.
    """
    if out.exists() and not (overwrite and (out / "config.json").is_file()):
        raise ValueError(f"{out} exists; choose another folder")
    model = read_backbone(checkpoint, weights, base=base)
    inference = read_inference_config(checkpoint, model.config)
    # Attention backend and memory saving belong to the machine that trained, not to the model.
    model.config = replace(model.config, attention="auto", activation_checkpointing=0)
    with _folder(out, inference) as temporary:
        model.save_pretrained(temporary, dtype)


def export_lora(checkpoint: Path, out: Path, weights: str = "ema", dtype: torch.dtype = torch.float32) -> None:
    """Write the folder of a LoRA, which diffusers' `load_lora_weights` takes, complete or not at all.

    Args:
        checkpoint: of a run with a LoRA.
        out: the folder.
        weights: `ema`, the averaged weights, or `model`.
        dtype: of the weights in the file.

    Raises:
        ValueError: if `out` exists, the checkpoint cannot be read, or the folder cannot be written.
    """
    if out.exists():
        raise ValueError(f"{out} exists; choose another folder")
    lora = read_lora(checkpoint, weights)
    with _folder(out, read_inference_config(checkpoint, config_from(lora.network))) as temporary:
        save_lora(lora, temporary, dtype)


@contextmanager
def _folder(out: Path, inference: InferenceConfig) -> Iterator[Path]:
    """A temporary folder to write a model in, which becomes `out` when the block ends without an error."""
    temporary = out.with_name(TEMPORARY.format(out.name))
    try:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        yield temporary
        if Path(inference.vae).is_dir():
            shutil.copytree(inference.vae, temporary / "vae")
        write_inference_config(temporary, inference)
        if out.exists():
            shutil.rmtree(out)
        temporary.rename(out)
        fsync_folder(out.parent)
    except OSError as error:
        raise ValueError(f"cannot write the model to {out}: {error.strerror or error}") from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
