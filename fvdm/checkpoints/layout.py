"""What a checkpoint's folder holds, and whether all of it is there.

    checkpoints/step-00001000/
      manifest.json                      every file with its size and SHA-256; written last, so it completes the folder
      state.json                         step, position in the data, layout of the flat vector, the settings
      shard-00000-of-00002.safetensors   rank 0's slice of master weights, Adam moments and EMA, float32
      model.safetensors ema.safetensors  all trained weights by name, float32, for use

The flat vector is made of the trained parameters only, one parameter group of the optimizer after the other. A rank
owns one slice of each group: `master` of the first group, `master.1` of the second; the metadata of a shard says where
each begins. Nothing is pickled. A folder gets its name by a rename when it is complete, so a killed save leaves only a
`.tmp-` folder.
"""

import hashlib
import json
import os
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

FORMAT = 1
STEP = "step-{:08d}"
SLICES = ("master", "exp_avg", "exp_avg_sq", "ema")
WEIGHTS = {"model": "master", "ema": "ema"}
MANIFEST = "manifest.json"
STATE = "state.json"


def group_key(name: str, group: int) -> str:
    """The name in a shard of the slice `name` of the group-th parameter group."""
    return f"{name}.{group}" if group else name


def digest(path: Path) -> dict[str, Any]:
    """Size and SHA-256 of a file, as the manifest lists them."""
    with path.open("rb") as file:
        return {"bytes": path.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}


def digests(paths: Iterable[Path]) -> dict[str, dict[str, Any]]:
    """`digest` of files by name, several at a time."""
    paths = list(paths)
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        return dict(zip([path.name for path in paths], pool.map(digest, paths), strict=True))


def read_manifest(folder: Path) -> dict[str, dict[str, Any]]:
    """Size and SHA-256 of each file of a checkpoint.

    Raises:
        ValueError: if the manifest cannot be read; says so in a few words.
    """
    try:
        files: dict[str, dict[str, Any]] = json.loads((folder / MANIFEST).read_text())["files"]
        assert all({"bytes", "sha256"} <= entry.keys() for entry in files.values())
    except (OSError, ValueError, KeyError, TypeError, AttributeError, AssertionError) as error:
        raise ValueError(f"{MANIFEST} cannot be read ({type(error).__name__})") from None
    return files


def validate(folder: Path, checksums: bool = False) -> str | None:
    """Why a checkpoint is corrupt, in a few words; None when it is complete.

    Args:
        folder: the checkpoint.
        checksums: read every file and compare its SHA-256, not only its size.
    """
    try:
        files = read_manifest(folder)
        for name, entry in files.items():
            path = folder / name
            if not path.is_file():
                return f"{name} is missing"
            if path.stat().st_size != entry["bytes"]:
                return f"{name} has {path.stat().st_size} bytes instead of {entry['bytes']}"
        return checksum_mismatch(folder, files) if checksums else None
    except (ValueError, OSError) as error:
        return str(error)


def checksum_mismatch(folder: Path, names: Iterable[str]) -> str | None:
    """The first of the named files whose SHA-256 is not the manifest's, in a few words; None where all are right.

    Raises:
        OSError: if a file cannot be read.
        ValueError: if the manifest cannot be read.
    """
    files = read_manifest(folder)
    found = digests(folder / name for name in names)
    return next((f"the checksum of {name} is wrong" for name, entry in found.items() if entry != files[name]), None)


def training_files(folder: Path) -> list[str]:
    """The files of a complete checkpoint that a training run resumes from, the largest first."""
    files = read_manifest(folder)
    names = [name for name in files if name == STATE or name.startswith("shard-")]
    return sorted(names, key=lambda name: (-files[name]["bytes"], name))
