"""Submitting a job of many ranks through submitit: to Slurm, or as processes of this machine."""

import argparse
import logging
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
import warnings
from abc import ABC, abstractmethod
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import psutil
import submitit

from fvdm.distributed import free_port

logger = logging.getLogger("fvdm.launchers")

WAIT_FOR_SIGNAL = 120  # seconds before a time limit at which Slurm warns the ranks
POLL = 0.3  # seconds between two looks at a log


@dataclass(frozen=True)
class Resources:
    """What a job asks of the cluster.

    Attributes:
        cluster: slurm, local, or auto: Slurm where sbatch exists.
        nodes: number of nodes; on this machine, of processes (or of groups of gpus-per-node processes).
        gpus_per_node: GPUs, and ranks, of a node; 0 runs one rank a node on the CPU. -1 takes what is here.
        cpus_per_task: CPU cores of a rank.
        time: time limit in minutes; a training that reaches it starts itself again.
        partition: Slurm partition.
        account: Slurm account.
        qos: Slurm quality of service.
        constraint: Slurm node features.
        mem: memory of a node, such as 200G.
        exclude: nodes to leave out.
        dependency: Slurm dependency, such as afterok:1234.
        interface: network interface of the rendezvous, such as ib0; the system's choice when empty.
    """

    cluster: str = "auto"
    nodes: int = 1
    gpus_per_node: int = -1
    cpus_per_task: int = 0
    time: int = 24 * 60
    partition: str = ""
    account: str = ""
    qos: str = ""
    constraint: str = ""
    mem: str = ""
    exclude: str = ""
    dependency: str = ""
    interface: str = ""

    @classmethod
    def add_arguments(cls, parser: argparse.ArgumentParser) -> None:
        """Offer every attribute as an option, with its text above."""
        texts = dict(
            line.strip().split(": ", 1)
            for line in (cls.__doc__ or "").splitlines()
            if line.strip().split(":")[0] in cls.__dataclass_fields__
        )
        for field in fields(cls):
            name = "--" + field.name.replace("_", "-")
            choices = ("auto", "slurm", "local") if field.name == "cluster" else None
            kind: Any = type(field.default)
            parser.add_argument(name, type=kind, default=field.default, choices=choices, help=texts[field.name])
        parser.add_argument("--follow", action="store_true", help="show the log until the job ends")

    @classmethod
    def from_options(cls, options: argparse.Namespace) -> "Resources":
        """Resolve what was left to the machine.

        Raises:
            ValueError: if Slurm is asked for and not there, or a number is out of range.
        """
        values = {field.name: getattr(options, field.name) for field in fields(cls)}
        slurm = shutil.which("sbatch") is not None
        if values["cluster"] == "slurm" and not slurm:
            raise ValueError("there is no sbatch on this machine; run this on a login node, or use --cluster local")
        if values["cluster"] == "auto":
            values["cluster"] = "slurm" if slurm else "local"
            print("submitting to Slurm" if slurm else "no Slurm here: running on this machine (--cluster local)")
        if values["nodes"] < 1:
            raise ValueError(f"--nodes {values['nodes']}: a job needs at least one node")
        if values["gpus_per_node"] < 0:
            values["gpus_per_node"] = _default_gpus(values["cluster"], values["nodes"])
        return cls(**values)

    @property
    def local(self) -> bool:
        """Whether the ranks are processes of this machine."""
        return self.cluster == "local"

    @property
    def ranks_per_node(self) -> int:
        """Ranks on each node: one per GPU, or one on the CPU."""
        return max(1, self.gpus_per_node)

    @property
    def world_size(self) -> int:
        """Number of ranks."""
        return self.nodes * self.ranks_per_node


def _default_gpus(cluster: str, nodes: int) -> int:
    if cluster == "slurm":
        return 8
    import torch

    here = torch.cuda.device_count()
    if here and nodes > here:
        raise ValueError(f"--nodes {nodes} --cluster local: this machine has {here} GPUs; use --nodes {here} or fewer")
    return 1 if here else 0


