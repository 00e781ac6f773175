"""The format of latent shards, and reading single frames from them.

A folder of shards holds

    manifest.json              what made them: VAE, size, preprocessing; the shards with their checksums
    train-000000.tar           WebDataset tar, per video: KEY.moments.npy (f 2c h w), KEY.flip.npy (the
    mirrored
                               twin, where the layout has one), KEY.crc.npy (f, 1 or 2) crc32 of each frame,
                               KEY.json
    train-000000.index.json    where in the tar each video's arrays begin, so that single frames are read
    rejected.jsonl             the videos that could not be used, each with its reason

Moments are the VAE's raw mean and log-variance, unscaled, as float16, or as bfloat16 in an array of uint16.
"""

import hashlib
import json
import os
import zlib
from collections import OrderedDict
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from fvdm.data.location import CorruptShardError, Location, MissingError, retry

if TYPE_CHECKING:
    from fvdm.media.vae import Normalisation

FORMAT = "fvdm-latents/1"
OPEN_FILES = 64  # shards held open at a time, per process


@dataclass(frozen=True)
class ShardInfo:
    """One shard, as the manifest lists it: file name, split, counts, size in bytes, sha256 of tar and index."""

    name: str
    split: str
    samples: int
    frames: int
    bytes: int
    sha256: str
    index_sha256: str


@dataclass(frozen=True)
class Manifest:
    """What made a folder of shards.

    Attributes:
        format: `FORMAT`.
        vae: name the VAE was loaded by.
        vae_identity: hash of its weights; shards of another identity are refused.
        normalisation: its shift and scale per channel, `Normalisation.to_dict()`.
        latent_shape: (c, h, w) of one frame's latent.
        size: side of the encoded frames, in pixels.
        dtype: `float16` or `bfloat16`.
        flip: the mirrored twins are stored.
        layout: layout of the source folder.
        preprocess: the preprocessing, by name.
        classes: class names, sorted by label; empty without labels.
        rejected: number of videos that could not be used.
        shards: the shards of all splits.
    """

    format: str
    vae: str
    vae_identity: str
    normalisation: dict[str, Any]
    latent_shape: tuple[int, int, int]
    size: int
    dtype: str
    flip: bool
    layout: str
    preprocess: dict[str, Any]
    classes: tuple[str, ...]
    rejected: int
    shards: tuple[ShardInfo, ...]

    def to_json(self) -> str:
        """JSON text, the same for the same manifest."""
        return json.dumps(asdict(self), indent=1, sort_keys=True) + "\n"

    @classmethod
    def from_json(cls, text: str | bytes, where: str) -> "Manifest":
        """Reads a manifest; `where` names it in errors.

        Raises:
            ValueError: not a manifest, or of another format version.
        """
        try:
            data = json.loads(text)
            found = data["format"]
            if found == FORMAT:
                data["shards"] = tuple(ShardInfo(**shard) for shard in data["shards"])
                data["latent_shape"] = tuple(data["latent_shape"])
                data["classes"] = tuple(data["classes"])
                return cls(**data)
        except (ValueError, TypeError, KeyError):
            raise ValueError(f"{where} is not a manifest of latent shards: encode the videos again.") from None
        raise ValueError(
            f"{where} is of format {found!r}, this version reads {FORMAT!r}: encode the videos again, "
            "or use the version of fvdm that made them."
        )


