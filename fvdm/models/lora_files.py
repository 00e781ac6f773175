"""A LoRA on disk: in a checkpoint of a run, or in a folder that `fvdm checkpoint export` wrote.

    pytorch_lora_weights.safetensors   the updates under diffusers' names; its header names the base model
    inference.json                     noise process, VAE, stride, as of any model

Neither holds the base model, only where it was found and the SHA-256 of its weights.
"""

import hashlib
import json
import os
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from fvdm.checkpoints.layout import STATE
from fvdm.checkpoints.read import read_state, read_weights, require_finite
from fvdm.checkpoints.save import save_tensors
from fvdm.config import plain
from fvdm.models.config import LoraConfig
from fvdm.models.lora import from_diffusers, to_diffusers

LORA = "pytorch_lora_weights.safetensors"  # what diffusers' load_lora_weights looks for in a folder
HEADER = "fvdm"  # key of our entry in the file's header


@dataclass(frozen=True)
class Base:
    """The model that a LoRA was trained on.

    Attributes:
        source: where it was found: a path, or `wan:` and a folder or hub name.
        sha256: of its weights; see `weights_hash`.
    """

    source: str
    sha256: str


@dataclass(frozen=True)
class Lora:
    """The updates of a base model.

    Attributes:
        network: settings of the base model as plain values; see `fvdm.models.loading.config_from`.
        config: rank and layers.
        base: the base model.
        weights: by the names of `fvdm.models.lora.add_lora`.
    """

    network: dict[str, Any]
    config: LoraConfig
    base: Base
    weights: dict[str, Tensor]


def weights_hash(weights: Mapping[str, Tensor]) -> str:
    """SHA-256 of a network's weights in float32, with their names and shapes: the same whatever files hold them."""

    def digest(name: str) -> str:
        values = weights[name].detach().to("cpu", torch.float32).contiguous()
        return f"{name} {tuple(values.shape)} {hashlib.sha256(values.numpy().data).hexdigest()}\n"

    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        return hashlib.sha256("".join(pool.map(digest, sorted(weights))).encode()).hexdigest()


def is_lora(path: Path) -> bool:
    """Whether a folder is a checkpoint of a LoRA, or an exported one."""
    if (path / LORA).is_file():
        return True
    return (path / STATE).is_file() and "base" in read_state(path)


def read_lora(path: Path, kind: str = "ema") -> Lora:
    """The updates in a folder of which `is_lora` is true.

    Args:
        path: the folder.
        kind: `ema` or `model`, of a checkpoint.

    Raises:
        ValueError: if files are corrupt.
    """
    if (path / STATE).is_file():
        state = read_state(path)
        return _lora(state, read_weights(path, kind))
    try:
        with safe_open(path / LORA, "pt") as file:
            header = json.loads(file.metadata()[HEADER])
            weights = {name: file.get_tensor(name).float() for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path / LORA} is no LoRA of `fvdm checkpoint export`: {error}") from None
    require_finite(weights, path / LORA)
    return _lora(header, from_diffusers(weights))


def _lora(values: Mapping[str, Any], weights: dict[str, Tensor]) -> Lora:
    config = values["lora"] | {"targets": tuple(values["lora"]["targets"])}
    return Lora(dict(values["network"]), LoraConfig(**config), Base(**values["base"]), weights)


def save_lora(lora: Lora, folder: Path, dtype: torch.dtype = torch.float32) -> None:
    """Write the file of an exported LoRA into a folder.

    Args:
        lora: its alpha is multiplied into the weights.
        folder: where to.
        dtype: of the weights in the file.
    """
    weights = {name: weight.to(dtype) for name, weight in to_diffusers(lora.weights, lora.config).items()}
    config = plain(lora.config) | {"alpha": 0.0, "dropout": 0.0}
    header = json.dumps({"network": lora.network, "lora": config, "base": plain(lora.base)})
    save_tensors(weights, folder / LORA, {"format": "pt", HEADER: header})
