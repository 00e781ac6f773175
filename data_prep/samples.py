"""Encoded videos as WebDataset samples, and the tars that hold them."""

import hashlib
import io
import json
import tarfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from fvdm.media.layouts import Source


def tar_writer(file: BinaryIO) -> Any:
    """A WebDataset writer whose output depends on the samples alone."""
    from webdataset.writer import TarWriter

    return TarWriter(file, encoder=False, mtime=0, user="", group="")


def key_of(video: int) -> str:
    """Key of a video in the shards: its number in the plan, nine digits. Names of files may hold anything."""
    return f"{video:09d}"


def make_sample(
    video: int, source: Source, fps: float | None, moments: np.ndarray, flip: np.ndarray | None
) -> dict[str, Any]:
    """The WebDataset sample of one video.

    Args:
        video: its number in the plan.
        source: the video.
        fps: its frame rate, if known.
        moments: (f 2c h w), float16, or uint16 that holds bfloat16.
        flip: the same of the mirrored frames, or None.
    """
    arrays = [moments] if flip is None else [moments, flip]
    sums = np.array([[zlib.crc32(frame.tobytes()) for frame in array] for array in arrays], "<u4").T
    digest = hashlib.sha256(b"".join(array.tobytes() for array in arrays)).hexdigest()
    about = {
        "source": source.name,
        "label": source.label,
        "fps": fps,
        "frames": len(moments),
        "sha256": digest,
    }
    sample: dict[str, Any] = {
        "__key__": key_of(video),
        "moments.npy": _npy(moments),
        "crc.npy": _npy(sums),
        "json": json.dumps(about, sort_keys=True).encode(),
    }
    return sample if flip is None else {**sample, "flip.npy": _npy(flip)}


def _npy(array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.lib.format.write_array(buffer, np.ascontiguousarray(array), allow_pickle=False)
    return buffer.getvalue()


def read_samples(path: Path) -> Iterator[dict[str, Any]]:
    """The samples in a tar, as they were written."""
    sample: dict[str, Any] = {}
    with tarfile.open(path) as tar:
        for member in tar:
            key, _, suffix = member.name.partition(".")
            if sample and sample["__key__"] != key:
                yield sample
                sample = {}
            content = tar.extractfile(member)
            assert content is not None
            sample |= {"__key__": key, suffix: content.read()}
    yield sample


def index_tar(path: Path) -> Iterator[dict[str, Any]]:
    """Reads where each video's arrays begin in a shard; one row per video, in order."""
    rows: dict[str, dict[str, Any]] = {}
    with tarfile.open(path) as tar:
        for member in tar:
            key, _, suffix = member.name.partition(".")
            row = rows.setdefault(key, {"key": key, "flip": None})
            content = tar.extractfile(member)
            assert content is not None
            if suffix == "json":
                row |= json.load(content)
            else:
                np.lib.format.read_magic(content)
                np.lib.format.read_array_header_1_0(content)
                row[suffix.removesuffix(".npy")] = member.offset_data + content.tell()
    yield from rows.values()


def file_sha256(path: Path) -> str:
    """sha256 of a file's bytes, in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
