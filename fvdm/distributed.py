"""Which process this is, and how the processes agree to stop."""

import contextlib
import datetime
import enum
import logging
import os
import random
import re
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from types import FrameType
from typing import NoReturn

import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d as c10d


@dataclass(frozen=True)
class Ranks:
    """Where this process stands among those of the job.

    Attributes:
        rank: number of this process, 0 to world_size - 1.
        local_rank: number of its GPU among those that it sees; without GPUs, its number on this node.
        world_size: number of processes.
        local_world_size: number of processes of this node.
    """

    rank: int = 0
    local_rank: int = 0
    world_size: int = 1
    local_world_size: int = 1

    @property
    def is_main(self) -> bool:
        """Rank 0 alone prints, tracks and writes what is common to all."""
        return self.rank == 0

    def share(self, count: int) -> range:
        """The part of `count` pieces of work that is this rank's: every world_size-th."""
        return range(self.rank, count, self.world_size)


def from_environment() -> Ranks:
    """Read RANK, LOCAL_RANK and WORLD_SIZE, as torchrun and the launchers set them; alone when they are absent.

    Also LOCAL_WORLD_SIZE, 1 where it is absent: other launchers do not set it.

    A single process invents the rendezvous that it does not need, so that every run is a distributed run. LOCAL_RANK is
    made the number of a GPU that the process sees: Slurm may show each process only its own.

    Raises:
        ValueError: if only some of the variables are set.
    """
    names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    missing = [name for name in names if name not in os.environ]
    if len(missing) == len(names):
        os.environ.update(
            RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(free_port())
        )
    elif missing:
        raise ValueError(f"{', '.join(missing)} not set: start with launchers/slurm_train.py or torchrun")
    if gpus := torch.cuda.device_count():
        os.environ["LOCAL_RANK"] = str(int(os.environ["LOCAL_RANK"]) % gpus)
    rank, local_rank, world_size = (int(os.environ[name]) for name in names[:3])
    return Ranks(rank, local_rank, world_size, int(os.environ.get("LOCAL_WORLD_SIZE", "1")))


def free_port() -> int:
    """A TCP port that is free on this machine at this moment."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def seed_everything(seed: int) -> None:
    """Seed Python and PyTorch. Training draws nothing from them but the initial weights."""
    random.seed(seed)
    torch.manual_seed(seed)


def first_error(error: str, group: dist.ProcessGroup | None = None) -> str:
    """The error of the first rank that has one, such as `rank 2: out of memory`; empty where none has. Collective.

    Args:
        error: what went wrong on this rank; empty for nothing.
        group: of the ranks; all by default.
    """
    errors: list[str | None] = [None] * dist.get_world_size(group)
    dist.all_gather_object(errors, error, group)
    return next((f"rank {rank}: {text}" for rank, text in enumerate(errors) if text), "")


class Stop(enum.IntEnum):
    """Why a job stops; the greater reason wins when ranks have received different signals."""

    NO = 0  # It does not.
    END = 1  # SIGTERM: the job is cancelled or preempted; its launcher knows which.
    REQUEUE = 2  # SIGUSR2: the time limit is near.


class StopFlag:
    """Set by a signal on any rank, agreed on by all at a step boundary.

    The handler only sets a flag: anything collective inside a signal handler would deadlock.
    """

    def __init__(self) -> None:
        self.raised = Stop.NO

    def install(self) -> None:
        """Handle SIGTERM and SIGUSR2 from now on; those that a launcher has held back arrive now."""
        signal.signal(signal.SIGTERM, self._raise)
        signal.signal(signal.SIGUSR2, self._raise)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM, signal.SIGUSR2})

    def _raise(self, number: int, frame: FrameType | None) -> None:
        self.raised = max(self.raised, Stop.REQUEUE if number == signal.SIGUSR2 else Stop.END)

    def agreed(self, device: torch.device | str = "cpu") -> Stop:
        """The greatest reason to stop of any rank. Collective: every rank calls it at the same step."""
        flag = torch.tensor(float(self.raised), device=device)
        dist.all_reduce(flag, op=dist.ReduceOp.MAX)
        return Stop(int(flag.item()))


class HangDetector:
    """Finds out which rank holds the others up, when one of their collectives has failed.

    It has a group of its own: that of the collective cannot be used any more. The group is gloo's, which returns an
    error where NCCL ends the process.
    """

    def __init__(self, timeout: int) -> None:
        """Collective.

        Args:
            timeout: seconds that the ranks wait for each other in their collectives.
        """
        self.seconds = max(5.0, timeout / 10)
        self.group = dist.new_group(backend="gloo", timeout=datetime.timedelta(seconds=3 * self.seconds))
        self.store = c10d.PrefixStore("hang detector", c10d._get_default_store())
        self.calls = 0  # of `ask_ranks`: each has its own key

    def find(self, error: RuntimeError) -> str:
        """The ranks that hang, such as `ranks 2, 5`; empty where `error` is not gloo's, or a peer has ended.

        Every rank that is not hung calls it at about the same time, and gets the same answer.
        """
        return self.ask_ranks() if "gloo/" in str(error) else ""

    def ask_ranks(self) -> str:
        """The ranks that do not answer, such as `ranks 2, 5`; empty if all answer, or if ranks have ended."""
        self.calls += 1
        key = f"hanging {self.calls}"
        if dist.get_rank() == 0:
            found = re.search(r"Ranks? ([\d, ]+) failed to pass", self._call(self.seconds))
            hanging = f"rank{'s' * (',' in found[1])} {found[1]}" if found else ""
            self.store.set(key, hanging)
            if found:  # The store ends with this process: the others must have read it before.
                missing = {0, *map(int, found[1].split(","))}
                receipts = [f"{key} read by {rank}" for rank in range(dist.get_world_size()) if rank not in missing]
                with contextlib.suppress(RuntimeError):
                    self.store.wait(receipts, datetime.timedelta(seconds=self.seconds))
            return hanging
        if self._call(3 * self.seconds):
            return "rank 0"
        try:
            self.store.wait([key], datetime.timedelta(seconds=self.seconds))
            hanging = self.store.get(key).decode()
            if hanging:
                self.store.set(f"{key} read by {dist.get_rank()}", "")
            return hanging
        except RuntimeError:  # Rank 0, which keeps the store, has ended.
            return ""

    def _call(self, seconds: float) -> str:
        """Gloo's error if ranks do not answer in time; empty if all do, or if ranks have ended."""
        started = time.monotonic()
        try:
            dist.monitored_barrier(self.group, datetime.timedelta(seconds=seconds), wait_all_ranks=True)
        except RuntimeError as error:
            return str(error) if time.monotonic() - started >= seconds else ""
        return ""


