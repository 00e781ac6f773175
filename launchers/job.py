"""What every rank of a job runs: the environment of `torch.distributed`, the work, and a word on how it ended."""

import contextlib
import logging
import os
import socket
import sys
import threading
import time
import warnings
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil
import submitit

from launchers.after import Files
from launchers.resources import Resources

logger = logging.getLogger("fvdm.launchers")

POLL = 0.3  # seconds between two looks at a file or a process
FIRST_PORT, PORTS = 20_000, 12_000  # below the ports that Linux hands out by itself
PATIENCE = 300.0  # seconds that a rank waits for rank 0 to say where the ranks meet


@dataclass(frozen=True)
class Job(ABC):
    """The work of a rank.

    Attributes:
        resources: what was asked of the cluster.
    """

    resources: Resources

    @abstractmethod
    def work(self) -> bool:
        """The rank's work; True when there is more, and the job should be started again."""

    @property
    def checkpoints(self) -> Path | None:
        """The folder whose newest `step-*` tells how far the work has come."""
        return None

    def __call__(self, launcher: int, port: int) -> bool:
        """Run one rank.

        Args:
            launcher: process that started a job on this machine, with which its ranks end; 0 on a cluster.
            port: of the rendezvous; 0 lets rank 0 choose it.

        Returns:
            Whether there is more to do.

        Raises:
            SystemExit: code 2 for a mistake of the user's, 1 for a disk or a hung peer; the sentence goes to a file.
        """
        environment = submitit.JobEnvironment()
        environment.paths.result_pickle.unlink(missing_ok=True)  # Left by a requeued job, it would be taken for ours.
        files = Files(Path(os.environ["SUBMITIT_FOLDER"]), environment.job_id)
        if launcher:
            _end_with(launcher)
        _log_to_stdout(environment.global_rank)
        if environment.global_rank == 0 and self.checkpoints:
            files.progress.write_text(str(self.checkpoints.resolve()))
        self._set_environment(environment, port or _meet(files, environment))
        try:
            again = self.work()
        except ValueError as error:
            _note(files.error, error)
            raise SystemExit(2) from None
        except OSError as error:  # A full disk, which may be empty at the next start; a peer that hangs.
            _note(files.cause, error)
            raise SystemExit(1) from None
        if again and environment.global_rank == 0:
            files.again.touch()
        return again

    def _set_environment(self, environment: submitit.JobEnvironment, port: int) -> None:
        local = self.resources.local
        cores = self.resources.cpus_per_task
        if local and not cores:
            cores = max(1, (os.cpu_count() or 1) // self.resources.world_size)
        os.environ.update(
            RANK=str(environment.global_rank),
            LOCAL_RANK=str(environment.local_rank),
            WORLD_SIZE=str(environment.num_tasks),
            MASTER_ADDR="127.0.0.1" if local else environment.hostnames[0],
            MASTER_PORT=str(port),
        )
        if cores:
            os.environ["OMP_NUM_THREADS"] = str(cores)
        interface = self.resources.interface or ("lo" if local else "")
        if interface:
            os.environ.update(GLOO_SOCKET_IFNAME=interface, NCCL_SOCKET_IFNAME=interface)


def ports(job: str, start: int) -> Iterator[int]:
    """The ports that a job tries, in order: derived from its number and from how often it was started."""
    first = int(job) + 97 * start
    yield from (FIRST_PORT + (first + 31 * attempt) % PORTS for attempt in range(PORTS))


def _note(path: Path, error: Exception) -> None:
    """Say why this rank ends; the first rank's word counts."""
    sentence = str(error).strip().rpartition("\n")[2]  # That of a process that reads ahead comes with its traceback.
    logger.error("error: %s", sentence)
    with contextlib.suppress(OSError), path.open("x") as file:
        file.write(sentence)


def _meet(files: Files, environment: submitit.JobEnvironment) -> int:
    """The port of the rendezvous: rank 0 takes the first of the job's that is free and tells the others by a file."""
    start = int(os.environ.get("SLURM_RESTART_COUNT", 0))
    place = files.folder / f"{files.job}_port-{start}"
    if environment.global_rank == 0:
        for port in ports(environment.raw_job_id, start):
            with socket.socket() as probe, contextlib.suppress(OSError):
                probe.bind(("", port))
                break
        temporary = place.with_suffix(".tmp")
        temporary.write_text(str(port))
        temporary.rename(place)
        return port
    deadline = time.monotonic() + PATIENCE
    # Listing the folder makes network file systems look again, where asking for the name would be answered from memory.
    while place.name not in os.listdir(files.folder):
        if time.monotonic() > deadline:
            raise RuntimeError(f"rank 0 wrote no {place} in {PATIENCE:.0f} s: is the run's folder shared by all nodes?")
        time.sleep(POLL)
    return int(place.read_text())


def _log_to_stdout(rank: int) -> None:
    """Rank 0 tells what it does, the others only what goes wrong; all with their time, to find the first cause."""
    logging.basicConfig(
        format="%(asctime)s " + (f"[rank {rank}] " if rank else "") + "%(message)s",
        datefmt="%H:%M:%S",
        stream=sys.stdout,
        force=True,
    )
    logging.getLogger("fvdm").setLevel(logging.INFO if rank == 0 else logging.WARNING)
    for talkative in ("submitit", "mlflow"):
        logging.getLogger(talkative).setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")


def _end_with(launcher: int) -> None:
    """End this process when its launcher is gone, however it went: a rank left behind would hold the run."""
    parent = psutil.Process(launcher)

    def alive() -> bool:
        try:
            return parent.is_running() and parent.status() != psutil.STATUS_ZOMBIE
        except psutil.NoSuchProcess:
            return False

    def watch() -> None:
        while alive():
            time.sleep(POLL)
        os._exit(1)

    threading.Thread(target=watch, name="end-with-launcher", daemon=True).start()
