"""Writes shards that are a pure function of their list of videos, whatever is killed in between.

The plan is made once, before anything is encoded: which videos go into which shard. Each encoded video is
kept as a small tar of its own in the work folder (a part); when a shard has all its parts they are copied, in
the order of the plan, into the shard. Every file is written under a temporary name, flushed and renamed. So a
run that is killed loses at most the videos in flight, two runs that do the same work write the same bytes,
and a name that exists is a whole file.
"""

import contextlib
import hashlib
import io
import json
import os
import shutil
import socket
import tarfile
import zlib
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from data_prep.layouts import Source
from fvdm.shards import Manifest, ShardInfo, index_name

WORK = ".work"


@dataclass(frozen=True)
class ShardPlan:
    """One shard to make: its file name, its split, and its videos as a range of the plan's sources."""

    name: str
    split: str
    first: int
    end: int


@dataclass(frozen=True)
class Plan:
    """What a run makes, decided before it begins and kept in `plan.json`.

    Attributes:
        videos: the folder of the videos, absolute; the names of the sources are relative to it.
        settings: all settings that change the bytes; a run with others is refused.
        layout: the recognised layout.
        classes: class names by label.
        sources: the videos, the splits one after the other.
        estimates: about how many frames each has.
        rejected: `(name, reason)` of what could not be opened when the plan was made.
        shards: the shards.
    """

    videos: str
    settings: dict[str, Any]
    layout: str
    classes: list[str]
    sources: list[Source]
    estimates: list[int]
    rejected: list[tuple[str, str]]
    shards: list[ShardPlan]

    def to_json(self) -> str:
        """JSON text, the same for the same plan."""
        return json.dumps(asdict(self), sort_keys=True) + "\n"

    @classmethod
    def from_json(cls, text: str) -> "Plan":
        """The plan that `to_json` wrote."""
        data = json.loads(text)
        data["sources"] = [Source(**source) for source in data["sources"]]
        data["rejected"] = [(name, reason) for name, reason in data["rejected"]]
        data["shards"] = [ShardPlan(**shard) for shard in data["shards"]]
        return cls(**data)


def assign(sources: list[Source], estimates: list[int], frame_bytes: int, shard_bytes: int) -> list[ShardPlan]:
    """Shares the videos out to shards of at most `shard_bytes`, in order; a longer video has a shard of its
    own.

    Args:
        sources: the videos, the splits one after the other.
        estimates: frames of each.
        frame_bytes: stored bytes per frame.
        shard_bytes: bound, in bytes; it holds as far as the estimates do.
    """
    shards: list[ShardPlan] = []
    numbers: dict[str, int] = {}
    first, filled = 0, 0
    for index, (source, frames) in enumerate(zip(sources, estimates, strict=True)):
        size = frames * frame_bytes + 8192  # headers, checksums, padding
        if index > first and (filled + size > shard_bytes or source.split != sources[first].split):
            shards.append(_shard_plan(sources[first].split, numbers, first, index))
            first, filled = index, 0
        filled += size
    if sources:
        shards.append(_shard_plan(sources[first].split, numbers, first, len(sources)))
    return shards


def _shard_plan(split: str, numbers: dict[str, int], first: int, end: int) -> ShardPlan:
    number = numbers[split] = numbers.get(split, -1) + 1
    return ShardPlan(f"{split}-{number:06d}.tar", split, first, end)


