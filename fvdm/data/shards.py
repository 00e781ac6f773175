"""Opens a folder of latent shards, of format 2 or 1, and reads clips and text embeddings from it."""

import hashlib
import io
import os
import zlib
from collections import OrderedDict
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from fvdm.data.clips import read_captions
from fvdm.data.format import ClipManifest
from fvdm.data.location import CorruptShardError, Location, MissingError, retry
from fvdm.data.opening import Shard, check_sizes, open_samples, read_manifest

if TYPE_CHECKING:
    from fvdm.media.vae import Normalisation

OPEN_FILES = 64  # shards held open at a time, per process
GAP = 256 << 10  # bytes; pieces of a shard that are no further apart are read in one go


class LatentShards:
    """All samples of one split of a folder of shards, in the order of the manifest.

    Args:
        path: as `Location` takes it.
        split: which shards, by the first word of their names.
        cache: folder for fetched files.
        cache_gb: most gigabytes of shards in that folder; 0 for no bound.

    Attributes:
        manifest: what made the shards, and their buckets.
        shards: the shards of the split, as the manifest lists them.
        samples: the table of all samples.
        first: int64 (shards + 1), row of each shard's first sample, and the number of rows.

    Raises:
        ValueError: no shards there, of another format, or of another size than the manifest says.
    """

    def __init__(self, path: str | Path, split: str = "train", cache: str | None = None, cache_gb: float = 0.0) -> None:
        """Reads the manifest and maps the tables; does not open the shards yet."""
        self.location = Location(os.fspath(path), cache, cache_gb)
        self.manifest = read_manifest(self.location.read("manifest.json"), self.location.url("manifest.json"))
        named = self.location.names
        listed: Sequence[Shard] = self.manifest.shards
        self.shards = [
            shard
            for shard in listed
            if (shard.split == split if named is None else shard.name in named) and shard.samples
        ]
        if not self.shards:
            splits = sorted({shard.split for shard in listed})
            raise ValueError(f"{str(path)!r} holds no videos of the split {split!r}; it has {', '.join(splits)}.")
        self.first = np.cumsum([0, *(shard.samples for shard in self.shards)])
        self.samples = open_samples(self.location, self.manifest, self.shards)
        if not self.location.remote:
            check_sizes(self.location, self.shards)
        self._open: OrderedDict[int, int] = OrderedDict()
        self._captions: dict[int, dict[str, tuple[str, ...]]] = {}

    def __len__(self) -> int:
        """Number of samples."""
        return len(self.samples)

    @cached_property
    def keys(self) -> list[str]:
        """Key of each sample."""
        return self.samples.table.column("key").to_pylist()

    @cached_property
    def sources(self) -> list[str]:
        """Name of the video or image of each sample."""
        return [os.fsdecode(name) for name in self.samples.table.column("source").to_pylist()]

    @cached_property
    def frames(self) -> np.ndarray:
        """int64 (samples), latent frames of each."""
        return self.samples.numbers("frames", 0, len(self)).astype(np.int64)

    @cached_property
    def labels(self) -> np.ndarray:
        """int64 (samples), class of each, -1 for none."""
        return self.samples.numbers("label", 0, len(self)).astype(np.int64)

    @property
    def classes(self) -> tuple[str, ...]:
        """Class names by label; empty without labels."""
        return self.manifest.classes

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """(c, h, w) of one latent frame, of the first bucket with samples."""
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

    def shape(self, sample: int) -> tuple[int, int, int, int]:
        """(f, c, h, w) of a sample's latents."""
        bucket = self.manifest.buckets[self.samples.number("bucket", sample)]
        return self.samples.number("frames", sample), self.latent_shape[0], bucket.height, bucket.width

    def usable(self, frames: int) -> np.ndarray:
        """int64 (buckets, shards): how many samples of each shard have at least `frames` frames, or are images."""
        buckets = self.manifest.buckets
        least = np.array([1 if bucket.frames == 1 else frames for bucket in buckets])
        found = np.zeros((len(buckets), len(self.shards)), dtype=np.int64)
        for start, length, bucket in zip(
            self.samples.starts, self.samples.chunks("frames"), self.samples.chunks("bucket"), strict=False
        ):
            first = int(np.searchsorted(self.first, start, side="right")) - 1
            last = int(np.searchsorted(self.first, start + len(length), side="left"))
            edges = np.maximum(self.first[first:last] - start, 0)  # where the shards of this piece begin in it
            for number in np.unique(bucket):
                fits = (bucket == number) & (length >= least[number])
                found[number, first:last] += np.add.reduceat(fits, edges, dtype=np.int64)
        return found

    def rows(self, shard: int, bucket: int, frames: int) -> np.ndarray:
        """The samples of a shard that `usable` counts in a bucket, ascending."""
        begin, end = int(self.first[shard]), int(self.first[shard + 1])
        least = 1 if self.manifest.buckets[bucket].frames == 1 else frames
        fits = self.samples.numbers("frames", begin, end) >= least
        return begin + np.flatnonzero(fits & (self.samples.numbers("bucket", begin, end) == bucket))

    def read(self, sample: int, frames: np.ndarray, *, flip: bool = False) -> np.ndarray:
        """Reads single frames of one sample, and checks each.

        Args:
            sample: index, 0 <= sample < len(self).
            frames: int (n), frame numbers.
            flip: read the flipped copy.

        Returns:
            float32 (n 2c h w), moments.

        Raises:
            CorruptShardError: the bytes are not those that were written; names the shard and the sample.
            UnreachableError: disk, network or server do not give the bytes.
            ValueError: flip, and no flipped copies are stored.
        """
        if flip and not self.manifest.flip:
            raise ValueError(f"The shards in {self.location.path!r} hold no flipped copies: encode with --flip.")
        total, c, h, w = self.shape(sample)
        size = 2 * c * h * w * 2
        shard = self._shard(sample)
        start = self.samples.number("flip" if flip else "moments", sample)
        columns = 2 if self.manifest.flip else 1
        spans = [(self.samples.number("crc", sample), 4 * columns * total)]
        sums, *data = self._read(shard, spans + [(start + int(frame) * size, size) for frame in frames])
        expected = np.frombuffer(sums, "<u4").reshape(-1, columns)[:, int(flip)]
        for piece, frame in zip(data, frames, strict=True):
            if zlib.crc32(piece) != expected[frame]:
                raise self._corrupt(shard, sample, f"frame {frame} of ")
        return to_float32(b"".join(data), self.manifest.dtype).reshape(len(frames), 2 * c, h, w)

    def embedding(self, sample: int, caption: int) -> np.ndarray:
        """float32 (n e): the text embedding of one of a sample's captions; of the empty prompt, if it has none.

        Raises:
            CorruptShardError: the bytes are not those that were written.
            UnreachableError: disk, network or server do not give the bytes.
        """
        assert self.manifest.text is not None
        tokens = self.samples.value("tokens", sample)
        if not tokens:
            return self.empty_prompt
        shard, width = self._shard(sample), self.manifest.text.width
        span = (self.samples.number("embeddings", sample), sum(tokens) * width * 2)
        (data,) = self._read(shard, [span])
        if zlib.crc32(data) != self.samples.number("embeddings_crc", sample):
            raise self._corrupt(shard, sample, "the text embeddings of ")
        begin = sum(tokens[:caption])
        return to_float32(bytes(data), self.manifest.dtype).reshape(-1, width)[begin : begin + tokens[caption]]

    def captions(self, sample: int) -> tuple[str, ...]:
        """The texts that were stored with a sample; those of its shard are read together. None in format 1."""
        if not isinstance(self.manifest, ClipManifest):
            return ()
        shard = self._shard(sample)
        if shard not in self._captions:
            with os.fdopen(os.dup(self._file(shard)), "rb") as file:
                file.seek(0)
                self._captions[shard] = read_captions(file)
        return self._captions[shard][self.keys[sample]]

    @cached_property
    def empty_prompt(self) -> np.ndarray:
        """float32 (n e): the text embedding of the empty prompt."""
        assert self.manifest.text is not None
        name = self.manifest.text.empty_prompt
        data = self.location.read(name)
        if hashlib.sha256(data).hexdigest() != self.manifest.text.empty_prompt_sha256:
            raise CorruptShardError(
                f"{self.location.url(name)!r} is not the file that the manifest lists: copy it again."
            )
        array = np.load(io.BytesIO(data), allow_pickle=False)
        return to_float32(array.tobytes(), self.manifest.dtype).reshape(-1, self.manifest.text.width)

    def _shard(self, sample: int) -> int:
        return int(np.searchsorted(self.first, sample, side="right")) - 1

    def _read(self, shard: int, spans: list[tuple[int, int]]) -> list[memoryview]:
        """The bytes at each (offset, size); what lies close together is read in one go."""
        groups: list[list[int]] = []
        end = 0
        for k in sorted(range(len(spans)), key=spans.__getitem__):
            offset, size = spans[k]
            if groups and offset - end <= GAP:
                groups[-1].append(k)
                end = max(end, offset + size)
            else:
                groups.append([k])
                end = offset + size
        found = [memoryview(b"")] * len(spans)
        for group in groups:
            begin, end = spans[group[0]][0], max(sum(spans[k]) for k in group)
            data = memoryview(self._pread(shard, begin, end - begin))
            for k in group:
                found[k] = data[spans[k][0] - begin :][: spans[k][1]]
        return found

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
            raise self._corrupt(shard, None, str(error)) from None
        if len(data) != size:
            raise self._corrupt(shard, None, "it ends too early")
        return data

    def _file(self, shard: int) -> int:
        """An open file of the shard; the least recently used one is closed when there are too many."""
        if shard in self._open:
            self._open.move_to_end(shard)
            return self._open[shard]
        info = self.shards[shard]
        self._open[shard] = self.location.open(info.name, info.sha256, info.bytes)
        if len(self._open) > OPEN_FILES:
            os.close(self._open.popitem(last=False)[1])
        return self._open[shard]

    def close_all_but(self, shards: frozenset[int]) -> None:
        """Closes the files of other shards, so that what is removed from the cache leaves the disk."""
        for shard in self._open.keys() - shards:
            os.close(self._open.pop(shard))

    def _corrupt(self, shard: int, sample: int | None, what: str) -> CorruptShardError:
        if sample is not None:
            what += f"{self.samples.value('source', sample)!a} ({self.samples.value('key', sample)})"
        url = self.location.url(self.shards[shard].name)
        return CorruptShardError(
            f"The shard {url!r} is corrupt: {what}. Copy it again or encode its videos again, or leave such "
            "samples out with data.corrupt=skip."
        )

    def __getstate__(self) -> dict[str, Any]:
        """Open files and mapped tables stay in the process that opened them."""
        return {**self.__dict__, "_open": OrderedDict(), "samples": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Maps the tables again."""
        self.__dict__.update(state)
        self.samples = open_samples(self.location, self.manifest, self.shards)


def to_float32(data: bytes, dtype: str) -> np.ndarray:
    """float32 (n) from the stored bytes of float16 or bfloat16 numbers. (Tenfold the speed of numpy's astype.)"""
    return torch.frombuffer(bytearray(data), dtype=getattr(torch, dtype)).float().numpy()
