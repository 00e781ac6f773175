"""Backbones by name: presets, building, loading. The one place that knows which backbones there are."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from fvdm.checkpoints import find
from fvdm.checkpoints.layout import STATE
from fvdm.checkpoints.read import read_state, read_weights
from fvdm.models.backbone import Backbone
from fvdm.models.config import BackboneConfig, LatteConfig, latte_preset
from fvdm.models.latte import Latte
from fvdm.models.lora import add_lora, load_lora, merge_lora
from fvdm.models.lora_files import LORA, is_lora, read_lora, weights_hash
from fvdm.models.official import from_official, load_torch
from fvdm.models.pretrained import CONFIG
from fvdm.models.wan import Wan
from fvdm.models.wan_config import SIZES, WanConfig
from fvdm.models.wan_files import check_files, is_wan, load_wan, locate, read_config

BACKBONES: dict[str, type[Backbone]] = {"latte": Latte, "wan": Wan}
CONFIGS: dict[str, type[BackboneConfig]] = {"latte": LatteConfig, "wan": WanConfig}
WAN = "wan:"  # before a folder or a hub name of diffusers
EXAMPLE = Path(__file__).parents[1] / "weights" / "example"  # the demo's model; docs/examples


def preset(name: str) -> BackboneConfig:
    """The configuration of a named model.

    Args:
        name: such as `XL/2`, Latte of size XL with patches of 2; or `wan:` and a folder or hub name of diffusers, the
            settings of that Wan transformer; or `wan:1.3B`, `wan:14B` (2.1) or `wan:5B` (2.2), with new weights.

    Raises:
        ValueError: if there is no such model; lists those there are.
    """
    if not name.startswith(WAN):
        return latte_preset(name)
    source = name.removeprefix(WAN)
    return SIZES[source] if source in SIZES else read_config(source)


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
    if name.startswith(WAN) and name.removeprefix(WAN) not in SIZES:
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
    return path if path.is_file() or any((path / name).is_file() for name in (CONFIG, LORA)) else find.resolve(path)


def find_model(path_or_name: str | Path) -> Path:
    """As `resolve`; of a `wan:` model the folder of its transformer, which is fetched from the hub if need be.

    Raises:
        ValueError: see `resolve`.
    """
    name = str(path_or_name)
    return locate(name.removeprefix(WAN)) if name.startswith(WAN) else resolve(path_or_name)


def load_backbone(
    path_or_name: str | Path, weights: str = "ema", num_heads: int | None = None, base: str = ""
) -> Backbone:
    """The network behind a path or a name, in float32 on the CPU.

    Args:
        path_or_name: a folder of `save_pretrained` or of `fvdm convert`; a run's folder or a checkpoint; a file of
            Latte's or of the official FVDM code; `example`, the small model that ships with the package; a folder of
            diffusers' Wan transformer, or `wan:` and such a folder or a hub name. A LoRA, of a run or exported, is
            merged into its base model.
        weights: `ema` or `model`, of a run.
        num_heads: attention heads, of a file that is of no published size.
        base: base model of a LoRA, as `path_or_name`; empty is where it was in training.

    Returns:
        The network, called as `model(x (b f c h w), t (b f), y)`.

    Raises:
        ValueError: if there is no such model, or it cannot be read.
    """
    if str(path_or_name).startswith(WAN):
        return load_wan(str(path_or_name).removeprefix(WAN))
    return read_backbone(resolve(path_or_name), weights, num_heads, base)


def read_backbone(path: Path, weights: str = "ema", num_heads: int | None = None, base: str = "") -> Backbone:
    """The network at a path that `resolve` returned; see `load_backbone`."""
    if is_lora(path):
        return _read_merged(path, weights, base)
    if base:
        raise ValueError(f"{path} is a complete model, so it needs no base: leave out --base")
    if path.is_file():
        return from_official(load_torch(path), num_heads, path)
    if (path / CONFIG).is_file():
        return load_wan(path) if is_wan(path) else Latte.from_pretrained(path)
    model = build(config_from(read_state(path)["network"]))
    model.load_state_dict(read_weights(path, weights))
    return model


def _read_merged(path: Path, weights: str, base: str) -> Backbone:
    lora = read_lora(path, weights)
    source = base or lora.base.source
    try:
        model = load_base(config_from(lora.network), source)
    except ValueError as error:
        raise ValueError(
            f"{path} holds a LoRA of the base model {source}, which cannot be loaded ({error}); say where it is with "
            f"--base PATH"
        ) from None
    found = weights_hash(model.state_dict())
    if found != lora.base.sha256:
        raise ValueError(
            f"{path} holds a LoRA of another base model than {source}, whose weights have the SHA-256 {found[:12]} in "
            f"place of {lora.base.sha256[:12]}; say where its own base is with --base PATH"
        )
    add_lora(model, lora.config)
    load_lora(model, lora.weights)
    merge_lora(model)
    return model


def load_base(config: BackboneConfig, source: str) -> Backbone:
    """The network of these settings with the weights of a complete model, in float32 on the CPU.

    Args:
        config: frames and size may be others than those of the source, where its weights fit any.
        source: see `load_backbone`; `wan:` may be left out.

    Raises:
        ValueError: if the weights are missing, corrupt, of another network, or a LoRA.
    """
    own = (Path(source) / STATE).is_file() or (Path(source) / "checkpoints").is_dir()
    if isinstance(config, WanConfig) and not own:
        return load_wan(source.removeprefix(WAN), config)
    if is_lora(resolve(source)):
        raise ValueError(f"{source} is a LoRA, not a complete model; make one with: fvdm checkpoint export --merge")
    model, weights = build(config), load_weights(source)
    theirs, ours = ({(name, w.shape) for name, w in each.items()} for each in (weights, model.state_dict()))
    mismatched = sorted({name for name, _ in theirs ^ ours})
    if mismatched:
        raise ValueError(f"its weights do not fit the model: {len(mismatched)} differ, such as {mismatched[0]}")
    model.load_state_dict(weights)
    return model


def absolute_source(name: str) -> str:
    """Where a model is, such that another process finds it from any folder; a hub name stays as it is.

    Args:
        name: see `load_backbone`; of a run, the checkpoint is named.
    """
    if not name.startswith(WAN):
        return str(resolve(name).resolve())
    folder = Path(name.removeprefix(WAN))
    return f"{WAN}{folder.resolve()}" if folder.exists() else name


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
    if path.is_file() or (path / CONFIG).is_file() or is_lora(path):
        return dict(read_backbone(path, weights).state_dict())
    return read_weights(path, weights, checksum)
