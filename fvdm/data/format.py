"""The format of latent shards, `fvdm-latents/2`: what a folder of them holds, as dataclasses.

A folder of shards holds

    manifest.json              what made the shards, as `ClipManifest` describes it
    train-000000.tar           WebDataset tar, per sample (a clip of video, or one image):
                                 KEY.moments.npy     (f 2c h w) mean and log-variance of the VAE, unscaled
                                 KEY.flip.npy        the same of the horizontally flipped frames; where asked for
                                 KEY.crc.npy         uint32 (f, 1 or 2) crc32 of each latent frame, flipped copy second
                                 KEY.embeddings.npy  (n e) text embeddings of all captions, one after the other, each
                                                     trimmed to its tokens; where there are captions
                                 KEY.json            source, window, fps, label, captions, tokens, ... (see `Clip`)
    train.index.arrow          table of all samples of a split, an uncompressed Arrow file that is memory-mapped
    empty_prompt.npy           (n e) text embeddings of the empty prompt; where there are captions
    rejected.jsonl             the videos that could not be used, each with its reason

Arrays of 16 bits are float16, or bfloat16 in an array of uint16: the manifest says which. The table holds what the
loader needs (see `fvdm.data.clips.SCHEMA`), among it where in the tar each array begins, so that training reads single
frames. Format `fvdm-latents/1` (whole videos, one table in JSON per shard) is still read: see `fvdm.data.shards`.
"""

import json
import math
import re
from abc import ABC, abstractmethod
from dataclasses import asdict, dataclass, field
from typing import Any, Self

CLIP_FORMAT = "fvdm-latents/2"
EMPTY_PROMPT = "empty_prompt.npy"
DTYPES = ("float16", "bfloat16")
FILE_NAME = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]*")
SHA256 = re.compile(r"[0-9a-f]{64}")


class FormatError(ValueError):
    """What a manifest holds is not what the format allows; the message says what, without the file's name."""


def check(ok: bool, what: str) -> None:
    """Raises FormatError(what) unless `ok`."""
    if not ok:
        raise FormatError(what)


def check_name(name: Any, suffix: str = "") -> None:
    """A name from a manifest becomes part of a path: refuses folders, `..` and hidden files.

    Raises:
        FormatError: it is not a plain file name that ends with `suffix`.
    """
    ok = isinstance(name, str) and FILE_NAME.fullmatch(name) is not None and name.endswith(suffix)
    check(ok, f"{name!r} is not a plain file name{suffix and ' that ends with ' + suffix}")


def check_sha256(digest: Any) -> None:
    """A checksum from a manifest becomes a file name of the cache: refuses all but 64 hexadecimal digits.

    Raises:
        FormatError: it is something else.
    """
    check(isinstance(digest, str) and SHA256.fullmatch(digest) is not None, f"{digest!r} is not a SHA-256 checksum")


def check_count(value: Any, what: str, least: int = 0) -> None:
    """Raises FormatError unless `value` is an integer of at least `least`; `what` names it."""
    check(isinstance(value, int) and not isinstance(value, bool) and value >= least, f"{what} is {value!r}")


def check_file(file: "ClipShard | IndexInfo", suffix: str, counted: str) -> None:
    """A file that a manifest lists, with its size, its checksum and the number of what it holds.

    Args:
        file: its entry.
        suffix: that its name ends with.
        counted: the field of the entry that holds the number.

    Raises:
        FormatError: the entry is not of such a file.
    """
    check_name(file.name, suffix)
    check_sha256(file.sha256)
    check_count(getattr(file, counted), f"the number of {counted} of {file.name}", 1)
    check_count(file.bytes, f"the size of {file.name}", 1)


def index_file(split: str) -> str:
    """File name of a split's table of samples."""
    return f"{split}.index.arrow"


@dataclass(frozen=True)
class Window:
    """The pixel frames that a clip was encoded from.

    Attributes:
        first: number of the first one, on the even grid of `Clip.fps`.
        frames: how many; 1 for an image.
    """

    first: int
    frames: int


