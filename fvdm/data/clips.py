"""Samples of format 2 as they are written: one WebDataset sample per clip, and its row of the table of samples."""

import hashlib
import io
import json
import os
import tarfile
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from fvdm.data.format import Clip, Window


def make_clip(
    key: str,
    clip: Clip,
    moments: np.ndarray,
    flip: np.ndarray | None = None,
    embeddings: Sequence[np.ndarray] = (),
) -> dict[str, Any]:
    """The WebDataset sample of one clip, for `webdataset.TarWriter(..., encoder=False)`.

    Args:
        key: letters, digits and dashes, unique in the split; samples come back in the order of the shards.
        clip: what is known of it; `frames`, `tokens` and `sha256` are filled in here.
        moments: (f 2c h w), float16, or uint16 that holds bfloat16.
        flip: the same of the horizontally flipped frames, or None.
        embeddings: (n e) of each caption in the same 16 bits, trimmed to its tokens.

    Returns:
        `{"__key__": key, "moments.npy": bytes, ...}`.
    """
    assert moments.ndim == 4, moments.shape
    assert moments.dtype in (np.float16, np.uint16), moments.dtype
    assert flip is None or flip.shape == moments.shape
    assert not embeddings or len(embeddings) == len(clip.captions)
    copies = [moments] if flip is None else [moments, flip]
    sums = np.array([[zlib.crc32(frame.tobytes()) for frame in copy] for copy in copies], "<u4").T
    text = np.concatenate(embeddings) if len(embeddings) else None
    arrays = [*copies, *([] if text is None else [text])]
    digest = hashlib.sha256(b"".join(array.tobytes() for array in arrays)).hexdigest()
    clip = replace(clip, frames=len(moments), tokens=tuple(len(text) for text in embeddings), sha256=digest)
    sample: dict[str, Any] = {
        "__key__": key,
        "moments.npy": npy(moments),
        "crc.npy": npy(sums),
        "json": json.dumps(asdict(clip), sort_keys=True).encode(),
    }
    sample |= {} if flip is None else {"flip.npy": npy(flip)}
    return sample if text is None else sample | {"embeddings.npy": npy(text)}


def npy(array: np.ndarray) -> bytes:
    """A `.npy` file of an array."""
    buffer = io.BytesIO()
    np.lib.format.write_array(buffer, np.ascontiguousarray(array), allow_pickle=False)
    return buffer.getvalue()


def read_clip(data: bytes) -> Clip:
    """What KEY.json says."""
    fields = json.loads(data)
    lists = {name: tuple(fields[name]) for name in ("captions", "tokens")}
    return Clip(**fields | lists | {"window": Window(**fields["window"])})


def read_captions(shard: BinaryIO) -> dict[str, tuple[str, ...]]:
    """The captions of every sample of a shard, by its key."""
    found = {}
    with tarfile.open(fileobj=shard) as tar:
        for member in tar:
            key, _, suffix = member.name.partition(".")
            if suffix == "json" and (content := tar.extractfile(member)):
                found[key] = read_clip(content.read()).captions
    return found


def index_shard(path: Path) -> Iterator[dict[str, Any]]:
    """Rows of the table for one shard, in the order of the tar.

    Args:
        path: a tar of samples that `make_clip` made.
    """
    rows: dict[str, dict[str, Any]] = {}
    with tarfile.open(path) as tar:
        for member in tar:
            key, _, suffix = member.name.partition(".")
            row = rows.setdefault(key, {"key": key, "flip": -1, "embeddings": -1, "embeddings_crc": 0})
            content = tar.extractfile(member)
            assert content is not None
            if suffix == "json":
                row |= _row(read_clip(content.read()))
                continue
            np.lib.format.read_magic(content)
            np.lib.format.read_array_header_1_0(content)
            row[suffix.removesuffix(".npy")] = member.offset_data + content.tell()
            if suffix == "embeddings.npy":
                row["embeddings_crc"] = zlib.crc32(content.read())
    yield from rows.values()


def _row(clip: Clip) -> dict[str, Any]:
    return {
        "source": os.fsencode(clip.source),
        "frames": clip.frames,
        "bucket": clip.bucket,
        "label": -1 if clip.label is None else clip.label,
        "fps": float("nan") if clip.fps is None else clip.fps,
        "first": clip.window.first,
        "length": clip.window.frames,
        "tokens": list(clip.tokens),
    }
