"""Encoded videos as WebDataset samples, and the tars that hold them."""

import hashlib
import io
import json
import shutil
import tarfile
import tempfile
import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import IO, Any, BinaryIO, cast

import numpy as np

from fvdm.data.clips import npy
from fvdm.data.format import Clip
from fvdm.media.layouts import Source

SPOOL = 8 * 2**20  # bytes of a video's moments that stay in memory before they go to a file
BLOCK = 2**20  # bytes that are read at once


def tar_writer(file: BinaryIO) -> Any:
    """A WebDataset writer whose output depends on the samples alone."""
    from webdataset.writer import TarWriter

    return TarWriter(file, encoder=False, mtime=0, user="", group="")


def key_of(video: int) -> str:
    """Key of a video in the shards: its number in the plan, nine digits. Names of files may hold anything."""
    return f"{video:09d}"


def clip_key(video: int, clip: int) -> str:
    """Key of one clip of a video: that of the video, and the clip's number in it, six digits."""
    return f"{key_of(video)}-{clip:06d}"


def video_key(key: str) -> str:
    """Key of the video of a sample, whose own key may be that of a clip."""
    return key.partition("-")[0]


class Array:
    """A `.npy` file of an array that grows in a temporary file: a long video takes no memory.

    It is read like a file, from the header to the last number.
    """

    def __init__(self, folder: Path | None = None, spool: int | None = None) -> None:
        """An empty array; the file has no name, and ends with the process, however that ends.

        Args:
            folder: where the file is.
            spool: bytes that stay in memory before there is a file.
        """
        self.file = _temporary_file(folder, SPOOL if spool is None else spool)
        self.header: IO[bytes] = io.BytesIO()
        self.shape: tuple[int, ...] = (0,)
        self.dtype = np.dtype(np.float16)

    def append(self, array: np.ndarray) -> None:
        """Adds to the first axis."""
        self.file.write(np.ascontiguousarray(array).data)
        self.shape, self.dtype = (self.shape[0] + len(array), *array.shape[1:]), array.dtype

    def rows(self, begin: int, end: int) -> np.ndarray:
        """A part of the first axis."""
        size = int(np.prod(self.shape[1:])) * self.dtype.itemsize
        self.file.seek(begin * size)
        data = bytearray(self.file.read((end - begin) * size))
        return np.frombuffer(data, self.dtype).reshape(-1, *self.shape[1:])

    def blocks(self) -> Iterator[bytes]:
        """The numbers, in blocks of bytes."""
        self.file.seek(0)
        while block := self.file.read(BLOCK):
            yield block

    def rewind(self) -> int:
        """Makes ready to be read from the start; returns the size of the `.npy` file in bytes."""
        header = {"descr": np.lib.format.dtype_to_descr(self.dtype), "fortran_order": False, "shape": self.shape}
        self.header = io.BytesIO()
        np.lib.format.write_array_header_1_0(self.header, header)
        size = self.header.tell() + self.file.seek(0, io.SEEK_END)
        self.header.seek(0)
        self.file.seek(0)
        return size

    def read(self, size: int) -> bytes:
        """The next bytes of the `.npy` file, up to `size`."""
        start = self.header.read(size)
        return start + self.file.read(size - len(start))

    def close(self) -> None:
        """Frees the file."""
        self.file.close()