@dataclass(frozen=True)
class Clip:
    """What KEY.json says of a sample, beside its arrays.

    Attributes:
        source: name of the video or image, relative to the folder that was encoded.
        window: which of its pixel frames.
        fps: pixel frames per second; None where unknown, as for an image.
        label: class, an index of the manifest's `classes`; None without.
        bucket: which shape, an index of the manifest's `buckets`.
        frames: latent frames.
        captions: texts that describe the clip; empty for the empty prompt.
        tokens: length of each caption's embedding; empty where no text encoder was used.
        sha256: of the bytes of the moments, then of the flipped copy, then of the embeddings.
    """

    source: str
    window: Window
    fps: float | None
    label: int | None
    bucket: int
    frames: int
    captions: tuple[str, ...] = ()
    tokens: tuple[int, ...] = ()
    sha256: str = ""


@dataclass(frozen=True)
class Bucket:
    """One shape of samples.

    Attributes:
        frames: latent frames of each sample; 1 for images; 0 where samples are whole videos of any length.
        height: latent rows.
        width: latent columns.
        size: (height, width) of the encoded frames in pixels.
        counts: number of samples per split.
    """

    frames: int
    height: int
    width: int
    size: tuple[int, int]
    counts: dict[str, int] = field(default_factory=dict)

    def validate(self) -> None:
        """Raises FormatError for what cannot be."""
        for name in ("frames", "height", "width"):
            check_count(getattr(self, name), f"{name} of a bucket", int(name != "frames"))
        check(len(self.size) == 2, f"the size of a bucket is {self.size!r}")
        for split, count in self.counts.items():
            check_count(count, f"the count of the split {split!r}")


def filled_buckets(buckets: tuple[Bucket, ...]) -> tuple[Bucket, ...]:
    """The buckets with samples; all of them where their samples are not counted, or there are none."""
    return tuple(bucket for bucket in buckets if any(bucket.counts.values())) or buckets


@dataclass(frozen=True)
class TextEncoderInfo:
    """What made the embeddings.

    Attributes:
        name: by which it was loaded.
        identity: hash of its weights.
        width: numbers of one token's embedding, e.
        max_tokens: at which captions were cut.
        empty_prompt: file of the empty prompt's embedding, (n e).
        empty_prompt_sha256: of that file.
    """

    name: str
    identity: str
    width: int
    max_tokens: int
    empty_prompt: str
    empty_prompt_sha256: str

    def validate(self) -> None:
        """Raises FormatError for what cannot be."""
        check_count(self.width, "the width of the text embeddings", 1)
        check_count(self.max_tokens, "the most tokens of a caption", 1)
        check_name(self.empty_prompt, ".npy")
        check_sha256(self.empty_prompt_sha256)


@dataclass(frozen=True, slots=True)
class ClipShard:
    """One shard, as the manifest lists it: file name, split, number of samples, size in bytes, sha256."""

    name: str
    split: str
    samples: int
    bytes: int
    sha256: str


@dataclass(frozen=True)
class IndexInfo:
    """The table of a split's samples: file name, split, rows, size in bytes, sha256."""

    name: str
    split: str
    rows: int
    bytes: int
    sha256: str


@dataclass(frozen=True)
class StoredManifest(ABC):
    """What the manifests of both formats can do: become JSON, and be read from it."""

    def to_json(self) -> str:
        """JSON text, the same for the same manifest."""
        return json.dumps(asdict(self), indent=1, sort_keys=True) + "\n"

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Self:
        """The manifest of what `to_json` wrote.

        Raises:
            FormatError: a value that cannot be, such as a shard's name that leads out of the folder.
            TypeError, KeyError: something else than a manifest.
        """
        manifest = cls(**(data | cls.parts(data)))
        manifest.validate()
        return manifest

    @staticmethod
    @abstractmethod
    def parts(data: dict[str, Any]) -> dict[str, Any]:
        """The fields that JSON holds as lists and dictionaries, as what they are in a manifest."""

    @abstractmethod
    def validate(self) -> None:
        """Raises FormatError for what cannot be."""


