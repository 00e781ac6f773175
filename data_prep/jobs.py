"""Runs the jobs of an encoding: processes on this machine, or the jobs of a Slurm array.

Job `j` of `n` makes the shards j, j + n, j + 2n, ... of the plan, so the jobs share nothing and wait for
nobody.
"""

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from data_prep.config import EncodeConfig
from data_prep.job import exit_status, python_path, run_job
from data_prep.slurm_jobs import follow, submit

if TYPE_CHECKING:
    from data_prep.reporting import EncodeReport
    from data_prep.shards import Work


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
    if config.cluster == "local":
        return _run_here(config, work, report)
    return follow(jobs or submit(config), work, report, strict=config.strict)


def _run_here(config: EncodeConfig, work: "Work", report: "EncodeReport") -> int:
    threads = max(1, len(os.sched_getaffinity(0)) // config.jobs)
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "PYTHONPATH": python_path()}
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
        frames = report.follow(work, ended, 0.5)
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


if __name__ == "__main__":
    sys.exit(_child())
