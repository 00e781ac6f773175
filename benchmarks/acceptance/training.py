"""A short training run from real video files to resumed losses, by the commands that a user types."""

import functools
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F

from benchmarks.acceptance.record import Outcome, Record
from fvdm.media.writing import write_mp4

if TYPE_CHECKING:
    from benchmarks.acceptance.config import AcceptanceConfig

ROOT = Path(__file__).resolve().parents[2]
START = 300  # seconds that a run may take to its first steps
TOLERANCE = {"cpu": 0.0, "cuda": 1e-2}  # of a resumed loss, relative: kernels of a GPU add in any order


class ShortRun:
    """The same short training run, under several names.

    Args:
        config: of the acceptance program.
        folder: for clips, latents and runs.
    """

    def __init__(self, config: "AcceptanceConfig", folder: Path) -> None:
        self.config, self.folder = config, folder
        self.pixels = 32 if config.smoke else 256
        self.clips, self.frames = (4, 24) if config.smoke else (64, 48)
        self.batch = 2 if config.smoke else config.timed_batch
        self.steps, self.stop_after = (60, 5) if config.smoke else (60, 20)

    def command(self, name: str, *words: str) -> list[str]:
        """The launcher's command line."""
        config = self.config
        settings = {
            "--cluster": "local",
            "--nodes": 1,
            "--gpus-per-node": int(config.device == "cuda"),
            "--config": ROOT / "configs" / "ffs_xl.yaml",
            "--name": name,
            "--runs": self.folder / "runs",
            "--data.path": self.folder / "latents",
            "--data.frames": config.frames,
            "--data.stride": 1,
            "--data.batch_size": self.batch,
            "--engine.micro_batch": 0,
            "--model": config.timed_model,
            "--steps": self.steps,
            "--log_every": 1,
            "--stop_every": 1,
            "--checkpoint.every": self.steps // 2,
            "--previews.every": 0,
            "--register_as": "none",
            "--tracking.uri": f"sqlite:///{(self.folder / 'mlflow.db').resolve()}",
            "--tracking.system_metrics": "false",
        }
        if config.smoke:
            settings |= {"--data.workers": 0, "--engine.precision": "fp32"}
        launcher = [sys.executable, str(ROOT / "launchers" / "slurm_train.py")]
        return [*launcher, *(str(word) for pair in settings.items() for word in pair), *words]

    def start(self, command: list[str], log: str) -> subprocess.Popen[bytes]:
        """Start a command in a group of its own; what it prints goes to a file."""
        with (self.folder / f"{log}.log").open("ab") as file:
            hidden = {"CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu"} if self.config.device == "cpu" else {}
            return subprocess.Popen(
                command, env=os.environ | hidden, stdout=file, stderr=subprocess.STDOUT, start_new_session=True
            )

    def finish(self, command: list[str], log: str) -> None:
        """Run a command to its end.

        Raises:
            RuntimeError: if it fails; with the end of what it has printed.
        """
        code = self.start(command, log).wait()
        if code:
            raise RuntimeError(f"{log} ended with code {code}: {self.last_line(log)}")

    def last_line(self, log: str) -> str:
        """The last line that a command has printed."""
        lines = (self.folder / f"{log}.log").read_text(errors="replace").strip().splitlines()
        return f"{lines[-1] if lines else 'nothing was printed'} ({self.folder / log}.log)"

    def losses(self, name: str) -> dict[int, float]:
        """The loss of every step, from the run's journal; the last report of a step counts."""
        return {event["step"]: event["metrics"]["loss/mean"] for event in self.events(name, "loss/mean")}

    def largest_difference(self, name: str) -> float:
        """The largest relative difference between the losses of a run and those of the complete one.

        Raises:
            RuntimeError: if one has steps that the other one lacks.
        """
        complete, other = self.losses("complete"), self.losses(name)
        if complete.keys() != other.keys():
            raise RuntimeError(f"the run {name} has {len(other)} steps, the complete one {len(complete)}")
        return max(abs(other[step] / complete[step] - 1) for step in complete)

    def speed(self, name: str) -> float:
        """Clips per second of a run with its loader, the median of its reports."""
        speed = "speed/clips_per_second"
        return median(event["metrics"][speed] for event in self.events(name, speed))

    def events(self, name: str, metric: str) -> list[dict[str, Any]]:
        """The reports of a run that hold a metric."""
        path = self.folder / "runs" / name / "events.jsonl"
        if not path.exists():
            return []
        lines = [line for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")]
        return [event for event in map(json.loads, lines) if metric in event.get("metrics", {})]


def run(record: Record, config: "AcceptanceConfig") -> None:
    """All checks of the part."""
    folder = record.out / "training"
    folder.mkdir(parents=True, exist_ok=True)
    short = ShortRun(config, folder)
    record.check("real shards", functools.partial(encode, short))
    record.check("a run without a stop", functools.partial(train, short))
    record.check("without overlap of reduction and backward pass", functools.partial(train_without_overlap, short))
    record.check("the stop signal, and the same command again", functools.partial(stop_and_resume, short))


def encode(short: ShortRun) -> Outcome:
    """Write video files, and encode them as a user does."""
    videos = short.folder / "clips"
    videos.mkdir(exist_ok=True)
    side = short.pixels + short.pixels // 2
    for number in range(short.clips):
        generator = torch.Generator().manual_seed(number)
        coarse = torch.rand(1, 3, 8, 8, generator=generator) * 255
        scene = F.interpolate(coarse, size=(side, side), mode="bilinear")[0].byte()
        moving = [scene.roll((2 * f, f), (1, 2))[:, : short.pixels, : short.pixels] for f in range(short.frames)]
        write_mp4(torch.stack(moving), videos / f"{number:03d}.mp4")
    command = [sys.executable, str(ROOT / "data_prep" / "encode_latents.py"), "--videos", str(videos)]
    command += ["--out", str(short.folder / "latents"), "--size", str(short.pixels), "--mlflow", "none"]
    start = time.monotonic()
    short.finish(command, "encode")
    took = time.monotonic() - start
    return Outcome({"clips": short.clips, "frames/s": short.clips * short.frames / took}, True, "the command succeeds")


def train(short: ShortRun) -> Outcome:
    """Train to the end; clips/s with the loader, and the time for which a checkpoint holds training up."""
    short.finish(short.command("complete"), "complete")
    stall = "checkpoint/stalled_seconds"
    stalls = [event["metrics"][stall] for event in short.events("complete", stall)]
    losses = short.losses("complete")
    values = {"steps": len(losses), "clips/s": short.speed("complete"), "last loss": losses[max(losses)]}
    return Outcome(values | {"checkpoint stalls, s": max(stalls)}, len(losses) == short.steps, f"{short.steps} steps")


def train_without_overlap(short: ShortRun) -> Outcome:
    """Train with gradients that are reduced after the backward pass, and compare losses and speed.

    Raises:
        RuntimeError: if the run fails.
    """
    name = "no-overlap"
    short.finish(short.command(name, "--engine.overlap_comm", "false"), name)
    largest, limit = short.largest_difference(name), TOLERANCE[short.config.device]
    values = {"clips/s": short.speed(name), "with overlap, clips/s": short.speed("complete")}
    return Outcome(values | {"largest difference of losses": largest}, largest <= limit, f"losses within {limit:g}")


def stop_and_resume(short: ShortRun) -> Outcome:
    """Interrupt a run as Ctrl-C does, type its command again, and compare the losses with those of the other run.

    Raises:
        RuntimeError: if the run does not reach its first steps, or ends with an error.
    """
    command, name = short.command("stopped"), "stopped"
    process, start = short.start(command, name), time.monotonic()
    while max(short.losses(name), default=0) < short.stop_after:
        if process.poll() is not None or time.monotonic() - start > START:
            process.kill()
            raise RuntimeError(f"the run did not reach step {short.stop_after}: {short.last_line(name)}")
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    code = process.wait()
    reached = max(short.losses(name))
    short.finish(command, name)
    largest, limit = short.largest_difference(name), TOLERANCE[short.config.device]
    values = {"exit code": code, "stopped after step": reached, "largest difference of losses": largest}
    good = reached < short.steps and largest <= limit
    return Outcome(values, good, f"stopped before step {short.steps}, losses within {limit:g}")