@dataclass(frozen=True)
class ClipManifest(StoredManifest):
    """What made a folder of shards of format 2, and what is in it.

    Attributes:
        format: `CLIP_FORMAT`.
        vae: name by which the VAE was loaded.
        vae_class: its class in diffusers.
        vae_identity: hash of its weights; shards of another identity are refused.
        temporal_stride: pixel frames per latent frame after the first one, 1 for an image VAE.
        channels: latent channels c.
        normalisation: shift and scale per channel, `Normalisation.to_dict()`.
        dtype: `float16` or `bfloat16`, of moments and embeddings.
        flip: the flipped copies are stored.
        layout: layout of the source folder.
        preprocess: the preprocessing, by name.
        classes: class names by label; empty without labels.
        text: the text encoder; None without captions.
        buckets: the shapes of the samples.
        indices: the tables of samples, one per split.
        shards: the shards of all splits; the rows of a split's table are in their order.
        rejected: number of videos that could not be used.
        uncaptioned: number of samples without a caption, which stand for the empty prompt.
    """

    format: str
    vae: str
    vae_class: str
    vae_identity: str
    temporal_stride: int
    channels: int
    normalisation: dict[str, Any]
    dtype: str
    flip: bool
    layout: str
    preprocess: dict[str, Any]
    classes: tuple[str, ...]
    text: TextEncoderInfo | None
    buckets: tuple[Bucket, ...]
    indices: tuple[IndexInfo, ...]
    shards: tuple[ClipShard, ...]
    rejected: int
    uncaptioned: int = 0

    @staticmethod
    def parts(data: dict[str, Any]) -> dict[str, Any]:
        """Shards, tables, shapes, classes and the text encoder, of what `to_json` wrote."""
        return {
            "shards": tuple(ClipShard(**shard) for shard in data["shards"]),
            "indices": tuple(IndexInfo(**index) for index in data["indices"]),
            "buckets": tuple(Bucket(**bucket | {"size": tuple(bucket["size"])}) for bucket in data["buckets"]),
            "classes": tuple(data["classes"]),
            "text": TextEncoderInfo(**data["text"]) if data["text"] else None,
        }

    def validate(self) -> None:
        """Raises FormatError for what cannot be."""
        check(self.dtype in DTYPES, f"dtype is {self.dtype!r}, not one of {', '.join(DTYPES)}")
        check_count(self.channels, "channels", 1)
        check_count(self.temporal_stride, "temporal_stride", 1)
        check(len(self.buckets) > 0, "it has no buckets")
        for value in self.normalisation.values():
            numbers = value if isinstance(value, list) else [value]
            check(all(isinstance(n, int | float) and math.isfinite(n) for n in numbers), "normalisation is not finite")
        for bucket in self.buckets:
            bucket.validate()
        for index in self.indices:
            check_file(index, ".arrow", "rows")
        for shard in self.shards:
            check_file(shard, ".tar", "samples")
        if self.text:
            self.text.validate()
        for index in self.indices:
            samples = sum(shard.samples for shard in self.shards if shard.split == index.split)
            check(samples == index.rows, f"{index.name} has {index.rows} rows for {samples} samples")
        listed = [shard.name for shard in self.shards]
        check(len(set(listed)) == len(listed), "it lists a shard twice")

    @property
    def causal(self) -> bool:
        """Each sample was encoded from its own first frame, so that only a prefix of it is a valid shorter clip."""
        return self.temporal_stride > 1

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """(c, h, w) of one latent frame of the first bucket with samples."""
        bucket = filled_buckets(self.buckets)[0]
        return (self.channels, bucket.height, bucket.width)

    @property
    def size(self) -> int:
        """Height of the encoded frames of the first bucket with samples, in pixels."""
        return filled_buckets(self.buckets)[0].size[0]
