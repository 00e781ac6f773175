"""Save a checkpoint: every rank writes its slices, rank 0 the weights by name and the manifest."""

import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from fvdm.checkpoints.find import set_aside
from fvdm.checkpoints.layout import FORMAT, MANIFEST, STATE, STEP, WEIGHTS, digest, digests
from fvdm.checkpoints.read import read_slice
from fvdm.files import atomic_write, fsync_folder, write_text


def save(
    root: Path,
    step: int,
    slices: dict[str, Tensor],
    begin: Sequence[int],
    state: dict[str, Any],
    rank: int,
    world_size: int,
    barrier: Callable[..., None],
) -> Path:
    """Write a checkpoint. Collective: every rank calls it at the same step, on one shared file system.

    Args:
        root: the run's `checkpoints` folder.
        step: optimizer steps taken.
        slices: this rank's flat part of each of `SLICES` and each parameter group, by `group_key`.
        begin: where this rank's part of each group begins in the flat vector.
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
            write_shard(folder, slices, begin, rank, world_size)
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
    """Wait for all ranks at the end; if one rank cannot write, the checkpoint fails on all."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        barrier(str(error))
        raise OSError(str(error)) from None
    barrier()


def save_tensors(tensors: dict[str, Tensor], path: Path, metadata: dict[str, str] | None = None) -> None:
    """Write a safetensors file atomically."""
    with atomic_write(path) as temporary:
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, temporary, metadata)


def write_shard(folder: Path, slices: dict[str, Tensor], begin: Sequence[int], rank: int, world_size: int) -> None:
    """Write one rank's slices, and beside them their checksum, which rank 0 puts into the manifest."""
    shard = folder / f"shard-{rank:05d}-of-{world_size:05d}.safetensors"
    save_tensors(slices, shard, {"begin": ",".join(map(str, begin))})
    write_text(folder / f"digest-{rank:05d}.json", json.dumps({shard.name: digest(shard)}))


def _finish(folder: Path, final: Path, state: dict[str, Any]) -> None:
    """Rank 0's part: the weights by name, the state, the manifest, and the rename that makes it a checkpoint."""
    files: dict[str, Any] = {}
    for path in sorted(folder.glob("digest-*.json")):
        files |= json.loads(path.read_text())
        path.unlink()
    sizes = [torch.Size(shape).numel() for shape in state["names"].values()]
    for kind, source in WEIGHTS.items():
        flat = read_slice(folder, source, range(sum(sizes))).split(sizes)
        shapes = state["names"].items()
        weights = {name: part.view(tuple(shape)) for (name, shape), part in zip(shapes, flat, strict=True)}
        save_tensors(weights, folder / f"{kind}.safetensors")
    write_text(folder / STATE, json.dumps(state, indent=1))
    files |= digests(folder / name for name in (*(f"{kind}.safetensors" for kind in WEIGHTS), STATE))
    write_text(folder / MANIFEST, json.dumps({"format": FORMAT, "files": files}, indent=1))
    fsync_folder(folder)
    if final.exists():
        set_aside(final, "its step was trained and saved once more")
    folder.rename(final)
    fsync_folder(final.parent)
