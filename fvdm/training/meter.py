"""What is counted between two reports: losses by timestep, and what reading the data took."""

import time

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from fvdm.data.cache import ReadCounters
from fvdm.data.loader import Batch


class Meter:
    """Sums the losses on the device, and reads them only for a report, so that no step waits for the device."""

    BUCKETS = 4

    def __init__(self, num_timesteps: int, device: torch.device) -> None:
        """Begin with empty sums.

        Args:
            num_timesteps: T.
            device: where the losses are.
        """
        self.num_timesteps = num_timesteps
        self.sums = torch.zeros(2, 2 * self.BUCKETS, device=device, dtype=torch.float64)  # (loss, count)
        self.since = time.monotonic()

    @torch.no_grad()
    def add(self, loss: Tensor, t: Tensor) -> None:
        """Count losses `(b f)` of frames at `t (b f)`."""
        alone = (t != t[:, :1]).any(1, keepdim=True)
        place = (t - 1).clamp(min=0) * self.BUCKETS // self.num_timesteps + self.BUCKETS * alone
        values = torch.stack([loss.detach().double().flatten(), torch.ones_like(loss).double().flatten()])
        self.sums.index_add_(1, place.flatten(), values)

    def read(self) -> tuple[dict[str, float], float, float]:
        """Mean losses since the last call by name, clips' frames counted, seconds passed. Collective."""
        sums = self.sums.clone()
        dist.all_reduce(sums)
        loss, count = sums.cpu().view(2, 2, self.BUCKETS).numpy()
        now = time.monotonic()
        seconds, self.since = now - self.since, now
        self.sums.zero_()
        edges = np.linspace(0, self.num_timesteps, self.BUCKETS + 1).astype(int)
        groups = {"loss/mean": (slice(None), slice(None)), "loss/one_t": (0,), "loss/t_per_frame": (1,)}
        groups |= {f"loss/t_{edges[k] + 1:04d}_{edges[k + 1]:04d}": (slice(None), k) for k in range(self.BUCKETS)}
        means = {name: loss[at].sum() / count[at].sum() for name, at in groups.items() if count[at].sum()}
        return means, float(count.sum()), seconds


class ReadMeter:
    """Counts what reading the data took, and corrupt samples that were skipped, on all ranks."""

    def __init__(self, device: torch.device) -> None:
        """Begin at zero.

        Args:
            device: where collectives run.
        """
        self.device = device
        self.counters, self.corrupt = ReadCounters(), 0

    def add(self, batch: Batch) -> None:
        """Count a batch of this rank."""
        self.counters.add(batch.read)
        self.corrupt += batch.skipped

    def read(self) -> tuple[ReadCounters, int]:
        """Sums over all ranks since the last call: what was read, and corrupt samples. Collective."""
        own = self.counters.take()
        sums = torch.tensor([*vars(own).values()], dtype=torch.float64, device=self.device)
        dist.all_reduce(sums)
        return ReadCounters(*sums.tolist()), self.read_corrupt()

    def read_corrupt(self) -> int:
        """Corrupt samples of all ranks since the last call of this or of `read`. Collective."""
        count = torch.tensor(self.corrupt, device=self.device)
        dist.all_reduce(count)
        self.corrupt = 0
        return int(count)
