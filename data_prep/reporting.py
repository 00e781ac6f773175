"""Reports how fast an encoding goes: a progress bar for the terminal, throughput for MLflow."""

import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

from data_prep.planning import WORK, EncodePlan, ShardPlan
from data_prep.shards import Work, atomic
from fvdm.data.format import ClipManifest

if TYPE_CHECKING:
    from data_prep.config import EncodeConfig
    from data_prep.encoding import EncodeProgress
    from fvdm.data.former import Manifest
    from fvdm.tracking.tracker import Tracker

JOURNAL = ".mlflow"  # folder of the tracker's journal, in the folder of the shards
TRACK_EVERY = 10.0  # seconds between two points in MLflow
COUNT_EVERY = 1.0  # seconds between two frame counts of a job
NOTES = 20  # that are printed one by one
LOG_EVERY = 30.0  # seconds between two lines of the bar in a log, after the first ones


class EncodeReport:
    """One start of the command. Counts are of this start; a restarted command continues the same MLflow run."""

    def __init__(self, config: "EncodeConfig", plan: EncodePlan) -> None:
        """Begins to report to MLflow."""
        self.begun = self.last = time.monotonic()
        self.out = Path(config.out)
        self.tracker: Tracker | None = None
        self.bar: tqdm[Any] | None = None
        self.before = self.rejected = 0
        self.notes = Notes()
        if config.mlflow != "none":
            from fvdm.tracking import tracker
            from fvdm.tracking.config import TrackingConfig

            params = {**vars(config), **plan.settings, "layout": plan.layout, "videos": plan.videos}
            params = {key: _utf8(value) if isinstance(value, str) else value for key, value in params.items()}
            name = _utf8(f"encode {self.out.resolve().name}")
            tracking = TrackingConfig(config.mlflow, config.experiment)
            self.tracker = tracker.Tracker(self.out / JOURNAL, tracking, name, params, {"kind": "encode"})

    @property
    def seconds(self) -> float:
        """Since the beginning."""
        return time.monotonic() - self.begun

    def start(self, work: Work, shards: list[ShardPlan]) -> None:
        """Shows the bar for the frames of the videos that are missing in the shards."""
        self.before = sum(map(work.done, shards))
        frames = sum(work.plan.estimates[video] for shard in shards for video in work.missing(shard))
        self.bar = progress_bar(frames, "frames")

    def __call__(self, progress: "EncodeProgress") -> None:
        """Reports what this process has encoded, and every rejected video."""
        assert self.bar is not None
        for name, reason in progress.rejected[self.rejected :]:
            self.bar.write(f"rejected {name!a}: {reason}", file=sys.stderr)
        self.rejected = len(progress.rejected)
        self.notes(progress)
        ended = progress.videos + self.rejected
        self.update(ended, progress.frames, f"{progress.videos} videos", f", {self.rejected} rejected")

    def update(self, videos: int, frames: int, shown: str = "", more: str = "") -> None:
        """Moves the bar, and reports a point to MLflow if the last is long enough ago.

        Args:
            videos: encoded or rejected since the beginning.
            frames: encoded since the beginning.
            shown: how many videos, in words.
            more: what else the bar says.
        """
        assert self.bar is not None
        rate = videos / self.seconds
        self.bar.set_postfix_str(f"{shown or f'{videos} videos'}, {rate:.2f} videos/s{more}", refresh=False)
        advance(self.bar, frames - self.bar.n)
        if self.tracker and time.monotonic() - self.last > TRACK_EVERY:
            self.last = time.monotonic()
            values = {
                "encode/videos": float(self.before + videos),
                "encode/videos_per_second": rate,
                "encode/frames_per_second": frames / self.seconds,
            }
            self.tracker.metrics(values, self.before + videos)

    def follow(self, work: Work, ended: Callable[[], bool], seconds: float) -> int:
        """Shows how far the jobs are until they have ended.

        Args:
            work: what they make.
            ended: asked once a look whether all have ended.
            seconds: between two looks.

        Returns:
            frames that the jobs have encoded meanwhile.
        """
        counted = FrameCount.of_all_jobs(work.out)
        frames, over = 0, False
        while not over:
            over = ended()
            frames = FrameCount.of_all_jobs(work.out) - counted
            self.update(sum(map(work.done, work.plan.shards)) - self.before, frames)
            if not over:
                time.sleep(seconds)
        return frames

    def finish(self, manifest: "Manifest | ClipManifest", frames: int) -> str:
        """Reports the result; returns the summary, one line.

        Args:
            manifest: of what was made.
            frames: encoded since the beginning.
        """
        total = {
            **_samples(manifest),
            "shards": len(manifest.shards),
            "megabytes": sum(shard.bytes for shard in manifest.shards) / 1e6,
            "rejected": manifest.rejected,
        }
        rate = frames / self.seconds
        if self.tracker:
            values = {f"encode/total_{name}": float(value) for name, value in total.items()}
            samples = sum(shard.samples for shard in manifest.shards)
            self.tracker.metrics(values | {"encode/frames_per_second": rate}, samples)
            self.tracker.artifact(self.out / "manifest.json")
            self.tracker.artifact(self.out / "rejected.jsonl")
        counted = ", ".join(
            f"{total[name]} {name}" for name in ("videos", "clips", "frames", "shards") if name in total
        )
        text = f"{counted}, {total['megabytes']:.1f} MB"
        text += ", {rejected} videos rejected (rejected.jsonl)".format(**total) if manifest.rejected else ""
        text += f"; {self.seconds:.0f} s, {rate:.1f} frames/s" if frames else ""
        return f"{self.out}: {text}"

    def end_bar(self) -> None:
        """Leaves the bar as it stands."""
        if self.bar is not None:
            self.bar.close()
        self.notes.close()

    def __enter__(self) -> "EncodeReport":
        """Itself."""
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """Ends the MLflow run as FINISHED, or, by what was raised, as KILLED or FAILED."""
        self.end_bar()
        if self.tracker:
            stopped = "KILLED" if kind and issubclass(kind, KeyboardInterrupt) else "FAILED"
            self.tracker.close(stopped if kind else "FINISHED")


