"""Reports how fast an encoding goes: a progress bar for the terminal, throughput for MLflow."""

import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

from data_prep.shards import WORK, atomic

if TYPE_CHECKING:
    from fvdm.data.former import Manifest
    from fvdm.tracking.tracker import Tracker

JOURNAL = ".mlflow"  # folder of the tracker's journal, in the folder of the shards
EVERY = 10.0  # seconds between two points in MLflow
SHOWN = 2.0  # seconds between two words of a job on how far it is


class Report:
    """One start of the command. Counts are of this start; a command that goes on continues the same MLflow run."""

    def __init__(self, out: Path, uri: str, experiment: str, params: dict[str, Any]) -> None:
        """Begins to report; `uri` is `none` for no MLflow, empty for its default."""
        self.begun = self.last = time.monotonic()
        self.tracker: Tracker | None = None
        if uri != "none":
            from fvdm.tracking import tracker
            from fvdm.tracking.config import TrackingConfig

            config = TrackingConfig(uri, experiment)
            name = _utf8(f"encode {out.resolve().name}")
            params = {key: _utf8(value) if isinstance(value, str) else value for key, value in params.items()}
            self.tracker = tracker.Tracker(out / JOURNAL, config, name, params, {"kind": "encode"})

    @property
    def seconds(self) -> float:
        """Since the beginning."""
        return time.monotonic() - self.begun

    def update(self, videos: int, done: int, frames: int) -> None:
        """Reports a point, if the last is long enough ago.

        Args:
            videos: encoded or rejected since the beginning.
            done: encoded or rejected by all starts of the command; the step in MLflow.
            frames: encoded since the beginning.
        """
        if self.tracker and time.monotonic() - self.last > EVERY:
            self.last = time.monotonic()
            values = {
                "encode/videos": float(done),
                "encode/videos_per_second": videos / self.seconds,
                "encode/frames_per_second": frames / self.seconds,
            }
            self.tracker.metrics(values, done)

    def finish(self, out: Path, manifest: "Manifest", frames: int) -> str:
        """Reports the result; returns the summary, one line.

        Args:
            out: the folder of the shards.
            manifest: of what was made.
            frames: encoded since the beginning.
        """
        total = {
            "videos": sum(shard.samples for shard in manifest.shards),
            "frames": sum(shard.frames for shard in manifest.shards),
            "shards": len(manifest.shards),
            "megabytes": sum(shard.bytes for shard in manifest.shards) / 1e6,
            "rejected": manifest.rejected,
        }
        rate = frames / self.seconds
        if self.tracker:
            values = {f"encode/total_{name}": float(value) for name, value in total.items()}
            self.tracker.metrics(values | {"encode/frames_per_second": rate}, int(total["videos"]))
            self.tracker.artifact(out / "manifest.json")
            self.tracker.artifact(out / "rejected.jsonl")
        text = "{videos} videos, {frames} frames, {shards} shards, {megabytes:.1f} MB".format(**total)
        text += ", {rejected} videos rejected (rejected.jsonl)".format(**total) if manifest.rejected else ""
        text += f"; {self.seconds:.0f} s, {rate:.1f} frames/s" if frames else ""
        return f"{out}: {text}"

    def close(self, status: str) -> None:
        """Ends the MLflow run as FINISHED, FAILED or KILLED."""
        if self.tracker:
            self.tracker.close(status)


class FrameCount:
    """The frames that a job has encoded in all its starts, in a file of the work folder, for who watches the jobs."""

    def __init__(self, out: Path, job: int) -> None:
        """Goes on from what is there."""
        self.path = out / WORK / f"frames-{job}"
        self.before = int(self.path.read_text()) if self.path.exists() else 0
        self.last = time.monotonic()

    def update(self, frames: int, *, last: bool = False) -> None:
        """Says how many frames this start has encoded, now and then."""
        if last or time.monotonic() - self.last > SHOWN:
            self.last = time.monotonic()
            self.path.parent.mkdir(exist_ok=True)
            with atomic(self.path) as file:
                file.write(str(self.before + frames).encode())

    @staticmethod
    def of_all_jobs(out: Path) -> int:
        """The sum over the jobs."""
        return sum(int(path.read_text()) for path in (out / WORK).glob("frames-*"))


def _utf8(text: str) -> str:
    """The text with escapes for bytes of file names that are no UTF-8, which MLflow does not take."""
    return text.encode(errors="backslashreplace").decode()


def progress_bar(total: int, unit: str, initial: int = 0, *, hidden: bool = False) -> "tqdm[Any]":
    """A progress bar; in a log file, where nobody watches, a line every half minute."""
    often = 0.5 if sys.stderr.isatty() else 30.0
    return tqdm(total=total or None, initial=initial, unit=f" {unit}", mininterval=often, disable=hidden)
