"""Format 1 of latent shards, whole videos, which is still read.

A folder of shards holds

    manifest.json              what made them: VAE, size, preprocessing; the shards with their checksums
    train-000000.tar           WebDataset tar, per video: KEY.moments.npy (f 2c h w), KEY.flip.npy (the same of the
                               flipped frames, where the layout has them), KEY.crc.npy (f, 1 or 2) crc32 of each frame,
                               KEY.json
    train-000000.index.json    where in the tar each video's arrays begin, so that single frames are read
    rejected.jsonl             the videos that could not be used, each with its reason

Moments are the VAE's mean and log-variance, unscaled, as float16, or as bfloat16 in an array of uint16.
"""

import os
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from fvdm.data.format import DTYPES, Bucket, StoredManifest, check, check_count, check_name, check_sha256

if TYPE_CHECKING:
    import pyarrow as pa

FORMAT = "fvdm-latents/1"


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
class Manifest(StoredManifest):
    """What made a folder of shards.

    Attributes:
        format: `FORMAT`.
        vae: name the VAE was loaded by.
        vae_identity: hash of its weights; shards of another identity are refused.
        normalisation: its shift and scale per channel, `Normalisation.to_dict()`.
        latent_shape: (c, h, w) of one frame's latent.
        size: side of the encoded frames, in pixels.
        dtype: `float16` or `bfloat16`.
        flip: the flipped copies are stored.
        layout: layout of the source folder.
        preprocess: the preprocessing, by name.
        classes: class names, sorted by label; empty without labels.
        rejected: number of videos that could not be used.
        shards: the shards of all splits.
        causal: false: the frames of a video were encoded one by one.
        text: none: there are no captions in this format.
    """

    causal: ClassVar[bool] = False
    text: ClassVar[None] = None

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

    @staticmethod
    def parts(data: dict[str, Any]) -> dict[str, Any]:
        """Shards, the shape of a frame and classes, of what `to_json` wrote."""
        return {
            "shards": tuple(ShardInfo(**shard) for shard in data["shards"]),
            "latent_shape": tuple(data["latent_shape"]),
            "classes": tuple(data["classes"]),
        }

    def validate(self) -> None:
        """Raises FormatError for what cannot be."""
        check(self.dtype in DTYPES, f"dtype is {self.dtype!r}, not one of {', '.join(DTYPES)}")
        check(len(self.latent_shape) == 3, f"latent_shape is {self.latent_shape!r}")
        for number in self.latent_shape:
            check_count(number, "a number of latent_shape", 1)
        for shard in self.shards:
            check_name(shard.name, ".tar")
            check_sha256(shard.sha256)
            check_sha256(shard.index_sha256)
            for name in ("samples", "frames", "bytes"):
                check_count(getattr(shard, name), f"{name} of {shard.name}")

    @property
    def buckets(self) -> tuple[Bucket, ...]:
        """One: whole videos of any length."""
        _, h, w = self.latent_shape
        return (Bucket(0, h, w, (self.size, self.size)),)


def index_name(shard: str) -> str:
    """File name of a shard's index."""
    return shard.removesuffix(".tar") + ".index.json"


def sample_table(rows: Iterable[dict[str, Any]]) -> "pa.Table":
    """The rows of the shards' indices as a table of format 2."""
    import pyarrow as pa

    from fvdm.data.index import arrow_schema

    schema = arrow_schema()
    columns: dict[str, list[Any]] = {name: [] for name in schema.names}
    for row in rows:
        values = {
            "key": str(row["key"]).encode(),
            "source": os.fsencode(str(row["source"])),
            "frames": row["frames"],
            "bucket": 0,
            "label": -1 if row["label"] is None else row["label"],
            "fps": float("nan") if row.get("fps") is None else row["fps"],
            "first": 0,
            "length": row["frames"],
            "moments": row["moments"],
            "flip": -1 if row["flip"] is None else row["flip"],
            "crc": row["crc"],
            "embeddings": -1,
            "embeddings_crc": 0,
            "tokens": b"",
        }
        for name, column in columns.items():
            column.append(values[name])
    return pa.Table.from_arrays([_column(field, columns[field.name]) for field in schema], schema=schema)


def _column(field: "pa.Field", values: list[Any]) -> "pa.Array":
    """As `pyarrow.array`, which would load pandas: 0.3 s of each process that opens shards."""
    import pyarrow as pa

    from fvdm.data.index import SCHEMA

    kind, rows = SCHEMA[field.name], len(values)
    if kind not in ("string", "binary", "list<int32>"):
        return pa.Array.from_buffers(field.type, rows, [None, pa.py_buffer(np.array(values, kind))])
    offsets = pa.py_buffer(np.cumsum([0, *map(len, values)], dtype=np.int32))
    content = pa.py_buffer(b"".join(values))
    if kind == "list<int32>":  # all are empty
        numbers = pa.Array.from_buffers(field.type.value_type, 0, [None, content])
        return pa.Array.from_buffers(field.type, rows, [None, offsets], children=[numbers])
    return pa.Array.from_buffers(field.type, rows, [None, offsets, content])