@contextlib.contextmanager
def atomic(path: Path) -> Iterator[BinaryIO]:
    """A file to write that appears under its name whole, flushed to disk, or not at all."""
    temporary = path.with_name(f".{path.name}.{socket.gethostname()}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


class Work:
    """The work folder: the parts of the shards that are not whole yet.

    Args:
        out: the folder of shards.
        plan: what is made.
    """

    def __init__(self, out: Path, plan: Plan) -> None:
        """Touches nothing."""
        self.out, self.plan = out, plan

    def _folder(self, shard: ShardPlan) -> Path:
        return self.out / WORK / shard.name.removesuffix(".tar")

    def whole(self, shard: ShardPlan) -> bool:
        """The shard is made; its index is written last."""
        return (self.out / index_name(shard.name)).exists()

    def done(self, shard: ShardPlan) -> int:
        """Number of the shard's videos that need no more work."""
        return shard.end - shard.first if self.whole(shard) else len(self._names(shard))

    def missing(self, shard: ShardPlan) -> list[int]:
        """The videos of a shard that are neither encoded nor rejected, as indices of the plan's sources."""
        if self.whole(shard):
            return []
        names = self._names(shard)
        return [video for video in range(shard.first, shard.end) if key_of(video) not in names]

    def _names(self, shard: ShardPlan) -> set[str]:
        try:
            found = os.listdir(self._folder(shard))
        except FileNotFoundError:
            return set()
        return {name.split(".")[0] for name in found if name.endswith((".tar", ".json")) and name[0] != "."}

    def keep(self, shard: ShardPlan, video: int, sample: dict[str, Any]) -> None:
        """Stores an encoded video, a WebDataset sample of bytes."""
        with self._new(shard, f"{key_of(video)}.tar") as file, _tar(file) as tar:
            tar.write(sample)

    def reject(self, shard: ShardPlan, video: int, reason: str) -> None:
        """Stores that a video cannot be used."""
        with self._new(shard, f"{key_of(video)}.json") as file:
            file.write(json.dumps({"source": self.plan.sources[video].name, "reason": reason}).encode())

    @contextlib.contextmanager
    def _new(self, shard: ShardPlan, name: str) -> Iterator[BinaryIO]:
        folder = self._folder(shard)
        folder.mkdir(parents=True, exist_ok=True)
        with atomic(folder / name) as file:
            yield file

    def assemble(self, shard: ShardPlan) -> None:
        """Makes a shard of its parts, then its index, then removes the parts."""
        if self.whole(shard):
            return
        folder, path = self._folder(shard), self.out / shard.name
        parts = [folder / f"{key_of(video)}.tar" for video in range(shard.first, shard.end)]
        rejected = [json.loads(part.with_suffix(".json").read_text()) for part in parts if not part.exists()]
        index: dict[str, Any] = {"samples": [], "rejected": rejected, "sha256": None}
        if len(rejected) < len(parts):
            with atomic(path) as file, _tar(file) as tar:
                for part in parts:
                    if part.exists():
                        tar.write(_read_part(part))
            index |= {"samples": list(index_tar(path)), "sha256": file_sha256(path)}
        with atomic(self.out / index_name(shard.name)) as file:
            file.write((json.dumps(index, sort_keys=True) + "\n").encode())
        shutil.rmtree(folder, ignore_errors=True)


def _tar(file: BinaryIO) -> Any:
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


def _read_part(path: Path) -> dict[str, Any]:
    """The sample in a part."""
    sample: dict[str, Any] = {}
    with tarfile.open(path) as tar:
        for member in tar:
            key, _, suffix = member.name.partition(".")
            content = tar.extractfile(member)
            assert content is not None
            sample |= {"__key__": key, suffix: content.read()}
    return sample


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


def finish(out: Path, plan: Plan, about: dict[str, Any]) -> Manifest:
    """Writes `rejected.jsonl` and the manifest, when every shard is whole.

    Args:
        out: the folder of shards.
        plan: what was made.
        about: the manifest's fields that the plan does not know (VAE, shapes).
    """
    shards: list[ShardInfo] = []
    rejected = [{"source": name, "reason": reason} for name, reason in plan.rejected]
    for shard in plan.shards:
        data = (out / index_name(shard.name)).read_bytes()
        index = json.loads(data)
        rejected += index["rejected"]
        if index["samples"]:
            frames = sum(row["frames"] for row in index["samples"])
            size = (out / shard.name).stat().st_size
            digest = hashlib.sha256(data).hexdigest()
            shards.append(
                ShardInfo(shard.name, shard.split, len(index["samples"]), frames, size, index["sha256"], digest)
            )
    with atomic(out / "rejected.jsonl") as file:
        file.write("".join(json.dumps(row) + "\n" for row in rejected).encode())
    manifest = Manifest(
        layout=plan.layout,
        classes=tuple(plan.classes),
        rejected=len(rejected),
        shards=tuple(shards),
        **about,
    )
    with atomic(out / "manifest.json") as file:
        file.write(manifest.to_json().encode())
    shutil.rmtree(out / WORK, ignore_errors=True)
    for leftover in out.glob(".*.tmp"):  # of processes that were killed
        leftover.unlink(missing_ok=True)
    return manifest
