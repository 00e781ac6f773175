"""Submitting a job through submitit, to Slurm or as processes of this machine, and following it to its end."""

import argparse
import os
import shlex
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import psutil
import submitit
from submitit.core.utils import FailedJobError, FailedSubmissionError
from submitit.slurm.slurm import _make_sbatch_string

from fvdm.distributed import free_port
from fvdm.tracking.provenance import command_line
from launchers.after import Files, ask
from launchers.job import POLL, Job
from launchers.resources import ROOT, Resources, array_numbers

GRACE = 15.0  # seconds that the ranks of a job of this machine have to end when one has failed
AGAIN = "Type the same command again to go on from the newest checkpoint."
START = f"{shlex.quote(sys.executable)} {shlex.quote(str(ROOT / 'launchers' / 'start.py'))}"


def sbatch_file(resources: Resources, folder: Path, name: str) -> str:
    """The text that sbatch would get; needs no Slurm."""
    command = f"{START} -u -m submitit.core._submit {shlex.quote(str(folder.resolve()))}"
    return _make_sbatch_string(command, folder.resolve(), **resources.sbatch_parameters(name, folder))


def submit(jobs: Sequence[Job], folder: Path, name: str) -> "list[submitit.Job[bool]]":
    """Submit jobs that ask for the same resources, several as one array; logs and the sbatch file go to `folder`.

    Raises:
        ValueError: if Slurm refuses them.
    """
    resources = jobs[0].resources
    if resources.local:
        assert len(jobs) == 1, "arrays are Slurm's"
        return [_start_here(jobs[0], folder)]
    executor = submitit.SlurmExecutor(folder=folder, python=START)
    executor.update_parameters(**resources.sbatch_parameters(name, folder))
    try:
        if len(jobs) == 1:
            return [executor.submit(jobs[0], 0, 0)]
        executor.update_parameters(array_parallelism=array_numbers(resources.array)[1])
        with executor.batch():
            return [executor.submit(job, 0, 0) for job in jobs]
    except (FailedJobError, FailedSubmissionError) as error:
        raise ValueError(f"Slurm refused the job: {' '.join(str(error).split())}") from None


def _start_here(job: Job, folder: Path) -> "submitit.Job[bool]":
    resources = job.resources
    executor = submitit.AutoExecutor(folder=folder, cluster="local")
    executor.update_parameters(
        nodes=1,
        tasks_per_node=resources.world_size,
        gpus_per_node=resources.nodes * resources.gpus_per_node,
        timeout_min=60 * 24 * 365,
        stderr_to_stdout=True,
    )
    # The terminal sends Ctrl-C to all processes; the ranks ignore it, and the launcher turns it into a clean stop.
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        return executor.submit(job, os.getpid(), free_port())
    finally:
        signal.signal(signal.SIGINT, before)


def launch(jobs: Sequence[Job], folder: Path, name: str, options: argparse.Namespace) -> int:
    """Do what the options of a launcher ask: print the sbatch file, or submit and say where to look, or follow.

    Args:
        jobs: one, or those of an array.
        folder: of the logs and the sbatch file.
        name: of the job in Slurm.
        options: with `follow` and `dry_run`.

    Returns:
        The exit code: of the job where it was followed to its end, else 0.

    Raises:
        ValueError: if the job cannot be submitted.
    """
    resources = jobs[0].resources
    os.environ.setdefault("FVDM_COMMAND", command_line())  # The ranks report it as what was typed.
    if options.dry_run:
        print(sbatch_file(resources, folder, name))
        return 0
    runs = submit(jobs, folder, name)
    first = runs[0]
    if len(runs) > 1:
        print(f"jobs {first.job_id} to {runs[-1].job_id}, logs in {folder}")
        print(f"cancel with: scancel {first.job_id.partition('_')[0]}")
        return 0
    print(f"job {first.job_id}, log {first.task(0).paths.stdout}", flush=True)
    if resources.local:
        return follow_here(first)
    if options.follow:
        return follow_on_slurm(Files(folder.resolve(), first.job_id))
    print(f"follow with: tail -F {first.task(0).paths.stdout}\ncancel with: scancel {first.job_id}")
    return 0