@dataclass(frozen=True)
class Job(ABC):
    """What every rank runs: sets up the environment of `torch.distributed`, then does the work.

    Attributes:
        resources: what was asked of the cluster.
    """

    resources: Resources

    @abstractmethod
    def work(self) -> bool:
        """The rank's work; True when the job should be started again."""

    def __call__(self, launcher: int, port: int) -> str:
        """Run one rank.

        Args:
            launcher: process that started a job on this machine, with which its ranks end; 0 on a cluster.
            port: of the rendezvous; 0 derives it from the job's number.

        Returns:
            "" or the sentence that says what the user should change.
        """
        # The time limit's signal can come before the work installs its own handler, and would end the process.
        signal.signal(signal.SIGUSR2, signal.SIG_IGN)
        environment = submitit.JobEnvironment()
        environment.paths.result_pickle.unlink(missing_ok=True)  # Left by a requeued job, it would be taken for ours.
        if launcher:
            _end_with(launcher)
        self._set_environment(environment, port)
        _log_to_stdout(environment.global_rank)
        try:
            again = self.work()
        except ValueError as error:
            logger.error("error: %s", error)
            return str(error)
        if again and not self.resources.local and environment.global_rank == 0:
            logger.info("the time limit is near: requeueing job %s", environment.raw_job_id)
            subprocess.run(["scontrol", "requeue", environment.raw_job_id], check=True, timeout=60)
        return ""

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
            MASTER_PORT=str(port or 20000 + int(environment.raw_job_id) % 20000),
        )
        if cores:
            os.environ["OMP_NUM_THREADS"] = str(cores)
        interface = self.resources.interface or ("lo" if local else "")
        if interface:
            os.environ.update(GLOO_SOCKET_IFNAME=interface, NCCL_SOCKET_IFNAME=interface)


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


def submit(job: Job, folder: Path, name: str) -> "submitit.Job[str]":
    """Submit the job; its logs and its sbatch file go to `folder`.

    Raises:
        ValueError: if Slurm refuses it.
    """
    resources = job.resources
    executor = submitit.AutoExecutor(folder=folder, cluster=resources.cluster)
    if not resources.local:
        executor.update_parameters(**_slurm_parameters(resources, name))
        try:
            return executor.submit(job, 0, 0)
        except submitit.core.utils.FailedJobError as error:
            raise ValueError(f"Slurm refused the job: {' '.join(str(error).split())}") from None
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


def _slurm_parameters(resources: Resources, name: str) -> dict[str, Any]:
    words = {key: getattr(resources, key) for key in ("account", "qos", "constraint", "exclude", "dependency")}
    parameters = {
        "name": name,
        "nodes": resources.nodes,
        "tasks_per_node": resources.ranks_per_node,
        "timeout_min": resources.time,
        "stderr_to_stdout": True,
        "slurm_partition": resources.partition or None,
        "slurm_mem": resources.mem or None,
        "slurm_signal_delay_s": WAIT_FOR_SIGNAL,
        # Without it srun waits for ever for the peers of a rank that was killed.
        "slurm_srun_args": ["--kill-on-bad-exit=1"],
        "slurm_additional_parameters": {key: value for key, value in words.items() if value} | {"requeue": True},
    }
    if resources.gpus_per_node:
        parameters["slurm_gpus_per_node"] = resources.gpus_per_node
    if resources.cpus_per_task:
        parameters["cpus_per_task"] = resources.cpus_per_task
    return {key: value for key, value in parameters.items() if value is not None}


def follow(job: "submitit.Job[str]") -> int:
    """Show the first rank's log until the job ends; the exit code of the whole: 0, 1 (it failed) or 2 (settings)."""
    offset = 0
    log = job.task(0).paths.stdout
    done = False
    while not done:
        try:
            time.sleep(POLL)
            done = job.done()
            offset = _show(log, offset)
        except KeyboardInterrupt:
            print("\nstopping after this step, with a checkpoint", flush=True)
            _stop(job)
    return _verdict(job)


def _show(log: Path, offset: int) -> int:
    if not log.exists():
        return offset
    with log.open(errors="replace") as file:
        file.seek(offset)
        for line in iter(file.readline, ""):
            if not line.startswith("submitit "):
                print(line, end="", flush=True)
        return file.tell()


def _stop(job: "submitit.Job[str]") -> None:
    process = getattr(job, "_process", None)
    if process is not None:
        process.send_signal(signal.SIGTERM)
    else:
        job.cancel()


def _verdict(job: "submitit.Job[str]") -> int:
    """Name the first cause: a user's mistake, then a rank that vanished, then the first rank that raised."""
    raised: list[tuple[float, int]] = []
    for task in range(job.num_tasks):
        paths = job.task(task).paths
        if not paths.result_pickle.exists():
            print(f"error: rank {task} was killed; the others could not go on. Its log: {paths.stdout}", flush=True)
            print("Type the same command again to go on from the newest checkpoint.", flush=True)
            return 1
        try:
            sentence = job.task(task).result()
        except submitit.core.utils.FailedJobError:
            raised.append((paths.result_pickle.stat().st_mtime, task))
            continue
        if sentence:
            print(f"error: {sentence}", file=sys.stderr, flush=True)
            return 2
    if raised:
        paths = job.task(min(raised)[1]).paths
        last = [line for line in paths.stdout.read_text(errors="replace").splitlines() if line.strip()][-1:]
        print(f"error: rank {min(raised)[1]} failed first: {''.join(last)}\nIts log: {paths.stdout}", flush=True)
        return 1
    return 0
