"""Weights from elsewhere: `fvdm convert SRC DST` for checkpoints of Latte and of the official FVDM code.

The only place that knows their names. Their timestep index 0..999 is our t = 1..1000, which the embedding shifts, so
weights carry over as they are.
"""

import io
import math
import pickle
import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from einops import rearrange
from torch import Tensor

from fvdm.checkpoints.read import require_finite
from fvdm.models.config import LATTE_SIZES, LatteConfig
from fvdm.models.latte import Latte

NOT_OURS = "not a Latte or FVDM checkpoint"

WRAPPERS = ("ema", "model", "state_dict")
PREFIXES = re.compile(r"^(module\.|_orig_mod\.)+")
BLOCK = {
    "attn.qkv": "attn.qkv",
    "attn.proj": "attn.proj",
    "mlp.fc1": "mlp.0",
    "mlp.fc2": "mlp.2",
    "adaLN_modulation.1": "modulation",
}
OTHER = {
    "x_embedder.proj": "x_embedder",
    "t_embedder.mlp.0": "t_embedder.0",
    "t_embedder.mlp.2": "t_embedder.2",
    "final_layer.linear": "final_layer",
    "final_layer.adaLN_modulation.1": "final_modulation",
}
TABLES = {"pos_embed": "space", "temp_embed": "time"}  # Fixed; ours are computed.
HALF = 4e-3  # what is lost of a table in half precision, bfloat16 included


def from_official(
    state_dict: Mapping[str, Any], num_heads: int | None = None, source: str | Path = "the checkpoint"
) -> Latte:
    """A model with the weights of a Latte or an official FVDM checkpoint; size and options are read off the shapes.

    Args:
        state_dict: `blocks.N.*` (Latte) or `blocks_spatial.N.*` and `blocks_temp.N.*` (FVDM), also wrapped in `ema` or
            `model`, also with `module.` or `_orig_mod.` before every name.
        num_heads: attention heads; known for the sizes S, B, L and XL.
        source: where the weights were read, for messages.

    Raises:
        ValueError: if it is another model's checkpoint, or a weight is not finite; says by which names.
    """
    weights = _unwrap(state_dict)
    require_finite(weights, source)
    config = _config(weights, num_heads)
    ours: dict[str, Tensor] = {}
    for name, value in weights.items():
        if name not in TABLES:
            ours |= _rename(name, value, config)
    model = Latte(config)
    expected = {name: p.shape for name, p in model.named_parameters()}
    missing, extra = expected.keys() - ours.keys(), ours.keys() - expected.keys()
    if missing or extra:
        raise ValueError(f"{NOT_OURS}: missing {_few(missing)}, left over {_few(extra)}")
    mismatched = {name for name in expected if expected[name] != ours[name].shape}
    if mismatched:
        raise ValueError(f"{NOT_OURS}: these have other shapes than its size: {_few(mismatched)}")
    _compare_tables(weights, model)
    model.load_state_dict(ours)
    return model


def _compare_tables(weights: Mapping[str, Tensor], model: Latte) -> None:
    for theirs, ours in TABLES.items():
        table, expected = weights[theirs].float().cpu(), getattr(model, ours)[None]
        if table.shape != expected.shape or not torch.allclose(table, expected, rtol=0, atol=HALF):
            raise ValueError(
                f"{NOT_OURS}: its positions in {ours}, {theirs}, are not the sines and cosines that those have; without"
                f" them it would be another network"
            )


def _unwrap(state_dict: Mapping[str, Any]) -> dict[str, Tensor]:
    """The tensors by their bare names."""
    if not isinstance(state_dict, Mapping):
        raise ValueError(f"{NOT_OURS}: it holds a {type(state_dict).__name__}, not weights by name")
    for wrapper in WRAPPERS:
        if isinstance(state_dict.get(wrapper), Mapping):
            state_dict = state_dict[wrapper]
            break
    return {PREFIXES.sub("", str(name)): value for name, value in state_dict.items() if isinstance(value, Tensor)}