def _samples(manifest: "Manifest | ClipManifest") -> dict[str, int]:
    """Numbers of samples, by what they are called."""
    samples = sum(shard.samples for shard in manifest.shards)
    if isinstance(manifest, ClipManifest):
        return {"clips": samples, "uncaptioned": manifest.uncaptioned}
    return {"videos": samples, "frames": sum(shard.frames for shard in manifest.shards)}


class Notes:
    """Prints what was done to videos beyond scaling and cropping: the first notes, then their number."""

    def __init__(self) -> None:
        """Nothing is printed yet."""
        self.printed = self.seen = 0

    def __call__(self, progress: "EncodeProgress") -> None:
        """Prints the new ones."""
        for name, note in progress.notes[self.seen :][: NOTES - self.printed]:
            tqdm.write(f"note {name!a}: {note}", file=sys.stderr)
            self.printed += 1
        self.seen = len(progress.notes)

    def close(self) -> None:
        """Prints how many more there were."""
        if self.seen > self.printed:
            tqdm.write(f"and {self.seen - self.printed} more notes of videos", file=sys.stderr)
            self.printed = self.seen


class FrameCount:
    """The frames that a job has encoded in all its starts, in a file of the work folder, for who watches the jobs."""

    def __init__(self, out: Path, job: int) -> None:
        """Continues from what is there."""
        self.path = out / WORK / f"frames-{job}"
        self.before = int(self.path.read_text()) if self.path.exists() else 0
        self.last = float("-inf")
        self.frames = 0
        self.notes = Notes()

    def __call__(self, progress: "EncodeProgress", *, last: bool = False) -> None:
        """Notes how many frames this start has encoded: at once for the first ones, then now and then."""
        self.notes(progress)
        if last:
            self.notes.close()
        if progress.frames > self.frames and (last or time.monotonic() - self.last > COUNT_EVERY):
            self.last, self.frames = time.monotonic(), progress.frames
            self.path.parent.mkdir(exist_ok=True)
            with atomic(self.path) as file:
                file.write(str(self.before + progress.frames).encode())

    @staticmethod
    def of_all_jobs(out: Path) -> int:
        """The sum over the jobs."""
        return sum(int(path.read_text()) for path in (out / WORK).glob("frames-*"))


def _utf8(text: str) -> str:
    """The text with escapes for bytes of file names that are no UTF-8, which MLflow does not take."""
    return text.encode(errors="backslashreplace").decode()


def progress_bar(total: int, unit: str) -> "tqdm[Any]":
    """A progress bar on standard error; `advance` moves it."""
    return tqdm(total=total or None, unit=f" {unit}", mininterval=0.5, miniters=1)


def advance(bar: "tqdm[Any]", steps: int) -> None:
    """Moves a bar. In a log file, where nobody watches, its lines come after 1, 2, 4, ... seconds, then every 30."""
    if not sys.stderr.isatty():
        elapsed = time.time() - bar.start_t
        bar.mininterval = min(LOG_EVERY, max(1.0, elapsed / 2))
    bar.update(steps)
