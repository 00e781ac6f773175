"""Wan's weights as diffusers lays them out: a folder or a hub name, one safetensors file or several with an index."""

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fvdm.checkpoints.read import require_finite
from fvdm.hub import fetching
from fvdm.models.pretrained import CONFIG, WEIGHTS
from fvdm.models.wan import Wan
from fvdm.models.wan_config import DIFFUSERS_CLASS, PUBLISHED, WanConfig, from_diffusers

INDEX = f"{WEIGHTS}.index.json"
SUBFOLDER = "transformer"  # of a pipeline's folder


def locate(path_or_name: str | Path, weights: bool = True) -> Path:
    """The folder of a transformer: one on disk, that of a pipeline on disk, or of the Hugging Face hub.

    Args:
        path_or_name: a folder, or a hub name such as `Wan-AI/Wan2.1-T2V-1.3B-Diffusers`.
        weights: whether the weights are needed, too; else `config.json` alone is fetched.

    Raises:
        ValueError: if there is no such folder and the hub gives none.
    """
    path = Path(path_or_name)
    for folder in (path, path / SUBFOLDER):
        if (folder / CONFIG).is_file():
            return folder
    if path.exists() or len(path.parts) != 2:
        raise ValueError(f"{path_or_name} holds no {CONFIG} of a transformer; give a folder of diffusers or a hub name")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    patterns = [f"{SUBFOLDER}/{'*' if weights else CONFIG}"]
    try:
        with fetching(str(path_or_name)):
            return Path(snapshot_download(str(path_or_name), allow_patterns=patterns)) / SUBFOLDER
    except (OSError, ValueError, HfHubHTTPError, LocalEntryNotFoundError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ValueError(f"{path_or_name} is no folder here, and the hub does not give it ({reason})") from None


def is_wan(folder: Path) -> bool:
    """Whether a folder's `config.json` is of this network."""
    try:
        return json.loads((folder / CONFIG).read_text()).get("_class_name") == DIFFUSERS_CLASS
    except (OSError, ValueError, AttributeError):
        return False


def read_config(path_or_name: str | Path) -> WanConfig:
    """The settings of a transformer; see `locate`.

    Raises:
        ValueError: if there is none, or it is another network.
    """
    if str(path_or_name) in PUBLISHED and not Path(path_or_name).exists():
        return replace(PUBLISHED[str(path_or_name)], source=str(path_or_name))
    folder = locate(path_or_name, weights=False)
    try:
        values = json.loads((folder / CONFIG).read_text())
    except (OSError, ValueError) as error:
        raise ValueError(f"{folder / CONFIG} cannot be read: {error}") from None
    return from_diffusers(values, str(path_or_name))


def load_wan(path_or_name: str | Path, config: WanConfig | None = None) -> Wan:
    """The network with its weights in float32 on the CPU: those of float32 files are mapped into memory, not copied.

    Args:
        path_or_name: see `locate`.
        config: settings in place of those of the folder's `config.json`.

    Raises:
        ValueError: if files are missing or corrupt, or do not fit the settings.
    """
    folder = locate(path_or_name)
    with torch.device("meta"):
        model = Wan(config or read_config(folder))
    weights = dict(_read(folder))
    expected = model.state_dict()
    mismatched = sorted(
        name
        for name in expected.keys() | weights.keys()
        if name not in expected or name not in weights or expected[name].shape != weights[name].shape
    )
    if mismatched:
        raise ValueError(
            f"the weights in {folder} do not fit its {CONFIG}: {len(mismatched)} differ, such as {mismatched[0]}"
        )
    require_finite(weights, folder)
    model.load_state_dict(weights, assign=True)
    return model


def check_files(path_or_name: str | Path) -> None:
    """Find missing weights before they are needed; those of a hub name are fetched.

    Raises:
        ValueError: names what is missing.
    """
    _files(locate(path_or_name))


def _read(folder: Path) -> Iterator[tuple[str, Tensor]]:
    """Names and weights of all files."""
    from safetensors import SafetensorError, safe_open

    for path in _files(folder):
        try:
            with safe_open(path, "pt") as file:
                for name in file.keys():  # noqa: SIM118
                    yield name, file.get_tensor(name).float()
        except (OSError, SafetensorError) as error:
            raise ValueError(f"cannot read the weights in {path}: {error}") from None


def _files(folder: Path) -> list[Path]:
    if (folder / WEIGHTS).is_file():
        return [folder / WEIGHTS]
    try:
        index: dict[str, Any] = json.loads((folder / INDEX).read_text())
        files = [folder / name for name in sorted({*index["weight_map"].values()})]
    except (OSError, ValueError, KeyError, AttributeError):
        raise ValueError(f"{folder} holds neither {WEIGHTS} nor a valid {INDEX}; fetch the weights again") from None
    missing = [path.name for path in files if not path.is_file()]
    if missing:
        raise ValueError(f"{folder} lacks {len(missing)} of {len(files)} weight files, such as {missing[0]}")
    return files
