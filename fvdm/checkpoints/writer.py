"""Writes checkpoints while training continues: training waits for the copy to host memory, not for the disk."""

import datetime
import logging
import threading
import time
from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor

from fvdm.distributed import first_error

logger = logging.getLogger(__name__)


class AsyncCheckpointWriter:
    """Runs one collective write at a time, in a thread, on its own process group.

    Attributes:
        stalled: seconds for which the last write held training up.
    """

    def __init__(self, background: bool, timeout: int) -> None:
        """Collective.

        Args:
            background: write in a thread; else `begin` returns when all is written.
            timeout: seconds that the others wait for the slowest rank's disk, and for rank 0, which writes more.
        """
        self.background = background
        # Never the group of the gradients: the messages of two threads would meet in it. On the CPU, so that no
        # stream waits either.
        self.group = dist.new_group(backend="gloo", timeout=datetime.timedelta(seconds=timeout))
        self.stalled = 0.0
        self._thread: threading.Thread | None = None
        self._error: OSError | None = None
        self._raised: BaseException | None = None

    def barrier(self, error: str = "") -> None:
        """Wait for the writers of all ranks; raise OSError on each if one of them gives a sentence."""
        first = first_error(error, self.group)
        if first:
            raise OSError(first)

    def begin(self, slices: dict[str, Tensor], write: Callable[[dict[str, Tensor]], None]) -> None:
        """Wait for the previous write, copy, and write. Collective.

        Args:
            slices: tensors that training will change; `write` gets a copy in host memory.
            write: raises the same OSError on all ranks, or on none.
        """
        began = time.monotonic()
        self.wait()
        copy = host_copy(slices) if self.background else {name: tensor.cpu() for name, tensor in slices.items()}
        # A daemon: a rank that gives up on a hung peer must not wait for it here once more.
        self._thread = threading.Thread(target=self._run, args=(write, copy), name="checkpoint", daemon=True)
        self._thread.start()
        if not self.background:
            self._thread.join()
        self.stalled = time.monotonic() - began

    def _run(self, write: Callable[[dict[str, Tensor]], None], slices: dict[str, Tensor]) -> None:
        try:
            write(slices)
        except OSError as error:
            self._error = error
            logger.warning("the checkpoint could not be written (%s); training continues, and the next is tried", error)
        except BaseException as error:  # A lost peer: training meets it as well.
            self._raised = error

    def wait(self) -> OSError | None:
        """Wait until nothing is being written. The error of the last write, the same on all ranks."""
        if self._thread:
            self._thread.join()
            self._thread = None
        if self._raised:
            raise self._raised
        error, self._error = self._error, None
        return error


def host_copy(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """A copy in host memory; from a GPU into pinned memory, which the transfer fills at full speed."""
    copy = {}
    for name, tensor in tensors.items():
        copy[name] = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
        copy[name].copy_(tensor.detach(), non_blocking=True)
    if any(tensor.is_cuda for tensor in tensors.values()):
        torch.cuda.synchronize()
    return copy
