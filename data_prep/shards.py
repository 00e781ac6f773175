"""Writes shards that are a pure function of their list of videos, whatever is killed in between.

The plan is made once, before anything is encoded: which videos go into which shard. Each encoded video is
kept as a small tar of its own in the work folder (a part); when a shard has all its parts they are copied, in
the order of the plan, into the shard. Every file is written under a temporary name, flushed and renamed. So a
run that is killed loses at most the videos in flight, two runs that do the same work write the same bytes,
and a name that exists is a complete file.
"""

import contextlib
import itertools
import json
import os
import secrets
import shutil
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from data_prep.planning import WORK, EncodePlan, ShardPlan, write_rejected
from data_prep.samples import Part, copy_members, file_sha256, index_tar, key_of, tar_writer, video_key, write_sample
from fvdm.data.clips import index_shard
from fvdm.data.former import index_name
from fvdm.files import LockHeldError, atomic_write, lock

LOCK_TIMEOUT = 600.0  # seconds to wait for another copy of the job; a lost machine may hold its lock forever


@contextlib.contextmanager
def atomic(path: Path) -> Iterator[BinaryIO]:
    """A file to write that appears under its name complete and flushed to disk, or not at all."""
    with atomic_write(path, mark=f".{secrets.token_hex(8)}") as temporary, temporary.open("wb") as file:
        yield file


