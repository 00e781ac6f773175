"""Mean losses between two reports, by timestep and by whether a clip's frames share it."""

import time

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor


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