class LatentShards:
    """All videos of one split of a folder of shards, in the order of the manifest.

    Args:
        path: as `Location` takes it.
        split: which shards, by the first word of their names.
        cache: folder for fetched files.

    Attributes:
        manifest: what made the shards.
        keys: key of each video.
        sources: name of each video's file.
        frames: int64 (videos) number of frames of each.
        labels: int64 (videos) class of each, -1 for none.

    Raises:
        ValueError: no shards there, of another format, or of another size than the manifest says.
    """

    def __init__(self, path: str | Path, split: str = "train", cache: str | None = None) -> None:
        """Reads the manifest and the indices."""
        self.location = Location(os.fspath(path), cache)
        self.manifest = Manifest.from_json(self.location.read("manifest.json"), self.location.url("manifest.json"))
        named = self.location.names
        self.shards = [
            shard
            for shard in self.manifest.shards
            if (shard.split == split if named is None else shard.name in named) and shard.samples
        ]
        if not self.shards:
            splits = sorted({shard.split for shard in self.manifest.shards})
            raise ValueError(f"{str(path)!r} holds no videos of the split {split!r}; it has {', '.join(splits)}.")
        rows = [(number, row) for number, shard in enumerate(self.shards) for row in self._index(shard)]
        self.keys = [str(row["key"]) for _, row in rows]
        self.sources = [str(row["source"]) for _, row in rows]
        self.frames = np.array([row["frames"] for _, row in rows], dtype=np.int64)
        self.labels = np.array([-1 if row["label"] is None else row["label"] for _, row in rows], dtype=np.int64)
        self._shard = np.array([number for number, _ in rows], dtype=np.int64)
        self._offsets = np.array([[row["moments"], row["flip"] or 0, row["crc"]] for _, row in rows], dtype=np.int64)
        self._open: OrderedDict[int, int] = OrderedDict()

    def _index(self, shard: ShardInfo) -> list[dict[str, Any]]:
        name = index_name(shard.name)
        path = self.location.local(name, shard.index_sha256)
        try:
            data = retry(path.read_bytes, str(path))
        except MissingError as error:
            raise CorruptShardError(f"Cannot read the index {str(path)!r}: {error}. Copy it again.") from None
        if hashlib.sha256(data).hexdigest() != shard.index_sha256:
            raise CorruptShardError(
                f"{self.location.url(name)!r} is not the file that the manifest lists: copy it again."
            )
        if not self.location.remote:
            self._check_size(shard)
        return list(json.loads(data)["samples"])

    def _check_size(self, shard: ShardInfo) -> None:
        url = self.location.url(shard.name)
        try:
            size = retry(lambda: os.stat(url).st_size, url)
        except MissingError as error:
            raise CorruptShardError(f"Cannot read the shard {url!r}: {error}.") from None
        if size != shard.bytes:
            raise CorruptShardError(
                f"The shard {url!r} has {size} bytes, the manifest says {shard.bytes}: copy it again."
            )

    def __len__(self) -> int:
        """Number of videos."""
        return len(self.keys)

    @property
    def classes(self) -> tuple[str, ...]:
        """Class names by label; empty without labels."""
        return self.manifest.classes

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """(c, h, w) of one frame's latent."""
        return self.manifest.latent_shape

    @property
    def normalisation(self) -> "Normalisation":
        """Shift and scale of the VAE that made the shards."""
        from fvdm.media.vae import Normalisation

        return Normalisation.from_dict(self.manifest.normalisation)

    def require(self, *, vae_identity: str | None = None, latent_shape: tuple[int, int, int] | None = None) -> None:
        """Refuses shards of another VAE or size.

        Raises:
            ValueError: what differs, and what to do.
        """
        made = self.manifest
        if vae_identity is not None and vae_identity != made.vae_identity:
            raise ValueError(
                f"The shards in {self.location.path!r} were made with the VAE {made.vae!r} "
                f"({made.vae_identity}), not with {vae_identity}: encode the videos again, or use that VAE."
            )
        if latent_shape is not None and tuple(latent_shape) != made.latent_shape:
            raise ValueError(
                f"The shards in {self.location.path!r} hold latents of shape {made.latent_shape} (frames of "
                f"{made.size} pixels), not {tuple(latent_shape)}: encode the videos again, or change the model's input."
            )

    def read(self, video: int, frames: np.ndarray, *, flip: bool = False) -> np.ndarray:
        """Reads single frames of one video, and checks each.

        Args:
            video: index, 0 <= video < len(self).
            frames: int (n), frame numbers.
            flip: read the mirrored twin.

        Returns:
            float32 (n 2c h w), raw moments.

        Raises:
            CorruptShardError: the bytes are not those that were written; names the shard and the video.
            UnreachableError: disk, network or server do not give the bytes.
            ValueError: flip, and no mirrored twins are stored.
        """
        if flip and not self.manifest.flip:
            raise ValueError(f"The shards in {self.location.path!r} hold no mirrored twins: encode with --flip.")
        c, h, w = self.latent_shape
        size = 2 * c * h * w * 2
        shard = int(self._shard[video])
        moments, mirrored, crc = (int(offset) for offset in self._offsets[video])
        columns = 2 if self.manifest.flip else 1
        sums = np.frombuffer(self._pread(shard, crc, 4 * columns * int(self.frames[video])), "<u4").reshape(-1, columns)
        start = mirrored if flip else moments
        contiguous = len(frames) > 1 and bool((np.diff(frames) == 1).all())
        if contiguous:
            data = self._pread(shard, start + int(frames[0]) * size, len(frames) * size)
        else:
            data = b"".join(self._pread(shard, start + int(frame) * size, size) for frame in frames)
        for row, frame in enumerate(frames):
            if zlib.crc32(data[row * size : (row + 1) * size]) != sums[frame, int(flip)]:
                raise self._corrupt(shard, f"frame {frame} of {self.sources[video]!a} ({self.keys[video]})")
        return to_float32(data, self.manifest.dtype).reshape(len(frames), 2 * c, h, w)

    def _pread(self, shard: int, offset: int, size: int) -> bytes:
        def read() -> bytes:
            try:
                return os.pread(self._file(shard), size, offset)
            except OSError:
                if shard in self._open:  # a stale handle stays stale
                    os.close(self._open.pop(shard))
                raise

        try:
            data = retry(read, self.location.url(self.shards[shard].name))
        except MissingError as error:
            raise self._corrupt(shard, str(error)) from None
        if len(data) != size:
            raise self._corrupt(shard, "it ends too early")
        return data

    def _file(self, shard: int) -> int:
        """An open file of the shard; the least recently used one is closed when there are too many."""
        if shard in self._open:
            self._open.move_to_end(shard)
            return self._open[shard]
        info = self.shards[shard]
        self._open[shard] = os.open(self.location.local(info.name, info.sha256), os.O_RDONLY)
        if len(self._open) > OPEN_FILES:
            os.close(self._open.popitem(last=False)[1])
        return self._open[shard]

    def _corrupt(self, shard: int, what: str) -> CorruptShardError:
        url = self.location.url(self.shards[shard].name)
        return CorruptShardError(
            f"The shard {url!r} is corrupt: {what}. Copy it again or encode its videos again, or leave such "
            "samples out with data.corrupt=skip."
        )

    def __getstate__(self) -> dict[str, Any]:
        """Open files stay in the process that opened them."""
        return {**self.__dict__, "_open": OrderedDict()}


def index_name(shard: str) -> str:
    """File name of a shard's index."""
    return shard.removesuffix(".tar") + ".index.json"


def to_float32(data: bytes, dtype: str) -> np.ndarray:
    """float32 (n) from the stored bytes of float16 or bfloat16 numbers. (Tenfold the speed of numpy's astype.)"""
    return torch.frombuffer(bytearray(data), dtype=getattr(torch, dtype)).float().numpy()