def leave(code: int) -> NoReturn:
    """End this process for an error that it has reported, with this exit code.

    A rank that has met its peers ends at once: Python's own way out frees the process group while its threads run,
    which aborts the process at times, and the exit code is lost.
    """
    if not dist.is_initialized():
        raise SystemExit(code)
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def end_process(sentence: str) -> None:
    """Print an error as Python does, and end this process at once: its main thread waits for a collective."""
    print(f"[rank{dist.get_rank()}]: TimeoutError: {sentence}", file=sys.stderr, flush=True)
    os._exit(1)


class Watchdog:
    """Names a rank that hangs where collectives return no error: NCCL ends the process without a name.

    A context manager with a thread beside the collectives. If no step ends for `seconds`, the threads of all ranks ask
    each other over gloo: the ranks that do not answer hang, and this process ends with their names. If all answer, a
    rank is busy, and the thread waits for the next step.

    Args:
        detector: asks the ranks.
        seconds: without a step, after which the ranks are asked; `3 * detector.seconds` before NCCL's timeout or more.
        enabled: start the thread; not needed where collectives return errors.
        abort: ends the process with a sentence.
    """

    def __init__(
        self,
        detector: HangDetector,
        seconds: float,
        enabled: bool = True,
        abort: Callable[[str], None] = end_process,
    ) -> None:
        self.detector, self.seconds, self.enabled, self.abort = detector, seconds, enabled, abort
        self._step, self._last = 0, time.monotonic()
        self._closed = threading.Event()

    def __enter__(self) -> "Watchdog":
        """Start the thread."""
        self._last = time.monotonic()
        if self.enabled:
            threading.Thread(target=self._watch, name="watchdog", daemon=True).start()
        return self

    def __exit__(self, *error: object) -> None:
        """Let the thread end; it is not waited for, as it may be asking the ranks."""
        self._closed.set()

    def beat(self, step: int) -> None:
        """Say that a step has ended on this rank."""
        self._step, self._last = step, time.monotonic()

    def _watch(self) -> None:
        while not self._closed.wait(max(0.05, self._last + self.seconds - time.monotonic())):
            last = self._last
            if time.monotonic() < last + self.seconds:
                continue
            hanging = self.detector.ask_ranks()
            if hanging and self._last == last and not self._closed.is_set():
                self.abort(
                    f"{hanging} hung, or the node could not be reached: the other ranks waited for it after step "
                    f"{self._step} for {time.monotonic() - last:.0f} s"
                )
                return
            if self._last == last:
                self._last = time.monotonic()
