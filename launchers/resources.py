"""What a job asks of the cluster, as options of a command line and as parameters of an sbatch file."""

import argparse
import collections
import re
import shlex
import shutil
import subprocess
import sys
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
USUAL_GPUS, USUAL_CORES = 8, 8  # of a node, and of a GPU, where Slurm cannot be asked


@dataclass(frozen=True)
class Resources:
    """What a job asks of the cluster.

    Attributes:
        cluster: slurm, local, or auto: Slurm where sbatch exists.
        nodes: number of nodes; on this machine, of processes (or of groups of gpus-per-node processes).
        gpus_per_node: GPUs, and ranks, of a node; 0 runs one rank a node on the CPU. -1 takes what a node has.
        gpu_type: type of GPU, as Slurm names it, such as h200; any when empty.
        cpus_per_task: CPU cores of a rank; 0 takes a node's share for each GPU.
        time: time limit, in minutes or as days-hours:minutes:seconds; a training that reaches it starts itself again.
        partition: Slurm partition.
        account: Slurm account.
        qos: Slurm quality of service.
        constraint: Slurm node features.
        mem: memory of a node, such as 200G; 0 is all of it.
        exclude: nodes to leave out.
        nodelist: nodes to take.
        dependency: Slurm dependency, such as afterok:1234.
        array: one job for each number, such as 0-7 or 1,3,5 or 0-9%2 (two at a time), in place of {array} in a setting.
        sbatch: any other option of sbatch, as key=value; may be repeated.
        interface: network interface of the rendezvous, such as ib0; the system's choice when empty.
        warn: seconds before the time limit at which a training saves and starts itself again.
        max_restarts: failures in a row, with no new checkpoint between them, after which a job is not started again.
    """

    cluster: str = "auto"
    nodes: int = 1
    gpus_per_node: int = -1
    gpu_type: str = ""
    cpus_per_task: int = 0
    time: str = "1-00:00:00"
    partition: str = ""
    account: str = ""
    qos: str = ""
    constraint: str = ""
    mem: str = ""
    exclude: str = ""
    nodelist: str = ""
    dependency: str = ""
    array: str = ""
    sbatch: tuple[str, ...] = ()
    interface: str = ""
    warn: int = 300
    max_restarts: int = 5

    @classmethod
    def add_arguments(cls, parser: argparse.ArgumentParser) -> None:
        """Offer every attribute as an option, with its text above."""
        texts = dict(
            line.strip().split(": ", 1)
            for line in (cls.__doc__ or "").splitlines()
            if line.strip().split(":")[0] in cls.__dataclass_fields__
        )
        for field in fields(cls):
            name, text = "--" + field.name.replace("_", "-"), texts[field.name].replace("%", "%%")
            if isinstance(field.default, tuple):
                parser.add_argument(name, action="append", default=[], metavar="KEY=VALUE", help=text)
                continue
            choices = ("auto", "slurm", "local") if field.name == "cluster" else None
            kind: Any = type(field.default)
            parser.add_argument(name, type=kind, default=field.default, choices=choices, help=text)
        parser.add_argument("--follow", action="store_true", help="show the log until the job ends")
        parser.add_argument("--dry-run", action="store_true", help="print the sbatch file and submit nothing")

    @classmethod
    def from_options(cls, options: argparse.Namespace) -> "Resources":
        """Resolve what was left to the machine.

        Raises:
            ValueError: if Slurm is asked for and not there, or an option makes no sense.
        """
        values = {field.name: getattr(options, field.name) for field in fields(cls)}
        values["sbatch"] = tuple(values["sbatch"])
        slurm = shutil.which("sbatch") is not None
        if options.dry_run:
            values["cluster"] = "slurm"
        if values["cluster"] == "slurm" and not slurm and not options.dry_run:
            raise ValueError("there is no sbatch on this machine; run this on a login node, or use --cluster local")
        if values["cluster"] == "auto":
            values["cluster"] = "slurm" if slurm else "local"
            print("submitting to Slurm" if slurm else "no Slurm here: running on this machine (--cluster local)")
        if values["nodes"] < 1:
            raise ValueError(f"--nodes {values['nodes']}: a job needs at least one node")
        if values["array"] and values["cluster"] == "local":
            raise ValueError("--array needs Slurm; on this machine, run one after the other")
        if values["gpus_per_node"] < 0 and values["cluster"] == "local":
            values["gpus_per_node"] = _gpus_here(values["nodes"])
        elif values["gpus_per_node"] < 0:
            values["gpus_per_node"], cores = ask_nodes(values["partition"])
            # Slurm would give one core to a rank, and its data loader would starve it.
            values["cpus_per_task"] = values["cpus_per_task"] or cores // max(1, values["gpus_per_node"])
        resources = cls(**values)
        array_numbers(resources.array)
        if not 0 < resources.warn < 60 * resources.minutes:
            raise ValueError(f"--warn {resources.warn}: must lie within the time limit of {resources.minutes} minutes")
        return resources

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

    @property
    def minutes(self) -> int:
        """The time limit in minutes.

        Raises:
            ValueError: if it cannot be understood.
        """
        match = re.fullmatch(r"(?:(\d+)-)?(\d+)(?::(\d+))?(?::(\d+))?", self.time)
        if not match:
            raise ValueError(f"--time {self.time}: give minutes, or days-hours:minutes:seconds")
        days, first, second, third = (int(part or 0) for part in match.groups())
        if match[1] is None and match[4] is None:  # minutes, or minutes:seconds
            return first + (second > 0)
        return days * 1440 + first * 60 + second + (third > 0)

    def sbatch_parameters(self, name: str, folder: Path) -> dict[str, Any]:
        """What submitit writes into the sbatch file of a job whose files lie in `folder`.

        Raises:
            ValueError: if --sbatch is not key=value.
        """
        words = {key: getattr(self, key) for key in ("account", "qos", "constraint", "exclude", "dependency")}
        words |= {"partition": self.partition, "mem": self.mem, "nodelist": self.nodelist}
        for word in self.sbatch:
            key, equals, value = word.partition("=")
            if not equals:
                raise ValueError(f"--sbatch {word}: give key=value, such as --sbatch reservation=spring")
            words[key.lstrip("-")] = value
        after = shlex.join([sys.executable, str(ROOT / "launchers" / "after.py")])
        places = shlex.join([str(folder.resolve()), str(self.max_restarts)])
        parameters: dict[str, Any] = {
            "job_name": name,
            "nodes": self.nodes,
            "ntasks_per_node": self.ranks_per_node,
            "time": self.minutes,
            "signal_delay_s": self.warn,
            "stderr_to_stdout": True,
            "wckey": None,  # submitit's own would be refused where keys are kept
            # Without it srun waits for ever for the peers of a rank that was killed.
            "srun_args": ["--kill-on-bad-exit=1"],
            "setup": [
                f"export PYTHONPATH={shlex.quote(str(ROOT))}${{PYTHONPATH:+:$PYTHONPATH}}",
                # srun no longer takes it over from sbatch.
                "export SRUN_CPUS_PER_TASK=${SLURM_CPUS_PER_TASK:-1}",
                f"{after} begin {places}",
            ],
            "teardown": [f"{after} end {places} $?"],
            "additional_parameters": {key: value for key, value in words.items() if value} | {"requeue": True},
        }
        if self.gpus_per_node:
            kind = f"{self.gpu_type}:" if self.gpu_type else ""
            parameters["gpus_per_node"] = f"{kind}{self.gpus_per_node}"
        if self.cpus_per_task:
            parameters["cpus_per_task"] = self.cpus_per_task
        return parameters


