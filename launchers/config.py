"""Settings of the launchers: what a job asks of the cluster, and what it runs. Imports no torch."""

import dataclasses
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar

from fvdm.config import in_range
from fvdm.training.config import TrainConfig

T = TypeVar("T")
LEAST_SECONDS = 120  # of work in each start of a job: Slurm looks at time limits every 30 s, ranks start slowly


@dataclass(frozen=True, kw_only=True)
class Resources:
    """What the job asks of the cluster.

    Attributes:
        cluster: slurm, local (processes of this machine), or auto: Slurm if its controller answers.
        nodes: number of nodes; on this machine, of processes (or of groups of gpus-per-node processes).
        gpus_per_node: GPUs, and ranks, of a node; 0 runs one rank a node on the CPU; -1 takes all GPUs of a node.
        gpu_type: type of GPU, as Slurm names it, such as h200 [any]
        cpus_per_task: CPU cores of a rank [a node's cores, shared among its GPUs]
        time: time limit, in minutes or as days-hours:minutes:seconds; a training run that reaches it is requeued.
        partition: Slurm partition.
        account: Slurm account.
        qos: Slurm quality of service.
        constraint: Slurm node features.
        mem: memory of a node, such as 200G; 0 is all of it.
        exclude: nodes to leave out.
        nodelist: nodes to take.
        dependency: Slurm dependency, such as afterok:1234.
        array: one job for each number, such as 0-7 or 1,3,5 or 0-9%2 (two at a time); {array} in a setting is replaced
            by the number.
        sbatch: other options of sbatch, such as reservation=spring; may be repeated.
        gpu_bind: which GPUs srun shows each rank, such as closest [Slurm's default]
        cpu_bind: to which CPUs srun binds each rank, such as cores [Slurm's default]
        interface: network interface of the rendezvous and of all messages, such as ib0 [the system's choice]
        warn: seconds before the time limit at which a training run saves and is requeued.
        max_restarts: failures in a row, with no new checkpoint between them, after which a job is not started again.
        follow: show the log until the job ends.
        dry_run: print the sbatch file and submit nothing.
    """

    cluster: Literal["auto", "slurm", "local"] = "auto"
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
    sbatch: tuple[str, ...] = field(default=(), metadata={"metavar": "KEY=VALUE"})
    gpu_bind: str = ""
    cpu_bind: str = ""
    interface: str = ""
    warn: int = 300
    max_restarts: int = 5
    follow: bool = False
    dry_run: bool = False

    def __post_init__(self) -> None:
        """Raises ValueError for a setting out of its range."""
        if self.nodes < 1:
            raise ValueError(f"--nodes {self.nodes}: a job needs at least one node")
        in_range(self, gpus_per_node=(-1, 4096), cpus_per_task=(0, 4096), max_restarts=(0, 10**6))
        array_numbers(self.array)
        for word in self.sbatch:
            if not word.partition("=")[0] or "=" not in word:
                raise ValueError(f"--sbatch {word}: give key=value, such as --sbatch reservation=spring")
        seconds = 60 * self.minutes
        if self.cluster != "local" and not 0 < self.warn <= seconds - LEAST_SECONDS:
            raise ValueError(
                f"--warn {self.warn} with --time {self.time} leaves {max(0, seconds - self.warn)} s of training in "
                f"each start of the job; at least {LEAST_SECONDS} are needed, as Slurm looks at time limits every "
                f"30 s: use --time {-(-(self.warn + LEAST_SECONDS) // 60)} or more, or a smaller --warn"
            )

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


@dataclass(frozen=True)
class TrainJobConfig(TrainConfig, Resources):
    """A training run, and the job that it runs in."""

    def __post_init__(self) -> None:
        """Raises ValueError for a setting out of its range."""
        TrainConfig.__post_init__(self)
        Resources.__post_init__(self)


def part_of(config: Any, cls: type[T]) -> T:
    """The settings that a configuration has inherited from one of its classes."""
    return cls(**{item.name: getattr(config, item.name) for item in dataclasses.fields(cls)})  # type: ignore[arg-type]


def option(words: Sequence[str], name: str) -> str | None:
    """The last value that words such as `--name value` or `--name=value` give an option; None without it."""
    value = None
    for k, word in enumerate(words):
        if word == f"--{name}" and k + 1 < len(words):
            value = words[k + 1]
        elif word.startswith(f"--{name}="):
            value = word.partition("=")[2]
    return value


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
