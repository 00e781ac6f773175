"""Backbones by name: presets, building, loading. The one place that knows which backbones there are."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from fvdm.checkpoints import find
from fvdm.checkpoints.read import read_state, read_weights
from fvdm.models.backbone import Backbone
from fvdm.models.config import BackboneConfig, LatteConfig, latte_preset
from fvdm.models.latte import Latte
from fvdm.models.official import from_official, load_torch
from fvdm.models.wan import Wan
from fvdm.models.wan_config import WanConfig
from fvdm.models.wan_files import check_files, is_wan, load_wan, locate, read_config

BACKBONES: dict[str, type[Backbone]] = {"latte": Latte, "wan": Wan}
CONFIGS: dict[str, type[BackboneConfig]] = {"latte": LatteConfig, "wan": WanConfig}
WAN = "wan:"  # before a folder or a hub name of diffusers
EXAMPLE = Path(__file__).parents[1] / "weights" / "example"  # the demo's model; docs/examples


def preset(name: str) -> BackboneConfig:
    """The configuration of a named model.

    Args:
        name: such as `XL/2`, Latte of size XL with patches of 2; or `wan:` and a folder or hub name of diffusers, the
            settings of that Wan transformer.

    Raises:
        ValueError: if there is no such model; lists those there are.
    """
    return read_config(name.removeprefix(WAN)) if name.startswith(WAN) else latte_preset(name)


def config_from(values: Mapping[str, Any]) -> BackboneConfig:
    """The configuration that a checkpoint holds as plain values; see `fvdm.models.config.to_dict`.

    Raises:
        ValueError: if this version does not know the backbone.
    """
    values = dict(values)
    name = values.pop("backbone", "latte")
    if name not in CONFIGS:
        raise ValueError(f"backbone {name!r} is unknown; this version knows {', '.join(CONFIGS)}")
    settings: dict[str, Any] = {key: tuple(v) if isinstance(v, list) else v for key, v in values.items()}
    return CONFIGS[name](**settings)


def build(config: BackboneConfig) -> Backbone:
    """A backbone with new weights, in float32 on the default device."""
    return BACKBONES[config.backbone](config)


def load_pretrained(config: BackboneConfig) -> Backbone:
    """The network of these settings with the weights of its `source`, in float32 on the CPU.

    Raises:
        ValueError: if they are missing or corrupt, or do not fit the settings.
    """
    assert isinstance(config, WanConfig), "only Wan has a source"
    return load_wan(config.source, config)


def check_source(name: str) -> None:
    """Find what is missing of a `wan:` model's weights before a job waits in a queue; those on the hub are fetched.

    Raises:
        ValueError: names what is missing.
    """
    if name.startswith(WAN):
        check_files(name.removeprefix(WAN))


def resolve(path_or_name: str | Path) -> Path:
    """The file, folder or checkpoint that a user means.

    Args:
        path_or_name: see `load_backbone`.

    Raises:
        ValueError: if it is a run without a complete checkpoint, or nothing at all.
    """
    path = Path(path_or_name)
    if str(path_or_name) == "example" and not path.exists():
        path = EXAMPLE
    return path if path.is_file() or (path / "config.json").is_file() else find.resolve(path)


def find_model(path_or_name: str | Path) -> Path:
    """As `resolve`; of a `wan:` model the folder of its transformer, which is fetched from the hub if need be.

    Raises:
        ValueError: see `resolve`.
    """
    name = str(path_or_name)
    return locate(name.removeprefix(WAN)) if name.startswith(WAN) else resolve(path_or_name)


def load_backbone(path_or_name: str | Path, weights: str = "ema", num_heads: int | None = None) -> Backbone:
    """The network behind a path or a name, in float32 on the CPU.

    Args:
        path_or_name: a folder of `save_pretrained` or of `fvdm convert`; a run's folder or a checkpoint; a file of
            Latte's or of the official FVDM code; `example`, the small model that ships with the package; a folder of
            diffusers' Wan transformer, or `wan:` and such a folder or a hub name.
        weights: `ema` or `model`, of a run.
        num_heads: attention heads, of a file that is of no published size.

    Returns:
        The network, called as `model(x (b f c h w), t (b f), y)`.

    Raises:
        ValueError: if there is no such model, or it cannot be read.
    """
    if str(path_or_name).startswith(WAN):
        return load_wan(str(path_or_name).removeprefix(WAN))
    return read_backbone(resolve(path_or_name), weights, num_heads)


def read_backbone(path: Path, weights: str = "ema", num_heads: int | None = None) -> Backbone:
    """The network at a path that `resolve` returned; see `load_backbone`."""
    if path.is_file():
        return from_official(load_torch(path), num_heads, path)
    if (path / "config.json").is_file():
        return load_wan(path) if is_wan(path) else Latte.from_pretrained(path)
    model = build(config_from(read_state(path)["network"]))
    model.load_state_dict(read_weights(path, weights))
    return model


def load_weights(path_or_name: str | Path, weights: str = "ema", checksum: bool = True) -> dict[str, Tensor]:
    """The weights alone, by name, of what `load_backbone` loads; see there.

    Args:
        path_or_name: see `load_backbone`.
        weights: see `load_backbone`.
        checksum: compare the SHA-256 of a checkpoint's weights; of several processes on a node one is enough.
    """
    if str(path_or_name).startswith(WAN):
        return dict(load_backbone(path_or_name).state_dict())
    path = resolve(path_or_name)
    if path.is_file() or (path / "config.json").is_file():
        return dict(read_backbone(path).state_dict())
    return read_weights(path, weights, checksum)
