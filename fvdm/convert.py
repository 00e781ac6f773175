"""Weights from elsewhere: state dicts of Latte and of the official FVDM code as ours.

The only place that knows their names. Their timestep index 0..999 is our t = 1..1000, which the embedding shifts, so
weights carry over as they are.
"""

import math
import re
from dataclasses import replace

import torch
from einops import rearrange
from torch import Tensor

from fvdm.model import SIZES, ModelConfig, VideoDiT

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
TABLES = ("pos_embed", "temp_embed")  # Fixed; ours are computed.


def from_official(state_dict: dict[str, Tensor], num_heads: int | None = None) -> VideoDiT:
    """A model with the weights of a Latte or an official FVDM checkpoint; size and options are read off the shapes.

    Args:
        state_dict: `blocks.N.*` (Latte) or `blocks_spatial.N.*` and `blocks_temp.N.*` (FVDM), also wrapped in `ema` or
            `model`, also with `module.` or `_orig_mod.` before every name.
        num_heads: attention heads; found by itself for the sizes S, B, L and XL.

    Raises:
        ValueError: if it is another model's checkpoint; says by which names.
    """
    for wrapper in WRAPPERS:
        if isinstance(state_dict.get(wrapper), dict):
            state_dict = state_dict[wrapper]  # type: ignore[assignment]
            break
    weights = {PREFIXES.sub("", name): value for name, value in state_dict.items() if isinstance(value, Tensor)}
    config = _config(weights, num_heads)
    ours: dict[str, Tensor] = {}
    for name, value in weights.items():
        if name not in TABLES:
            ours |= _rename(name, value, config)
    model = VideoDiT(config)
    wanted = {name: p.shape for name, p in model.named_parameters()}
    missing, extra = wanted.keys() - ours.keys(), ours.keys() - wanted.keys()
    if missing or extra:
        raise ValueError(f"not a Latte or FVDM checkpoint: missing {_few(missing)}, left over {_few(extra)}")
    wrong = {name for name in wanted if wanted[name] != ours[name].shape}
    if wrong:
        raise ValueError(f"not a Latte or FVDM checkpoint: these have other shapes than its size: {_few(wrong)}")
    model.load_state_dict(ours)
    return model


def _few(names: set[str]) -> str:
    return ", ".join(sorted(names)[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "") or "none"


def _config(weights: dict[str, Tensor], num_heads: int | None) -> ModelConfig:
    try:
        width, channels, patch, _ = weights["x_embedder.proj.weight"].shape
        tokens, frames = weights["pos_embed"].shape[1], weights["temp_embed"].shape[1]
        out = weights["final_layer.linear.weight"].shape[0] // patch**2
    except (KeyError, ValueError, IndexError) as error:
        names = ", ".join(sorted(weights)[:3])
        raise ValueError(f"not a Latte or FVDM checkpoint: {error} is missing; it has {names or 0}") from None
    depth = len({_place(name) for name in weights} - {None})
    heads = {(d, w): h for d, w, h in SIZES.values()}.get((depth, width), num_heads)
    if num_heads or not heads:
        heads = num_heads
    if not heads:
        raise ValueError(f"{depth} blocks of width {width} are none of the published sizes; say how many heads it has")
    table = weights.get("y_embedder.embedding_table.weight")
    return replace(
        ModelConfig(),
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


def _rename(name: str, value: Tensor, config: ModelConfig) -> dict[str, Tensor]:
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


def load_torch(path: str) -> dict[str, Tensor]:
    """Read a `.pt` file without running any code of it, or a `.safetensors` file.

    Raises:
        ValueError: if it is neither, or holds more than tensors.
    """
    import pickle

    try:
        if path.endswith(".safetensors"):
            from safetensors.torch import load_file

            return load_file(path)
        return torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, pickle.UnpicklingError, EOFError) as error:
        raise ValueError(f"cannot read weights from {path}: {str(error).splitlines()[0]}") from None
