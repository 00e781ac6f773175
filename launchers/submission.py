"""Submitting a job through submitit, to Slurm or as processes of this machine, and following it to its end."""

import os
import re
import shlex
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import submitit
from submitit.core.utils import FailedJobError, FailedSubmissionError
from submitit.slurm.slurm import _make_sbatch_string

from data_prep.slurm_jobs import ENDED, use_cluster
from fvdm.tracking.provenance import command_line
from launchers.after import STATUS, Files, ask, close_mlflow_run
from launchers.config import Resources, array_numbers
from launchers.job import Job
from launchers.local import follow_here, show, start_here
from launchers.resources import ROOT, sbatch_parameters

START = f"{shlex.quote(sys.executable)} {shlex.quote(str(ROOT / 'launchers' / 'start.py'))}"


class _Executor(submitit.SlurmExecutor):
    """submitit's, for folders with a percent sign in their names, which Slurm takes for a pattern."""

    def _make_submission_file_text(self, command: str, uid: str) -> str:
        return _make_sbatch_string(command=command, folder=str(self.folder).replace("%", "%%"), **self.parameters)


def sbatch_file(resources: Resources, folder: Path, name: str) -> str:
    """The text that sbatch would get; needs no Slurm."""
    folder = folder.resolve()
    command = f"{START} -u -m submitit.core._submit {shlex.quote(str(folder))}"
    pattern = str(folder).replace("%", "%%")
    return _make_sbatch_string(command, pattern, **sbatch_parameters(resources, name, folder))


def submit(jobs: Sequence[Job], folder: Path, name: str) -> "list[submitit.Job[bool]]":
    """Submit jobs that ask for the same resources, several as one array; logs and the sbatch file go to `folder`.

    Raises:
        ValueError: if Slurm refuses them.
    """
    resources = jobs[0].resources
    if resources.local:
        assert len(jobs) == 1, "arrays are Slurm's"
        return [start_here(jobs[0], folder)]
    executor = _Executor(folder=folder, python=START)
    executor.update_parameters(**sbatch_parameters(resources, name, folder))
    try:
        if len(jobs) == 1:
            return [executor.submit(jobs[0])]
        executor.update_parameters(array_parallelism=array_numbers(resources.array)[1])
        with executor.batch():
            return [executor.submit(job) for job in jobs]
    except (FailedJobError, FailedSubmissionError) as error:
        raise ValueError(f"Slurm refused the job: {' '.join(str(error).split())}") from None


def launch(jobs: Sequence[Job], folder: Path, name: str) -> int:
    """Do what the settings ask: print the sbatch file, or submit and print where to look, or follow.

    Args:
        jobs: one, or those of an array.
        folder: of the logs and the sbatch file.
        name: of the job in Slurm.

    Returns:
        The exit code: of the job where it was followed to its end, else 0.

    Raises:
        ValueError: if the job cannot be submitted, or the folder's name is a pattern of submitit's.
    """
    resources = jobs[0].resources
    if pattern := re.search("%[jtAa]", str(folder.resolve())):
        raise ValueError(f"{folder} holds {pattern[0]}, which submitit replaces by a number: choose another name")
    os.environ.setdefault("FVDM_COMMAND", command_line())  # The ranks report it as what was typed.
    if resources.dry_run:
        print(sbatch_file(resources, folder, name))
        return 0
    use_cluster(resources.sbatch)
    runs = submit(jobs, folder, name)
    first = runs[0]
    if len(runs) > 1:
        print(f"jobs {first.job_id} to {runs[-1].job_id}, logs in {folder}")
        print(f"cancel with: scancel {first.job_id.partition('_')[0]}")
        return 0
    print(f"job {first.job_id}, log {first.task(0).paths.stdout}", flush=True)
    if resources.local:
        return follow_here(first)
    if resources.follow:
        return follow_on_slurm(Files(folder.resolve(), first.job_id))
    print(f"follow with: tail -F {first.task(0).paths.stdout}\ncancel with: scancel {first.job_id}")
    return 0


def follow_on_slurm(files: Files) -> int:
    """Show the job's log until it ends, through all its starts, and close its MLflow run.

    Ctrl-C ends the following and leaves the job alone.

    Returns:
        The exit code, as of `follow_here`.
    """
    offset = 0
    try:
        while True:
            asked = ask("squeue", "-h", "-t", "all", "-j", files.job, "-o", "%T")
            state = asked.stdout.strip()
            offset = show(files.log, offset)
            outcome = files.outcome.read_text().split(None, 1) if files.outcome.exists() else []
            # Only Slurm's own word ends a job, however long its controller is away.
            unknown = asked.returncode and "Invalid job id" not in asked.stderr
            if unknown or state not in ("", *ENDED):
                pass
            elif outcome[:1] == ["again"] and len(outcome) > 1:
                files, offset = Files(files.folder, outcome[1].strip()), 0
            else:
                break
            time.sleep(1)
    except KeyboardInterrupt:
        print(f"\njob {files.job} continues; cancel it with: scancel {files.job}", flush=True)
        return 0
    what, sentence = (*outcome, "", "")[:2]
    close_mlflow_run(files.run_folder, STATUS.get(what, "KILLED" if state == "CANCELLED" else "FAILED"))
    if what == "done":
        return 0
    end = f"job {files.job} " + (f"ended as {state}" if state else "is no longer in Slurm's queue")
    print(f"error: {sentence.strip() or end}", file=sys.stderr, flush=True)
    return 2 if what == "error" else 1