def follow_here(job: "submitit.Job[bool]") -> int:
    """Show the first rank's log until the job ends; the exit code of the whole: 0, 1 (it failed) or 2 (settings)."""
    offset = 0
    log = job.task(0).paths.stdout
    cause = Files(log.parent, job.job_id).cause
    process: Any = getattr(job, "_process", None)
    done = False
    while not done:
        try:
            time.sleep(POLL)
            done = job.done()
            offset = _show(log, offset)
            if cause.exists() and time.time() - cause.stat().st_mtime > GRACE:  # A rank that hangs does not end.
                for rank in psutil.Process(process.pid).children(recursive=True):
                    rank.kill()
        except KeyboardInterrupt:
            print("\nstopping after this step, with a checkpoint", flush=True)
            process.send_signal(signal.SIGTERM)
    return _verdict(job)


def follow_on_slurm(files: Files) -> int:
    """Show the job's log until it ends, through all its starts; the exit code as of `follow_here`.

    Ctrl-C ends the following and leaves the job alone.
    """
    offset = 0
    try:
        while True:
            state = _state(files.job)
            offset = _show(files.log, offset)
            outcome = files.outcome.read_text().split(None, 1) if files.outcome.exists() else []
            if state in ("PENDING", "RUNNING", "COMPLETING", "REQUEUED", "CONFIGURING", "SUSPENDED"):
                pass
            elif outcome[:1] == ["again"] and len(outcome) > 1:
                files, offset = Files(files.folder, outcome[1].strip()), 0
            else:
                break
            time.sleep(1)
    except KeyboardInterrupt:
        print(f"\njob {files.job} goes on; cancel it with: scancel {files.job}", flush=True)
        return 0
    what, sentence = (*outcome, "", "")[:2]
    if what == "done":
        return 0
    print(f"error: {sentence.strip() or f'job {files.job} ended as {state or what}'}", file=sys.stderr, flush=True)
    return 2 if what == "error" else 1


def _state(job: str) -> str:
    return ask("squeue", "-h", "-t", "all", "-j", job, "-o", "%T").stdout.strip()


def _show(log: Path, offset: int) -> int:
    if not log.exists():
        return offset
    with log.open(errors="replace") as file:
        file.seek(offset)
        for line in iter(file.readline, ""):
            if not line.startswith("submitit "):
                print(line, end="", flush=True)
        return file.tell()


def _verdict(job: "submitit.Job[bool]") -> int:
    """Name the first cause: a user's mistake, what a rank has found out, a rank that vanished, one that raised."""
    files = Files(job.task(0).paths.folder, job.job_id)
    if files.error.exists():
        print(f"error: {files.error.read_text()}", file=sys.stderr, flush=True)
        return 2
    if files.cause.exists():
        print(f"error: {files.cause.read_text()}\n{AGAIN}", flush=True)
        return 1
    raised: list[tuple[float, int]] = []
    for task in range(job.num_tasks):
        paths = job.task(task).paths
        if not paths.result_pickle.exists():
            print(f"error: rank {task} was killed; the others could not go on. Its log: {paths.stdout}", flush=True)
            print(AGAIN, flush=True)
            return 1
        try:
            job.task(task).result()
        except FailedJobError:
            raised.append((paths.result_pickle.stat().st_mtime, task))
    if raised:
        paths = job.task(min(raised)[1]).paths
        last = [line for line in paths.stdout.read_text(errors="replace").splitlines() if line.strip()][-1:]
        print(f"error: rank {min(raised)[1]} failed first: {''.join(last)}\nIts log: {paths.stdout}", flush=True)
        return 1
    return 0
