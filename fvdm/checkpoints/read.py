"""Read a checkpoint: its state, any slice of the flat vector whatever the number of ranks, the weights by name."""

import json
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from fvdm.checkpoints.layout import FORMAT, SLICES, STATE, checksum_mismatch, group_key
from fvdm.config import current_names


def read_slices(folder: Path, names: Sequence[str], parts: Sequence[range]) -> dict[str, list[Tensor]]:
    """Read parts of the flat vector from the shards of any number of ranks; each shard is opened once.

    Args:
        folder: the checkpoint.
        names: of `SLICES`.
        parts: ranges of the flat vector; only what lies in them is read.

    Returns:
        For each name its parts, flat and float32.

    Raises:
        ValueError: if the shards do not hold all of it.
    """
    found = {name: [torch.empty(len(part)) for part in parts] for name in names}
    filled = 0
    for path in sorted(folder.glob("shard-*.safetensors")):
        with safe_open(path, "pt") as file:
            for group, begin in enumerate(map(int, file.metadata()["begin"].split(","))):
                (size,) = file.get_slice(group_key(SLICES[0], group)).get_shape()
                for k, part in enumerate(parts):
                    low, high = max(part.start, begin), min(part.stop, begin + size)
                    if low >= high:
                        continue
                    for name in names:
                        values = file.get_slice(group_key(name, group))[low - begin : high - begin]
                        found[name][k][low - part.start : high - part.start] = values
                    filled += high - low
    total = sum(map(len, parts))
    if filled != total:
        raise ValueError(f"{folder} holds {filled} of {total} values of {names[0]}: its shards are incomplete")
    return found


def read_slice(folder: Path, name: str, part: range) -> Tensor:
    """Read one part of one of `SLICES`; see `read_slices`."""
    return read_slices(folder, [name], [part])[name][0]


def read_state(folder: Path) -> dict[str, Any]:
    """The contents of state.json.

    Raises:
        ValueError: if it cannot be read, or was written by a newer version.
    """
    try:
        state = json.loads((folder / STATE).read_text())
        found = state["format"]
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(f"{folder} is no checkpoint: {STATE} cannot be read ({error})") from None
    if found != FORMAT:
        raise ValueError(f"{folder} has format {found}, this version reads {FORMAT}; use the version that wrote it")
    return state | {key: current_names(state[key]) for key in ("settings", "network") if key in state}


def read_weights(folder: Path, kind: str = "ema", checksum: bool = True) -> dict[str, Tensor]:
    """All weights by name: of the `model`, or of its average, `ema`.

    Args:
        folder: the checkpoint.
        kind: `model` or `ema`.
        checksum: compare the SHA-256 of the file, while it is read; of several processes on a node one is enough.

    Raises:
        ValueError: if the file is missing or corrupt, or a weight is not finite.
    """
    path = folder / f"{kind}.safetensors"
    try:
        with ThreadPoolExecutor(1) as pool:
            mismatch = pool.submit(checksum_mismatch, folder, [path.name] if checksum else [])
            with safe_open(path, "pt") as file:
                weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            reason = mismatch.result()
    except (OSError, SafetensorError) as error:
        raise ValueError(f"cannot read {path} ({error}); choose another checkpoint") from None
    if reason:
        raise ValueError(f"checkpoint {folder} is corrupt: {reason}; choose another step")
    require_finite(weights, path)
    return weights


def require_finite(weights: Mapping[str, Tensor], source: str | Path) -> None:
    """Refuse weights with a NaN or an infinity, which would make black videos or train to nothing.

    Args:
        weights: by name.
        source: where they come from, for the message.

    Raises:
        ValueError: names the tensors.
    """
    spoilt = [name for name, value in weights.items() if value.is_floating_point() and not value.isfinite().all()]
    if spoilt:
        more = f" and {len(spoilt) - 3} more" if len(spoilt) > 3 else ""
        raise ValueError(
            f"weights in {source} are not finite: {', '.join(spoilt[:3])}{more}, of {len(weights)}; use an older "
            f"checkpoint or another file"
        )