def array_numbers(text: str) -> tuple[list[int], int]:
    """The numbers that an array such as `0-7`, `1,3,5`, `0-9:3` or `0-9%2` stands for, and how many run at a time.

    Raises:
        ValueError: if it cannot be understood.
    """
    if not text:
        return [], 0
    ranges, _, limit = text.partition("%")
    numbers: list[int] = []
    for part in ranges.split(","):
        match = re.fullmatch(r"(\d+)(?:-(\d+))?(?::([1-9]\d*))?", part)
        if not match:
            raise ValueError(f"--array {text}: give numbers such as 0-7, 1,3,5 or 0-9%2")
        numbers += range(int(match[1]), int(match[2] or match[1]) + 1, int(match[3] or 1))
    if not numbers or (limit and not limit.isdigit()):
        raise ValueError(f"--array {text}: give numbers such as 0-7, 1,3,5 or 0-9%2")
    return numbers, int(limit or len(numbers))


def ask_nodes(partition: str) -> tuple[int, int]:
    """GPUs and CPU cores that most nodes of a Slurm partition have; usual numbers where there is no Slurm to ask."""
    command = ["sinfo", "-h", "-N", "-o", "%P %c %G"]
    listed = None
    if shutil.which("sinfo"):
        listed = subprocess.run(command, capture_output=True, text=True, timeout=60)
    if listed is None or listed.returncode:
        print(f"no Slurm to ask: taking {USUAL_GPUS} GPUs a node, {USUAL_CORES} cores each", file=sys.stderr)
        return USUAL_GPUS, USUAL_GPUS * USUAL_CORES
    nodes: collections.Counter[tuple[int, int]] = collections.Counter()
    for line in listed.stdout.splitlines():
        name, cores, resources = line.split(None, 2)
        # The default partition is marked by a star.
        if name.rstrip("*") == partition or (not partition and name.endswith("*")):
            gpus = sum(map(int, re.findall(r"gpu(?::[^:,(]+)?:(\d+)", resources)))
            nodes[gpus, int(cores.rstrip("+"))] += 1
    return nodes.most_common(1)[0][0] if nodes else (0, 0)


def _gpus_here(nodes: int) -> int:
    import torch

    here = torch.cuda.device_count()
    if here and nodes > here:
        raise ValueError(
            f"--nodes {nodes} --cluster local: each is a rank with a GPU of its own, and this machine has {here}; "
            f"use --nodes {here}{' or fewer' if here > 1 else ''}"
        )
    return 1 if here else 0
