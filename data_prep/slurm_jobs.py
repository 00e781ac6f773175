"""The jobs of an encoding on Slurm: submitting an array, and following it to its end. The only submitit import here.

What submitit leaves open is asked of the controller alone: which jobs wait, run, or have left the queue. Many clusters
keep no accounting, and jobs that were cancelled before their start may never be in it.
"""

import json
import os
import shlex
import shutil
import subprocess
import time
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from data_prep.config import EncodeConfig
from data_prep.job import python_path, run_job
from fvdm.files import write_text

if TYPE_CHECKING:
    from data_prep.reporting import EncodeReport
    from data_prep.shards import Work

LOGS = ".slurm"  # folder of the jobs' logs, in the folder of the shards
TIME_LIMITS = 1_000_000  # that a job may meet
CPUS = 4  # cores that a job asks for, where the nodes have them
GRACE = 15.0  # seconds in which the result of a job that has left the queue may still reach this machine
SHORTEST_PAUSE, LONGEST_PAUSE = 2.0, 30.0  # seconds between two looks
# The states of a job that ended without having done its work. Slurm starts none of them again: it says PENDING then.
BROKEN = ("BOOT_FAIL", "CANCELLED", "DEADLINE", "FAILED", "NODE_FAIL", "OUT_OF_MEMORY", "PREEMPTED", "TIMEOUT")
ENDED = ("COMPLETED", *BROKEN)


def use_cluster(words: Iterable[str]) -> None:
    """Let the Slurm commands of this process speak to the cluster that jobs are sent to: squeue, scancel, sinfo.

    Args:
        words: options of sbatch, such as `clusters=gpu`; without that one, nothing changes.
    """
    for word in words:
        name, _, value = word.lstrip("-").partition("=")
        if name == "clusters" and value:
            os.environ["SLURM_CLUSTERS"] = value


def remove_result(path: Path) -> None:
    """Remove what an earlier start of a requeued job left as its result, before this start writes its own.

    A result would be taken for this start's. At the temporary file of one, which a kill or a full disk leaves, submitit
    stops with an error, at the end of every start.

    Args:
        path: of the result, `paths.result_pickle` of submitit's environment.
    """
    for left in (path, path.with_suffix(f"{path.suffix}.save_tmp")):
        left.unlink(missing_ok=True)


class ArrayJob:
    """What a Slurm job calls. At its time limit submitit queues it again, and it continues where it stopped."""

    def __init__(self, config: EncodeConfig, number: int) -> None:
        """Takes the command's settings, resolved, and the number of the job."""
        self.config, self.number = config, number

    def __call__(self) -> int:
        """Makes this job's shards; returns the exit status of the command."""
        import submitit

        remove_result(submitit.JobEnvironment().paths.result_pickle)
        return run_job(self.config, self.number)

    def checkpoint(self) -> Any:
        """Called by submitit at the time limit or a preemption: the same again."""
        import submitit

        return submitit.helpers.DelayedSubmission(self)


def queued(config: EncodeConfig) -> list[Any]:
    """The Slurm jobs of an earlier start of this command that have not ended, with their fellows."""
    use_cluster(config.slurm)
    folder = Path(config.out).resolve() / LOGS
    if config.cluster != "slurm" or not shutil.which("sbatch"):
        return []
    try:
        ids = json.loads((folder / "jobs.json").read_text())
    except (OSError, ValueError):
        return []
    import submitit

    jobs: list[Any] = [submitit.SlurmJob(folder, job_id, tasks=[0]) for job_id in ids]
    ended = {job.job_id for job in _with_result(jobs)}
    if not set(SlurmQueue(ids).active()) - ended:
        return []
    print(f"Slurm jobs {ids[0]} to {ids[-1]} are still there: watching them.")
    return jobs


def submit(config: EncodeConfig) -> list[Any]:
    """Submits the job array; its logs go to the folder `.slurm` of the shards.

    Args:
        config: the command's settings, resolved.

    Raises:
        ValueError: Slurm is not here, or does not take the jobs.
    """
    import submitit

    if not shutil.which("sbatch"):
        raise ValueError("There is no sbatch here: use --cluster local, or run this on a machine of the cluster.")
    folder = Path(config.out).resolve() / LOGS
    options = {key.replace("-", "_"): value for key, _, value in (word.partition("=") for word in config.slurm)}
    cpus = int(options.pop("cpus_per_task", 0)) or max(config.workers or 0, config.encoders or 0) or _cpus(options)
    # A job is queued again at every time limit; submitit would give it up after three.
    executor = submitit.AutoExecutor(folder=folder, cluster="slurm", slurm_max_num_timeout=TIME_LIMITS)
    executor.update_parameters(
        name="encode",
        timeout_min=config.minutes,
        cpus_per_task=cpus,
        slurm_array_parallelism=config.jobs,
        slurm_setup=[f"export PYTHONPATH={shlex.quote(python_path())}"],
        slurm_additional_parameters=options,
    )
    submitted = replace(config, videos=os.path.abspath(config.videos), out=os.path.abspath(config.out))
    try:
        with executor.batch():
            jobs = [executor.submit(ArrayJob(submitted, number)) for number in range(config.jobs)]
    except submitit.core.utils.FailedJobError as error:
        raise ValueError(
            f"Slurm does not take the jobs: {' '.join(str(error).split())}. They ask for {cpus} CPUs each; for other "
            "resources, type such as: --slurm cpus_per_task=2 mem=8G partition=NAME"
        ) from None
    write_text(folder / "jobs.json", json.dumps([job.job_id for job in jobs]))
    print(
        f"Submitted Slurm jobs {jobs[0].job_id} to {jobs[-1].job_id}; they continue if this command is stopped, "
        f"and the same command watches them again; to end them, type: scancel {jobs[0].job_id.partition('_')[0]}. "
        f"Logs: {folder}\n"
        f"The VAE runs on {config.device} in {config.precision}, {config.chunk} frames a call, with {cpus} CPUs a job "
        "(--device, --precision, --chunk, --slurm cpus_per_task=N)."
    )
    return jobs


