"""A network as a folder of config.json and safetensors, as diffusers lays it out. Only this file knows how."""

import dataclasses
import json
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from fvdm.checkpoints.read import require_finite
from fvdm.config import current_names
from fvdm.files import atomic_write, write_text

CONFIG = "config.json"
WEIGHTS = "diffusion_pytorch_model.safetensors"
FORMER_CLASSES = {"VideoDiT": "Latte"}  # names up to version 0.1
_OTHER_WEIGHTS = ("model.safetensors",)


class Pretrained:
    """Gives a network made from one dataclass, `Class(config)` with `.config`, the methods of diffusers' models."""

    Config: ClassVar[type]

    def config_dict(self) -> dict[str, Any]:
        """The contents of `config.json`."""
        return {"_class_name": type(self).__name__} | dataclasses.asdict(self.config)  # type: ignore[attr-defined]

    def save_pretrained(self, path: str | Path, dtype: torch.dtype = torch.float32) -> None:
        """Write the folder: `config.json` and safetensors, each under a temporary name first.

        Args:
            path: the folder.
            dtype: of the weights in the file; float16 halves it, and costs three decimal digits.

        Raises:
            ValueError: if the folder cannot be written.
        """
        from safetensors.torch import save_file

        folder = Path(path)
        config = self.config_dict()
        weights: dict[str, Tensor] = self.state_dict()  # type: ignore[attr-defined]
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with atomic_write(folder / WEIGHTS) as temporary:
                save_file({k: v.detach().to(dtype).cpu().contiguous() for k, v in weights.items()}, temporary)
            write_text(folder / CONFIG, json.dumps(config, indent=2) + "\n")
        except OSError as error:
            raise ValueError(f"cannot write the model to {folder}: {error.strerror or error}") from None

    @classmethod
    def from_pretrained(cls, path: str | Path) -> Self:
        """The network of a folder, in float32 on the CPU.

        Args:
            path: a folder with `config.json` and one safetensors file.

        Raises:
            ValueError: if the folder holds no such model, or weights that do not fit its config.json.
        """
        folder = Path(path)
        model = cls(cls.Config(**_read_config(folder, cls)))  # type: ignore[call-arg]
        weights = _read_weights(folder)
        expected: dict[str, Tensor] = model.state_dict()  # type: ignore[attr-defined]
        mismatched = [
            k
            for k in {*expected, *weights}
            if k not in expected or k not in weights or expected[k].shape != weights[k].shape
        ]
        if mismatched:
            raise ValueError(f"the weights in {folder} do not fit its {CONFIG}: {', '.join(sorted(mismatched)[:3])}")
        model.load_state_dict(weights)  # type: ignore[attr-defined]
        return model


def _read_config(folder: Path, cls: type[Pretrained]) -> dict[str, Any]:
    try:
        config = json.loads((folder / CONFIG).read_text())
        found = config.get("_class_name", cls.__name__)
        config = current_names(config)
    except (OSError, ValueError, AttributeError) as error:
        raise ValueError(f"{folder} holds no model: {CONFIG} cannot be read ({error})") from None
    if FORMER_CLASSES.get(found, found) != cls.__name__:
        raise ValueError(f"{folder} holds a {found}, not a {cls.__name__}")
    values = {name: value for name, value in config.items() if not name.startswith("_")}
    types = {field.name: type(field.default) for field in dataclasses.fields(cls.Config)}
    pairs = {field.name for field in dataclasses.fields(cls.Config) if "tuple" in str(field.type)}
    values = {name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}
    unknown = values.keys() - types.keys()
    if unknown:
        raise ValueError(
            f"{folder / CONFIG} has settings that this version does not know: {', '.join(sorted(unknown))}"
        )
    wrong = [
        name
        for name, value in values.items()
        if type(value) is not types[name] and not (name in pairs and isinstance(value, tuple))
    ]
    if wrong:
        raise ValueError(f"{folder / CONFIG}: {wrong[0]} is {values[wrong[0]]!r}, not a {types[wrong[0]].__name__}")
    return values


def _read_weights(folder: Path) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    path = next((folder / name for name in (WEIGHTS, *_OTHER_WEIGHTS) if (folder / name).is_file()), folder / WEIGHTS)
    try:
        weights = {name: value.float() for name, value in load_file(path).items()}
    except (OSError, SafetensorError) as error:
        raise ValueError(f"cannot read {path}: {error}") from None
    require_finite(weights, path)
    return weights
