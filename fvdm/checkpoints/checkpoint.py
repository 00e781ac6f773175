"""What a run leaves on disk: save, find the newest whole checkpoint, load at any number of ranks, read the weights.

    checkpoints/step-00001000/
      manifest.json                      every file with its size and SHA-256; written last, so it makes the whole
      state.json                         step, position in the data, layout of the flat vector, the settings
      shard-00000-of-00002.safetensors   rank 0's slice of master weights, Adam moments and EMA, float32
      model.safetensors ema.safetensors  all weights by name, float32, for use

Nothing is pickled. A folder gets its name by a rename when it is whole, so a killed save leaves only a `.tmp-` folder.
"""

import hashlib
import json
import logging
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from fvdm.checkpoints.config import CheckpointConfig
from fvdm.config import current_names
from fvdm.files import fsync_file, fsync_folder, write_text

logger = logging.getLogger(__name__)

FORMAT = 1
STEP = "step-{:08d}"
SLICES = ("master", "exp_avg", "exp_avg_sq", "ema")
WEIGHTS = {"model": "master", "ema": "ema"}


def _digest(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        return {"bytes": path.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}


def _save_tensors(tensors: dict[str, Tensor], path: Path, metadata: dict[str, str] | None = None) -> None:
    save_file({k: v.detach().cpu().contiguous() for k, v in tensors.items()}, path, metadata)
    fsync_file(path)


def save(
    root: Path,
    step: int,
    slices: dict[str, Tensor],
    begin: int,
    state: dict[str, Any],
    rank: int,
    world_size: int,
    barrier: Callable[..., None],
) -> Path:
    """Write a checkpoint. Collective: every rank calls it at the same step, on one shared file system.

    Args:
        root: the run's `checkpoints` folder.
        step: optimizer steps taken.
        slices: `SLICES`, each this rank's flat part.
        begin: where this rank's part begins in the flat vector.
        state: what rank 0 stores in state.json; `names` maps each weight to its shape, in flat order.
        rank: this rank.
        world_size: number of ranks.
        barrier: waits for all ranks; given a sentence, it raises OSError with it on all of them.

    Returns:
        The checkpoint's folder.

    Raises:
        OSError: on every rank, if any of them could not write; nothing is left behind.
    """
    final = root / STEP.format(step)
    folder = root / f".tmp-{final.name}"
    try:
        with _together(barrier):
            if rank == 0:
                shutil.rmtree(folder, ignore_errors=True)
                folder.mkdir(parents=True)
        with _together(barrier):
            shard = folder / f"shard-{rank:05d}-of-{world_size:05d}.safetensors"
            _save_tensors(slices, shard, {"begin": str(begin)})
            write_text(folder / f"digest-{rank:05d}.json", json.dumps({shard.name: _digest(shard)}))
        with _together(barrier):
            if rank == 0:
                _finish(folder, final, state | {"step": step, "world_size": world_size, "format": FORMAT})
    except OSError:
        if rank == 0:
            shutil.rmtree(folder, ignore_errors=True)
        raise
    return final


@contextmanager
def _together(barrier: Callable[..., None]) -> Iterator[None]:
    """Wait for all ranks at the end; what one rank could not write, none has written."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        barrier(str(error))
        raise OSError(str(error)) from None
    barrier()


def _finish(folder: Path, final: Path, state: dict[str, Any]) -> None:
    """Rank 0's part: the weights by name, the state, the manifest, and the rename that makes it a checkpoint."""
    files: dict[str, Any] = {}
    for digest in sorted(folder.glob("digest-*.json")):
        files |= json.loads(digest.read_text())
        digest.unlink()
    for kind, source in WEIGHTS.items():
        _save_tensors(_by_name(folder, source, state["names"]), folder / f"{kind}.safetensors")
    write_text(folder / "state.json", json.dumps(state, indent=1))
    files |= {name: _digest(folder / name) for name in (*(f"{k}.safetensors" for k in WEIGHTS), "state.json")}
    write_text(folder / "manifest.json", json.dumps({"format": FORMAT, "files": files}, indent=1))
    fsync_folder(folder)
    if final.exists():  # The step was saved before, and found damaged; else nothing would have led here again.
        shutil.rmtree(final)
    folder.rename(final)
    fsync_folder(final.parent)


def read_slice(folder: Path, name: str, wanted: range) -> Tensor:
    """Read a part of one of `SLICES` from the shards of any number of ranks; only what is wanted is read.

    Raises:
        ValueError: if the shards do not hold all of it.
    """
    out = torch.empty(len(wanted))
    filled = 0
    for path in sorted(folder.glob("shard-*.safetensors")):
        with safe_open(path, "pt") as file:
            begin = int(file.metadata()["begin"])
            values = file.get_slice(name)
            low = max(wanted.start, begin)
            high = min(wanted.stop, begin + values.get_shape()[0])
            if low < high:
                out[low - wanted.start : high - wanted.start] = values[low - begin : high - begin]
                filled += high - low
    if filled != len(wanted):
        raise ValueError(f"{folder} holds {filled} of {len(wanted)} values of {name}: its shards are incomplete")
    return out


def _by_name(folder: Path, source: str, names: dict[str, Any]) -> dict[str, Tensor]:
    weights, begin = {}, 0
    for name, shape in names.items():
        size = torch.Size(shape).numel()
        weights[name] = read_slice(folder, source, range(begin, begin + size)).view(tuple(shape))
        begin += size
    return weights


def validate(folder: Path, deep: bool = True) -> str | None:
    """Why a checkpoint is not whole, in a few words; None when it is.

    Args:
        folder: the checkpoint.
        deep: compare checksums, not only sizes.
    """
    try:
        files = json.loads((folder / "manifest.json").read_text())["files"]
        for name, entry in files.items():
            path = folder / name
            if not path.is_file():
                return f"{name} is missing"
            if path.stat().st_size != entry["bytes"]:
                return f"{name} has {path.stat().st_size} bytes instead of {entry['bytes']}"
            if deep and _digest(path) != entry:
                return f"the checksum of {name} is wrong"
    except (OSError, ValueError, KeyError, TypeError) as error:
        return f"manifest.json cannot be read ({type(error).__name__})"
    return None


def checkpoints(root: Path) -> list[Path]:
    """The run's checkpoints, whole or not, oldest first."""
    return sorted(path for path in root.glob("step-*") if path.is_dir())


def newest(root: Path) -> Path | None:
    """The newest whole checkpoint; damaged ones are passed over, with a warning that says why."""
    for folder in reversed(checkpoints(root)):
        reason = validate(folder)
        if reason is None:
            return folder
        logger.warning("checkpoint %s is not whole (%s); trying the one before", folder, reason)
    return None


def prune(root: Path, config: CheckpointConfig) -> None:
    """Remove what the policy does not keep."""
    for folder in checkpoints(root)[: -config.keep_last]:
        step = int(folder.name.rpartition("-")[2])
        if not config.keep_every or step % config.keep_every:
            shutil.rmtree(folder, ignore_errors=True)


def clean(root: Path) -> None:
    """Remove what killed saves have left."""
    for folder in root.glob(".tmp-*"):
        shutil.rmtree(folder, ignore_errors=True)


def read_state(folder: Path) -> dict[str, Any]:
    """The contents of state.json.

    Raises:
        ValueError: if it cannot be read, or was written by a newer version.
    """
    try:
        state = json.loads((folder / "state.json").read_text())
        found = state["format"]
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(f"{folder} is no checkpoint: state.json cannot be read ({error})") from None
    if found != FORMAT:
        raise ValueError(f"{folder} has format {found}, this version reads {FORMAT}; use the version that wrote it")
    return state | {key: current_names(state[key]) for key in ("settings", "network") if key in state}


def resolve(path: Path) -> Path:
    """The checkpoint that a user means by a run's folder, its `checkpoints` folder, or a checkpoint itself.

    Raises:
        ValueError: if there is none, or none is whole.
    """
    if (path / "state.json").is_file():
        reason = validate(path)
        if reason:
            raise ValueError(f"checkpoint {path} is not whole: {reason}; choose another step")
        return path
    for root in (path / "checkpoints", path):
        found = newest(root)
        if found:
            return found
    raise ValueError(f"{path} holds no whole checkpoint; give a run's folder, such as runs/demo")


def read_weights(folder: Path, kind: str = "ema") -> dict[str, Tensor]:
    """All weights by name: of the `model`, or of its average, `ema`.

    Raises:
        ValueError: if the file is missing or damaged.
    """
    path = folder / f"{kind}.safetensors"
    try:
        with safe_open(path, "pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise ValueError(f"cannot read {path} ({error}); choose another checkpoint") from None


def export(folder: Path, out: Path) -> None:
    """Copy what is needed to use a model, and not what is needed to train on: weights, average, settings.

    Raises:
        ValueError: if `out` exists.
    """
    if out.exists():
        raise ValueError(f"{out} exists; choose another folder")
    temporary = out.with_name(f".tmp-{out.name}")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    names = [*(f"{kind}.safetensors" for kind in WEIGHTS), "state.json"]
    files = json.loads((folder / "manifest.json").read_text())["files"]
    for name in names:
        shutil.copyfile(folder / name, temporary / name)
        fsync_file(temporary / name)
    manifest = {"format": FORMAT, "files": {name: files[name] for name in names}}
    write_text(temporary / "manifest.json", json.dumps(manifest, indent=1))
    temporary.rename(out)
    fsync_folder(out.parent)
