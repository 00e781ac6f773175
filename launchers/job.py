"""What every rank of a job runs: the environment of `torch.distributed`, the work, and a report of how it ended."""

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
from typing import NoReturn

import psutil
import submitit

from data_prep.slurm_jobs import remove_result
from launchers.after import Files
from launchers.config import Resources

logger = logging.getLogger("fvdm.launchers")

POLL = 0.3  # seconds between two looks at a file or a process
FIRST_PORT, PORTS = 20_000, 12_000  # below the ports that Linux assigns to programs that ask for none
TIMEOUT = 300.0  # seconds that a rank waits for rank 0 to write where the ranks meet


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
        """The folder whose newest `step-*` shows how far the work has come."""
        return None

    def __call__(self, launcher: int = 0, port: int = 0, gpus: str | None = None) -> bool:
        """Run one rank.

        Args:
            launcher: process that started a job on this machine, with which its ranks end; 0 on a cluster.
            port: of the rendezvous on this machine; on a cluster, rank 0 chooses it.
            gpus: CUDA_VISIBLE_DEVICES of that process, which submitit has replaced; None if it was not set.

        Returns:
            Whether there is more to do.

        Raises:
            SystemExit: code 2 for a mistake of the user's, 1 for a disk or a hung peer; the sentence goes to a file.
        """
        environment = submitit.JobEnvironment()
        remove_result(environment.paths.result_pickle)
        files = Files(Path(os.environ["SUBMITIT_FOLDER"]), environment.job_id)
        if launcher:
            _end_with(launcher)
            _show_gpus(gpus)
        _log_to_stdout(environment.global_rank)
        if environment.global_rank == 0 and self.checkpoints:
            files.progress.write_text(str(self.checkpoints.resolve()))
        try:
            address, port = ("127.0.0.1", port) if port else _meet(files, environment, self.resources.interface)
            self._set_environment(environment, address, port)
            again = self.work()
        except ValueError as error:
            _note(files.error, error)
            _leave(2)
        except OSError as error:  # A full disk, which may be empty at the next start; a peer that hangs.
            _note(files.cause, error)
            _leave(1)
        if again and environment.global_rank == 0:
            files.again.touch()
        return again

    def _set_environment(self, environment: submitit.JobEnvironment, address: str, port: int) -> None:
        local = self.resources.local
        cores = self.resources.cpus_per_task
        if local and not cores:
            cores = max(1, (os.cpu_count() or 1) // self.resources.world_size)
        os.environ.update(
            RANK=str(environment.global_rank),
            LOCAL_RANK=str(environment.local_rank),
            WORLD_SIZE=str(environment.num_tasks),
            LOCAL_WORLD_SIZE=str(self.resources.world_size if local else self.resources.ranks_per_node),
            MASTER_ADDR=address,
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


def _leave(code: int) -> NoReturn:
    from fvdm.distributed import leave  # PyTorch, which the launcher itself does not need.

    leave(code)


def _note(path: Path, error: Exception) -> None:
    """Write down why this rank ends; the first rank's sentence counts."""
    sentence = str(error).strip().rpartition("\n")[2]  # That of a process that reads ahead comes with its traceback.
    logger.error("error: %s", sentence)
    with contextlib.suppress(OSError), path.open("x") as file:
        file.write(sentence)


def _meet(files: Files, environment: submitit.JobEnvironment, interface: str) -> tuple[str, int]:
    """Address and port of the rendezvous: rank 0 takes the first of the job's ports that is free, and writes a file.

    Raises:
        ValueError: if rank 0 has no such network interface.
        RuntimeError: if rank 0 writes nothing.
    """
    start = int(os.environ.get("SLURM_RESTART_COUNT", 0))
    place = files.folder / f"{files.job}_port-{start}"
    if environment.global_rank == 0:
        address = address_of(interface) if interface else environment.hostnames[0]
        for port in ports(environment.raw_job_id, start):
            with socket.socket() as probe, contextlib.suppress(OSError):
                probe.bind(("", port))
                break
        temporary = place.with_suffix(".tmp")
        temporary.write_text(f"{address} {port}")
        temporary.rename(place)
        return address, port
    deadline = time.monotonic() + TIMEOUT
    # Listing the folder makes network file systems look again, where asking for the name would be answered from memory.
    while place.name not in os.listdir(files.folder):
        if time.monotonic() > deadline:
            raise RuntimeError(f"rank 0 wrote no {place} in {TIMEOUT:.0f} s: is the run's folder shared by all nodes?")
        time.sleep(POLL)
    address, number = place.read_text().split()
    return address, int(number)


def address_of(interface: str) -> str:
    """The IP address of a network interface of this node, IPv4 where it has one.

    Raises:
        ValueError: if there is no such interface, or it has no address; names those that there are.
    """
    found = {name: {each.family: each.address for each in all_} for name, all_ in psutil.net_if_addrs().items()}
    addresses = found.get(interface, {})
    address = addresses.get(socket.AF_INET) or addresses.get(socket.AF_INET6, "").partition("%")[0]
    if not address:
        problem = "has no IP address" if interface in found else "does not exist"
        raise ValueError(
            f"--interface {interface} {problem} on {socket.gethostname()}; its interfaces: {', '.join(sorted(found))}"
        )
    return address


def _show_gpus(visible: str | None) -> None:
    """Restore the user's choice of GPUs, before this process has asked for any."""
    if visible is None:
        os.environ.pop("CUDA_VISIBLE_DEVICES", None)
    else:
        os.environ["CUDA_VISIBLE_DEVICES"] = visible


def _log_to_stdout(rank: int) -> None:
    """Rank 0 reports what it does, the others only what goes wrong; all with the time, to find the first cause."""
    logging.basicConfig(
        format="%(asctime)s " + (f"[rank {rank}] " if rank else "") + "%(message)s",
        datefmt="%H:%M:%S",
        stream=sys.stdout,
        force=True,
    )
    logging.getLogger("fvdm").setLevel(logging.INFO if rank == 0 else logging.WARNING)
    for name in ("submitit", "mlflow"):
        logging.getLogger(name).setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")


def _end_with(launcher: int) -> None:
    """End this process when its launcher has ended, for whatever reason: a rank left behind would hold the run."""
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
