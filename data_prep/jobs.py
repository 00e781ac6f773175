"""Runs the jobs of an encoding: processes on this machine, or a Slurm job array. The only submitit import
here.

Job `j` of `n` makes the shards j, j + n, j + 2n, ... of the plan, so the jobs share nothing and wait for
nobody.
"""

import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from data_prep.config import EncodeConfig
from data_prep.job import exit_status, run_job
from data_prep.slurm_queue import SlurmQueue, remove_result, use_cluster
from fvdm.files import write_text

if TYPE_CHECKING:
    from data_prep.reporting import EncodeReport
    from data_prep.shards import Work

ROOT = Path(__file__).resolve().parents[1]
SLURM_LOGS = ".slurm"
TIME_LIMITS = 1_000_000  # that a job may meet
CPUS = 4  # cores that a Slurm job asks for, where the nodes have them


def run_jobs(config: EncodeConfig, work: "Work", report: "EncodeReport", jobs: Sequence[Any]) -> int:
    """Starts the jobs and waits for them, with a progress bar; returns the frames that they have encoded.

    Args:
        config: the command's settings, resolved.
        work: what is made.
        report: of the progress, begun.
        jobs: those of an earlier start that are still there, see `queued`; only these are watched then.

    Raises:
        ValueError: a job failed; says which and where its log is.
    """
    idle = config.jobs - sum(any(work.plan.shards[job :: config.jobs]) for job in range(config.jobs))
    if idle:
        print(f"{idle} of {config.jobs} jobs have no shard to make: a smaller --shard-mb gives more shards.")
    if config.cluster == "slurm":
        return _run_slurm(config, work, report, jobs or _submit(config, work.out.resolve() / SLURM_LOGS))
    return _run_local(config, work, report)


def _wait(work: "Work", report: "EncodeReport", ended: Callable[[], bool], seconds: float) -> int:
    """Shows how far the jobs are until they have ended; returns the frames that they have encoded meanwhile."""
    from data_prep.reporting import FrameCount

    counted = FrameCount.of_all_jobs(work.out)
    frames, over = 0, False
    while not over:
        over = ended()
        frames = FrameCount.of_all_jobs(work.out) - counted
        report.update(sum(map(work.done, work.plan.shards)) - report.before, frames)
        if not over:
            time.sleep(seconds)
    return frames


def _run_local(config: EncodeConfig, work: "Work", report: "EncodeReport") -> int:
    threads = max(1, len(os.sched_getaffinity(0)) // config.jobs)
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "PYTHONPATH": _python_path()}
    command = [sys.executable, "-m", "data_prep.jobs"]
    processes = []
    for number in range(config.jobs):
        child = replace(config, device=_device_of(config, number))
        process = subprocess.Popen(command, stdin=subprocess.PIPE, env=environment, text=True)
        assert process.stdin is not None
        process.stdin.write(json.dumps([vars(child), number]) + "\n")
        process.stdin.flush()  # and left open: the job ends when this process is gone
        processes.append(process)

    def ended() -> bool:
        codes = [process.poll() for process in processes]
        return all(code is not None for code in codes) or (config.strict and 3 in codes)

    try:
        frames = _wait(work, report, ended, 0.5)
    finally:
        for process in processes:
            process.terminate()
        for process in processes:
            process.wait()
    failed = [number for number, process in enumerate(processes) if process.returncode not in (0, 3, -signal.SIGTERM)]
    if failed:
        raise ValueError(f"Job {failed[0]} of {config.jobs} failed; what is done is kept, start the command again.")
    return frames


def _device_of(config: EncodeConfig, number: int) -> str:
    """Where a job on this machine encodes: the GPUs go round, unless one is named."""
    import torch

    assert config.device is not None
    return f"cuda:{number % max(1, torch.cuda.device_count())}" if config.device == "cuda" else config.device


def _child() -> int:
    """A job process: reads its settings from the first line of stdin, and ends when stdin closes."""
    # Ctrl-C on a terminal reaches all its processes; the command ends its jobs itself.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    values, number = json.loads(sys.stdin.readline())
    values |= {name: tuple(values[name]) for name in ("split_files", "slurm", "buckets")}

    def watch() -> None:
        sys.stdin.read()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
    return exit_status(lambda: run_job(EncodeConfig(**values), number), signals=False)


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


def _submit(config: EncodeConfig, folder: Path) -> list[Any]:
    """Submits the job array; its logs go to `folder`."""
    import submitit

    if not shutil.which("sbatch"):
        raise ValueError("There is no sbatch here: use --cluster local, or run this on a machine of the cluster.")
    options = {key.replace("-", "_"): value for key, _, value in (word.partition("=") for word in config.slurm)}
    cpus = int(options.pop("cpus_per_task", 0)) or max(config.workers or 0, config.encoders or 0) or _cpus(options)
    # A job is queued again at every time limit; submitit would give it up after three.
    executor = submitit.AutoExecutor(folder=folder, cluster="slurm", slurm_max_num_timeout=TIME_LIMITS)
    executor.update_parameters(
        name="encode",
        timeout_min=config.minutes,
        cpus_per_task=cpus,
        slurm_array_parallelism=config.jobs,
        slurm_setup=[f"export PYTHONPATH={shlex.quote(_python_path())}"],
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


def _run_slurm(config: EncodeConfig, work: "Work", report: "EncodeReport", jobs: Sequence[Any]) -> int:
    queue = SlurmQueue([job.job_id for job in jobs])
    lost: dict[str, str] = {}

    def ended() -> bool:
        done = _with_result(jobs)
        stopped = config.strict and any(map(_stopped, done))
        if stopped:
            for job in jobs:
                job.cancel(check=False)
        waiting = [job.job_id for job in jobs if job not in done]
        lost.clear()
        lost.update(queue.lost(waiting))
        return stopped or all(name in lost for name in waiting)

    frames = _wait(work, report, ended, 1.0)
    done = _with_result(jobs)
    if config.strict and any(map(_stopped, done)):
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


def queued(config: EncodeConfig) -> list[Any]:
    """The Slurm jobs of an earlier start of this command that have not ended, with their fellows."""
    use_cluster(config.slurm)
    folder = Path(config.out).resolve() / SLURM_LOGS
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


def _python_path() -> str:
    """PYTHONPATH by which a job finds this project, installed or not."""
    return os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))


if __name__ == "__main__":
    sys.exit(_child())