def _few(names: set[str]) -> str:
    return ", ".join(sorted(names)[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "") or "none"


def _config(weights: dict[str, Tensor], num_heads: int | None) -> LatteConfig:
    try:
        width, channels, patch, _ = weights["x_embedder.proj.weight"].shape
        tokens, frames = weights["pos_embed"].shape[1], weights["temp_embed"].shape[1]
        out = weights["final_layer.linear.weight"].shape[0] // patch**2
    except KeyError as error:
        raise ValueError(f"{NOT_OURS}: it has no {error.args[0]}, but {_few(set(weights))}") from None
    except (ValueError, IndexError):
        raise ValueError(f"{NOT_OURS}: its embeddings have other shapes") from None
    if out not in (channels, 2 * channels) or math.isqrt(tokens) ** 2 != tokens:
        raise ValueError(f"{NOT_OURS}: {out} channels come out where {channels} go in, in {tokens} tokens a frame")
    depth = len({_place(name) for name in weights} - {None})
    heads = {(d, w): h for d, w, h in LATTE_SIZES.values()}.get((depth, width), num_heads)
    if num_heads or not heads:
        heads = num_heads
    if not heads:
        raise ValueError(
            f"{depth} blocks of width {width} are not a published size; say how many heads it has (--heads)"
        )
    table = weights.get("y_embedder.embedding_table.weight")
    return replace(
        LatteConfig(),
        depth=depth,
        width=width,
        heads=heads,
        patch=patch,
        channels=channels,
        size=math.isqrt(tokens) * patch,
        frames=frames,
        num_classes=0 if table is None else table.shape[0] - 1,
        learned_variance=out == 2 * channels,
    )


def _place(name: str) -> int | None:
    """Which of our blocks an official name belongs to."""
    found = re.match(r"(blocks|blocks_spatial|blocks_temp)\.(\d+)\.", name)
    if not found:
        return None
    number = int(found[2])
    return {"blocks": number, "blocks_spatial": 2 * number, "blocks_temp": 2 * number + 1}[found[1]]


def _rename(name: str, value: Tensor, config: LatteConfig) -> dict[str, Tensor]:
    if name == "y_embedder.embedding_table.weight":
        return {"y_embedder.weight": value}
    module, _, kind = name.rpartition(".")
    place = _place(name)
    if place is None:
        value = value.flatten(1) if module == "x_embedder.proj" and kind == "weight" else value
        return {f"{OTHER.get(module, module)}.{kind}": value}
    module = module.split(".", 2)[2]
    if module == "attn.qkv" and value.shape[0] == 3 * config.width:
        value = rearrange(value, "(three h e) ... -> (h three e) ...", three=3, h=config.heads)
    return {f"blocks.{place}.{BLOCK.get(module, module)}.{kind}": value}


class CountedFile(io.FileIO):
    """A file that tells how many bytes are read of it, piece by piece."""

    def __init__(self, path: str | Path, on_read: Callable[[int], Any]) -> None:
        super().__init__(path)
        self.on_read = on_read

    def readinto(self, buffer: Any) -> int | None:
        """Fill a buffer; returns the number of bytes."""
        count = super().readinto(buffer)
        self.on_read(count or 0)
        return count


def load_torch(path: str | Path, on_read: Callable[[int], Any] = lambda _: None) -> dict[str, Any]:
    """Read a `.pt` file without running any code of it, or a `.safetensors` file.

    Args:
        path: the file.
        on_read: called with the number of bytes of each piece that is read.

    Raises:
        ValueError: if it is neither, or holds more than tensors and plain values.
    """
    from argparse import Namespace

    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        if str(path).endswith(".safetensors"):
            return load_file(path)
        # Checkpoints of the DiT family carry the arguments of their training along: plain values in a Namespace.
        with torch.serialization.safe_globals([Namespace]), io.BufferedReader(CountedFile(path, on_read)) as file:
            return torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        raise ValueError(f"cannot read weights from {path}: it is corrupt, or holds code, which was not run") from None
    except (OSError, RuntimeError, EOFError, SafetensorError, ValueError) as error:
        reason = getattr(error, "strerror", None) or " ".join(str(error).split())[:200]
        raise ValueError(f"cannot read weights from {path}: {reason or 'it is empty'}") from None