class VideoMoments:
    """The moments of a video that is being encoded, with a checksum of each frame.

    Attributes:
        arrays: those of the frames, and of the flipped copies if there are any.
    """

    def __init__(self, copies: int, folder: Path | None = None) -> None:
        """`copies` is 2 with flipped copies, else 1; `folder` is where temporary files go."""
        self.arrays = [Array(folder) for _ in range(copies)]
        self.sums: list[list[int]] = []

    def append(self, moments: np.ndarray) -> None:
        """Adds the moments (copies n 2c h w) of the next frames, float16, or uint16 that holds bfloat16."""
        for array, part in zip(self.arrays, moments, strict=True):
            array.append(part)
        self.sums += [[zlib.crc32(copy[frame].tobytes()) for copy in moments] for frame in range(moments.shape[1])]

    def sample(self, video: int, source: Source, fps: float | None) -> dict[str, Any]:
        """The WebDataset sample; `write_sample` takes it.

        Args:
            video: its number in the plan.
            source: the video.
            fps: its frame rate, if known.
        """
        metadata = {
            "source": source.name,
            "label": source.label,
            "fps": fps,
            "frames": len(self.sums),
            "sha256": self._sha256(),
        }
        return self._sample(key_of(video), metadata)

    def clip(self, key: str, clip: Clip, embeddings: Sequence[np.ndarray]) -> dict[str, Any]:
        """The sample of format 2, as `fvdm.data.clips.make_clip` makes it of arrays.

        Args:
            key: of the sample.
            clip: what is known of it; `frames`, `tokens` and `sha256` are filled in here.
            embeddings: (n e) of each caption, in 16 bits.
        """
        text = np.concatenate(embeddings) if len(embeddings) else None
        digest = self._sha256(b"" if text is None else text.tobytes())
        tokens = tuple(len(embedding) for embedding in embeddings)
        clip = replace(clip, frames=len(self.sums), tokens=tokens, sha256=digest)
        sample = self._sample(key, asdict(clip))
        return sample if text is None else sample | {"embeddings.npy": npy(text)}

    def _sha256(self, more: bytes = b"") -> str:
        digest = hashlib.sha256()
        for array in self.arrays:
            for block in array.blocks():
                digest.update(block)
        digest.update(more)
        return digest.hexdigest()

    def _sample(self, key: str, metadata: dict[str, Any]) -> dict[str, Any]:
        return {
            "__key__": key,
            **dict(zip(("moments.npy", "flip.npy"), self.arrays, strict=False)),
            "crc.npy": npy(np.array(self.sums, "<u4")),
            "json": json.dumps(metadata, sort_keys=True).encode(),
        }

    def close(self) -> None:
        """Frees the temporary files."""
        for array in self.arrays:
            array.close()


def make_sample(
    video: int, source: Source, fps: float | None, moments: np.ndarray, flip: np.ndarray | None
) -> dict[str, Any]:
    """The WebDataset sample of one video whose moments are at hand.

    Args:
        video: its number in the plan.
        source: the video.
        fps: its frame rate, if known.
        moments: (f 2c h w), float16, or uint16 that holds bfloat16.
        flip: the same of the flipped frames, or None.
    """
    arrays = [moments] if flip is None else [moments, flip]
    stored = VideoMoments(len(arrays))
    stored.append(np.stack(arrays))
    return stored.sample(video, source, fps)


class Part:
    """The samples of one video, as a tar in a temporary file that grows: many clips take no memory."""

    def __init__(self, folder: Path) -> None:
        """An empty one; `folder` is where the file is."""
        self.file = _temporary_file(folder, SPOOL)
        self.writer = tar_writer(cast(BinaryIO, self.file))

    def add(self, sample: dict[str, Any]) -> None:
        """Adds a sample; `write_sample` takes it."""
        write_sample(self.writer, sample)

    def copy_to(self, file: BinaryIO) -> None:
        """Writes the tar to a file. Nothing can be added afterwards."""
        self.writer.close()
        self.file.seek(0)
        shutil.copyfileobj(self.file, file, BLOCK)

    def close(self) -> None:
        """Frees the temporary file."""
        self.file.close()


def _temporary_file(folder: Path | None, spool: int) -> IO[bytes]:
    return cast(IO[bytes], tempfile.SpooledTemporaryFile(spool, dir=str(folder) if folder else None))


def write_sample(writer: Any, sample: dict[str, Any]) -> None:
    """Writes a sample as WebDataset's writer does, which takes bytes alone, also where an array is in a file."""
    for name in sorted(name for name in sample if name != "__key__"):
        value = sample[name]
        info = tarfile.TarInfo(f"{sample['__key__']}.{name}")
        info.size = value.rewind() if isinstance(value, Array) else len(value)
        info.mtime, info.mode, info.uname, info.gname = writer.mtime, writer.mode, writer.user, writer.group
        writer.tarstream.addfile(info, value if isinstance(value, Array) else io.BytesIO(value))


def copy_members(tar: tarfile.TarFile, members: Iterable[tarfile.TarInfo], writer: Any) -> None:
    """Copies members of a tar as they are, in little memory."""
    for member in members:
        writer.tarstream.addfile(member, tar.extractfile(member))


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
