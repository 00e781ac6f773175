"""A job as processes of this machine: started through submitit, followed to its end, stopped by Ctrl-C and `kill`."""

import contextlib
import os
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import psutil
import submitit
from submitit.core.utils import FailedJobError

from fvdm.distributed import free_port
from fvdm.tracking.provenance import command_line
from launchers.after import EXCEPTION, Files, close_mlflow_run
from launchers.job import POLL, Job
from launchers.resources import ROOT

GRACE = 15.0  # seconds that the ranks have to end when one has failed
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def start_here(job: Job, folder: Path) -> "submitit.Job[bool]":
    """Start the ranks of a job; their files lie in a new folder below `folder`.

    submitit names a job of this machine after its process, whose number may come again: files in one folder would be
    taken for those of the new job.
    """
    resources = job.resources
    own = folder / f"local-{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}"
    executor = submitit.AutoExecutor(folder=own, cluster="local")
    executor.update_parameters(
        nodes=1,
        tasks_per_node=resources.world_size,
        gpus_per_node=resources.nodes * resources.gpus_per_node,
        timeout_min=60 * 24 * 365,
        stderr_to_stdout=True,
    )
    # A terminal sends Ctrl-C, and its own end, to all processes; the launcher turns both into a clean stop.
    before = {number: signal.signal(number, signal.SIG_IGN) for number in (signal.SIGINT, signal.SIGHUP)}
    try:
        with _import_from(ROOT):
            return executor.submit(job, os.getpid(), free_port(), os.environ.get("CUDA_VISIBLE_DEVICES"))
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def _import_from(folder: Path) -> Iterator[None]:
    """Processes that start in the block import this project from `folder`, installed or not."""
    before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(folder), before]))
    try:
        yield
    finally:
        os.environ.pop("PYTHONPATH") if before is None else os.environ.update(PYTHONPATH=before)


def follow_here(job: "submitit.Job[bool]") -> int:
    """Show the first rank's log until the job ends, and close its MLflow run.

    Ctrl-C, SIGTERM and SIGHUP stop the job after the step that it is at, with a checkpoint.

    Returns:
        0; 1 if the job failed, 2 if a setting is wrong; 128 and the signal's number if a signal stopped it.
    """
    offset = 0
    log = job.task(0).paths.stdout
    files = Files(log.parent, job.job_id)
    process: Any = getattr(job, "_process", None)
    done = False
    with _stopping(process) as received:
        while not done:
            time.sleep(POLL)
            done = job.done()
            offset = show(log, offset)
            if files.cause.exists() and time.time() - files.cause.stat().st_mtime > GRACE:  # A hung rank does not end.
                for rank in psutil.Process(process.pid).children(recursive=True):
                    rank.kill()
        code = _verdict(job, files, received)
        close_mlflow_run(files.run_folder, "FAILED" if code in (1, 2) else "KILLED" if code else "FINISHED")
    return code


@contextlib.contextmanager
def _stopping(process: Any) -> Iterator[list[int]]:
    """Pass each signal that asks this program to end to the ranks, as SIGTERM; the signals that came.

    A signal that is ignored, as SIGHUP is under nohup, stays so.
    """
    received: list[int] = []

    def stop(number: int, frame: FrameType | None) -> None:
        received.append(number)
        say(f"\n{signal.Signals(number).name}: stopping after this step, with a checkpoint")
        process.send_signal(signal.SIGTERM)

    before = {number: signal.getsignal(number) for number in SIGNALS if signal.getsignal(number) != signal.SIG_IGN}
    for number in before:
        signal.signal(number, stop)
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def say(text: str, end: str = "\n") -> None:
    """Print, unless the terminal is gone: what follows must still happen."""
    try:
        print(text, end=end, flush=True)
    except OSError:
        sys.stdout = sys.stderr = open(os.devnull, "w")  # noqa: SIM115


def show(log: Path, offset: int) -> int:
    """Print what was added to a log since `offset`; the new offset."""
    if not log.exists():
        return offset
    with log.open(errors="replace") as file:
        file.seek(offset)
        for line in iter(file.readline, ""):
            if not line.startswith("submitit "):
                say(line, end="")
        return file.tell()


def _verdict(job: "submitit.Job[bool]", files: Files, received: list[int]) -> int:
    """Name the first cause: a user's mistake, what a rank has found out, a rank that vanished, one that raised."""
    again = f"To continue from the newest checkpoint, type: {command_line()}"
    if files.error.exists():
        print(f"error: {files.error.read_text()}", file=sys.stderr, flush=True)
        return 2
    if files.cause.exists():
        say(f"error: {files.cause.read_text()}\n{again}")
        return 1
    raised: list[tuple[float, int]] = []
    for task in range(job.num_tasks):
        paths = job.task(task).paths
        if not paths.result_pickle.exists():
            say(f"error: rank {task} was killed; the others could not continue. Its log: {paths.stdout}\n{again}")
            return 1
        try:
            job.task(task).result()
        except FailedJobError:
            raised.append((paths.result_pickle.stat().st_mtime, task))
    if raised:
        paths = job.task(min(raised)[1]).paths
        text = paths.stdout.read_text(errors="replace")
        reason = (EXCEPTION.findall(text) or text.splitlines() or ["it printed nothing"])[-1]
        say(f"error: rank {min(raised)[1]} failed first: {reason}\nIts log: {paths.stdout}\n{again}")
        return 1
    if files.again.exists():
        say(f"stopped, with a checkpoint. {again}")
        return 128 + received[0] if received else 0
    return 0