def _cpus(options: dict[str, str]) -> int:
    """Cores that a job asks for: no more than the smallest node of the partition has."""
    where = [f"--partition={options['partition']}"] if "partition" in options else []
    command = ["sinfo", "--noheader", "--format=%c", *where]
    try:
        found = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True).stdout.split()
    except (OSError, subprocess.SubprocessError):
        return CPUS
    return max(1, min([CPUS, *(int(word.rstrip("+")) for word in found if word.rstrip("+").isdigit())]))


def follow(jobs: Sequence[Any], work: "Work", report: "EncodeReport", *, strict: bool) -> int:
    """Waits for the jobs, with a progress bar; returns the frames that they have encoded meanwhile.

    Args:
        jobs: those of the array.
        work: what they make.
        report: of the progress, begun.
        strict: a video that cannot be used ends all of them.

    Raises:
        ValueError: a job failed, or left the queue before its work was done; says which and where its log is.
    """
    queue = SlurmQueue([job.job_id for job in jobs])
    lost: dict[str, str] = {}

    def ended() -> bool:
        done = _with_result(jobs)
        stopped = strict and any(map(_stopped, done))
        if stopped:
            for job in jobs:
                job.cancel(check=False)
        waiting = [job.job_id for job in jobs if job not in done]
        lost.clear()
        lost.update(queue.lost(waiting))
        return stopped or all(name in lost for name in waiting)

    frames = report.follow(work, ended, 1.0)
    done = _with_result(jobs)
    if strict and any(map(_stopped, done)):
        return frames
    for job in done:
        if job.exception() is not None:
            raise ValueError(f"Slurm job {job.job_id} failed: see {job.paths.stderr}. What is done is kept.")
    missing = [job for job in jobs if job not in done]
    if missing and not all(map(work.complete, work.plan.shards)):
        raise ValueError(_what_was_lost(missing, lost[missing[0].job_id]))
    return frames


def _what_was_lost(jobs: Sequence[Any], state: str) -> str:
    """The sentence on jobs that have left Slurm's queue without a result, by the first and its last state there."""
    log = jobs[0].paths.stderr
    what = f"Slurm job {jobs[0].job_id}" + (f", like {len(jobs) - 1} more," if len(jobs) > 1 else "")
    end = f"ended as {state}" if state else "is no longer in Slurm's queue"
    where = f"its log is {log}" if log.exists() else "it never started"
    return f"{what} {end} before its work was done; {where}. What is done is kept: start the same command again."


def _with_result(jobs: Sequence[Any]) -> list[Any]:
    """The jobs that have left a result: only these may be asked for it, as submitit waits for one without end."""
    # Listing the folder makes network file systems look again, where asking for the name would be answered from memory.
    names = set(os.listdir(jobs[0].paths.result_pickle.parent))
    return [job for job in jobs if job.paths.result_pickle.name in names]


def _stopped(job: Any) -> bool:
    """Whether a job has met a video that cannot be used, with --strict; a job that crashed has not."""
    return job.exception() is None and job.result() == 3


class SlurmQueue:
    """The queue's word on the jobs of one array, or on one job; asked more and more seldom."""

    def __init__(self, jobs: Sequence[str]) -> None:
        """Takes the names of the jobs: `123_0`, `123_1`, ... of an array, `123` of a single one."""
        self.jobs = tuple(jobs)
        self._states: dict[str, str] = dict.fromkeys(jobs, "PENDING")
        self._left: dict[str, float] = {}  # when a look first found a job to have left
        self._began = time.monotonic()
        self._next = self._began
        self._silent = False

    def active(self) -> list[str]:
        """The jobs that wait or run; all of them until Slurm has answered once."""
        self._look()
        return [job for job in self.jobs if job not in self._left]

    def lost(self, jobs: Sequence[str]) -> dict[str, str]:
        """Those of the jobs, none of which has left a result, that will leave none, with their last state.

        The state is empty for a job that Slurm has forgotten.
        """
        if jobs and time.monotonic() >= self._next:
            self._look()
        late = time.monotonic() - GRACE
        over = {job: self._states[job] for job in jobs if job in self._left}
        return {job: state for job, state in over.items() if state in BROKEN or self._left[job] <= late}

    def _look(self) -> None:
        now = time.monotonic()
        self._next = now + min(LONGEST_PAUSE, max(SHORTEST_PAUSE, (now - self._began) / 10))
        states = _ask(self.jobs[0].partition("_")[0])
        if states is None:
            if not self._silent:
                print("Slurm does not answer; this command waits for it, and the jobs continue.", flush=True)
            self._silent = True
            return
        self._silent = False
        for job in self.jobs:
            # Of jobs that were cancelled before their start, there may be one line for the array, or none.
            self._states[job] = states.get(job, states.get(job.partition("_")[0], ""))
            if self._states[job] in ("", *ENDED):
                self._left.setdefault(job, now)
            else:
                self._left.pop(job, None)


def _ask(number: str) -> dict[str, str] | None:
    """The states of a job, or of the jobs of an array, by name; None if Slurm does not answer."""
    command = ["squeue", "--noheader", "--array", "--states=all", f"--jobs={number}", "--format=%i|%T"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired):
        return None
    if done.returncode and "Invalid job id" not in done.stderr:
        return None
    return dict(line.strip().split("|", 1) for line in done.stdout.splitlines() if "|" in line)
