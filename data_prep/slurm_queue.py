"""What submitit leaves open: which jobs of an array wait, run, or have left the queue, and what an earlier start left.

The controller alone is asked: many clusters keep no accounting, and jobs that were cancelled before their start may
never be in it.
"""

import os
import subprocess
import time
from collections.abc import Iterable, Sequence
from pathlib import Path

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