class Work:
    """The work folder: the parts of the shards that are not complete yet.

    Args:
        out: the folder of shards.
        plan: what is made.
    """

    def __init__(self, out: Path, plan: EncodePlan) -> None:
        """Touches nothing."""
        self.out, self.plan = out, plan

    @property
    def folder(self) -> Path:
        """The work folder."""
        return self.out / WORK

    def _folder(self, shard: ShardPlan) -> Path:
        return self.folder / shard.name.removesuffix(".tar")

    def complete(self, shard: ShardPlan) -> bool:
        """The shard is made; its index is written last."""
        return (self.out / index_name(shard.name)).exists()

    def done(self, shard: ShardPlan) -> int:
        """Number of the shard's videos that need no more work."""
        return shard.end - shard.first if self.complete(shard) else len(self._names(shard))

    def missing(self, shard: ShardPlan) -> list[int]:
        """The videos of a shard that are neither encoded nor rejected, as indices of the plan's sources."""
        if self.complete(shard):
            return []
        names = self._names(shard)
        return [video for video in range(shard.first, shard.end) if key_of(video) not in names]

    def _names(self, shard: ShardPlan) -> set[str]:
        try:
            found = os.listdir(self._folder(shard))
        except FileNotFoundError:
            return set()
        return {name.split(".")[0] for name in found if name.endswith((".tar", ".json")) and name[0] != "."}

    def keep(self, shard: ShardPlan, video: int, sample: dict[str, Any] | Part) -> None:
        """Stores an encoded video: a WebDataset sample as `VideoMoments.sample` makes it, or those of its clips."""
        with self._unless_made(shard), self._new(shard, f"{key_of(video)}.tar") as file:
            if isinstance(sample, Part):
                sample.copy_to(file)
                return
            with tar_writer(file) as writer:
                write_sample(writer, sample)

    def reject(self, shard: ShardPlan, video: int, reason: str, stamp: list[int] | None) -> None:
        """Stores that a video cannot be used; `stamp` is that of its file, None to have it tried at the next start."""
        row = {"source": self.plan.sources[video].name, "reason": reason, "stamp": stamp}
        with self._unless_made(shard), self._new(shard, f"{key_of(video)}.json") as file:
            file.write(json.dumps(row).encode())

    @contextlib.contextmanager
    def _new(self, shard: ShardPlan, name: str) -> Iterator[BinaryIO]:
        folder = self._folder(shard)
        folder.mkdir(parents=True, exist_ok=True)
        with atomic(folder / name) as file:
            yield file

    def assemble(self, shard: ShardPlan) -> None:
        """Makes a shard of its parts, then its index, then removes the parts.

        Two copies of a job may be at it: Slurm starts the jobs of a node again that it has lost, while their
        processes live on. One waits for the other, and finds the shard made.
        """
        folder = self._folder(shard)
        if not self.complete(shard):
            with self._unless_made(shard), _lock(folder):
                self._make(shard, folder)
        shutil.rmtree(folder, ignore_errors=True)

    def _make(self, shard: ShardPlan, folder: Path) -> None:
        self._refuse_made(shard)
        names = set(os.listdir(folder))  # once: what is missing from here on is an error, not a rejected video
        keys = [key_of(video) for video in range(shard.first, shard.end)]
        parts = [key for key in keys if f"{key}.tar" in names]
        rejected = [json.loads((folder / f"{key}.json").read_bytes()) for key in keys if f"{key}.tar" not in names]
        index: dict[str, Any] = {"samples": [], "rejected": rejected, "sha256": None}
        if parts:
            with atomic(self.out / shard.name) as file:
                with tar_writer(file) as writer:
                    for key in parts:
                        _copy(folder / f"{key}.tar", writer)
                file.flush()
                made = Path(file.name)
                index |= {"samples": self._rows(made), "sha256": file_sha256(made)}
                self._refuse_made(shard)  # where the file system has no locks
        with atomic(self.out / index_name(shard.name)) as file:
            file.write((json.dumps(index, sort_keys=True) + "\n").encode())

    def _rows(self, path: Path) -> list[dict[str, Any]]:
        """One row per sample: what a later start and the manifest need of it."""
        if self.plan.settings.get("format", 1) == 1:
            return list(index_tar(path))
        return [row | {"source": os.fsdecode(row["source"])} for row in index_shard(path)]

    @contextlib.contextmanager
    def _unless_made(self, shard: ShardPlan) -> Iterator[None]:
        """Ends what is in it where another copy of this job has made the shard, and removed its parts."""
        try:
            yield
        except FileNotFoundError:
            if not self._made(shard):
                raise
        except _MadeError:
            pass

    def _refuse_made(self, shard: ShardPlan) -> None:
        if self._made(shard):
            raise _MadeError

    def _made(self, shard: ShardPlan) -> bool:
        """As `complete`; listing the folder makes network file systems look again."""
        return index_name(shard.name) in os.listdir(self.out)

    def rejected(self, shard: ShardPlan) -> dict[int, dict[str, Any]]:
        """What was stored of the videos of a shard that cannot be used, by their indices in the plan's sources."""
        videos = range(shard.first, shard.end)
        if self.complete(shard):
            index = json.loads((self.out / index_name(shard.name)).read_bytes())
            good = {video_key(row["key"]) for row in index["samples"]}
            return dict(zip((v for v in videos if key_of(v) not in good), index["rejected"], strict=True))
        folder = self._folder(shard)
        names = set(os.listdir(folder)) if folder.exists() else set()
        bad = [v for v in videos if f"{key_of(v)}.json" in names and f"{key_of(v)}.tar" not in names]
        return {video: json.loads((folder / f"{key_of(video)}.json").read_bytes()) for video in bad}

    def write_rejected(self) -> list[dict[str, str]]:
        """Writes `rejected.jsonl`, as far as it is known, and returns its rows."""
        rows = [{"source": name, "reason": reason} for name, reason in self.plan.rejected]
        for shard in self.plan.shards:
            rows += [{key: row[key] for key in ("source", "reason")} for row in self.rejected(shard).values()]
        write_rejected(self.out, rows)
        return rows

    def retry(self, videos: Path, *, everything: bool = False) -> int:
        """Forgets the rejections of videos that have changed since, or whose file could not be read, or all.

        A shard that is made already is taken apart into its parts again. Returns the number of those videos.
        """
        count = 0
        for shard in self.plan.shards:
            rows = self.rejected(shard)
            again = {
                video
                for video, row in rows.items()
                if everything or row.get("stamp") is None or row["stamp"] != stamp_of(videos / row["source"])
            }
            if again:
                count += len(again)
                with _lock(self._folder(shard)):
                    if self.complete(shard):
                        self._take_apart(shard, {video: row for video, row in rows.items() if video not in again})
                    for video in again:
                        (self._folder(shard) / f"{key_of(video)}.json").unlink(missing_ok=True)
        return count

    def _take_apart(self, shard: ShardPlan, rejected: dict[int, dict[str, Any]]) -> None:
        """Makes parts of a shard. Its index goes last: killed before, the shard is complete; after, its parts are."""
        if (self.out / shard.name).exists():
            with tarfile.open(self.out / shard.name) as tar:
                for key, members in itertools.groupby(tar, lambda member: video_key(member.name.partition(".")[0])):
                    with self._new(shard, f"{key}.tar") as file, tar_writer(file) as writer:
                        copy_members(tar, members, writer)
        for video, row in rejected.items():
            self.reject(shard, video, row["reason"], row.get("stamp"))
        (self.out / "manifest.json").unlink(missing_ok=True)
        (self.out / index_name(shard.name)).unlink()


def _copy(part: Path, writer: Any) -> None:
    with tarfile.open(part) as tar:
        copy_members(tar, tar, writer)


class _MadeError(Exception):
    """Another copy of this job has made the shard."""


@contextlib.contextmanager
def _lock(folder: Path) -> Iterator[None]:
    """Keeps other copies of this job from the folder of a shard's parts."""
    folder.mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as held:
        with contextlib.suppress(LockHeldError):
            held.enter_context(lock(folder / "lock", LOCK_TIMEOUT))
        yield


def stamp_of(path: Path) -> list[int] | None:
    """Bytes of a video's file, or of its frames, and when they were changed: by these a later start sees that it was
    repaired. None where they cannot be read."""
    try:
        files = [entry.stat() for entry in os.scandir(path)] if path.is_dir() else [path.stat()]
    except OSError:
        return None
    return [sum(file.st_size for file in files), max((file.st_mtime_ns for file in files), default=0)]
