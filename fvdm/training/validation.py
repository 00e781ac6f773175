"""The held-out loss: one number that tells whether a change helps, long before FVD does, and by noise level.

The loss of a frame depends on its own timestep and on those of its neighbours, so it is measured on a grid of both:
even frames are at one level, odd frames at another. Clips, noise and levels are the same at every step and in every
run, so runs can be compared. It is the mean squared error of the estimate of the noise, whatever the objective, without
weights and without the variational term: comparable between all runs with the same noise process, data and VAE.
"""

import logging
import time
from dataclasses import dataclass, field, replace

import torch
import torch.distributed as dist
from torch import Tensor

from fvdm.data.config import DataConfig
from fvdm.data.loader import batches
from fvdm.data.shards import LatentShards
from fvdm.diffusion.process import Diffusion
from fvdm.distributed import Ranks
from fvdm.models.backbone import Backbone
from fvdm.tracking.tracker import Tracker
from fvdm.training.attempt import attempt
from fvdm.training.config import ValidationConfig
from fvdm.training.noise import sample_seed

logger = logging.getLogger(__name__)

SEED = 0  # of clips and noise; not the run's, so that runs of other seeds are measured on the same


@dataclass
class HeldOutLoss:
    """Measures a model on the clips of a split that it is not trained on; the ranks share them out.

    Attributes:
        diffusion: noise process and objective.
        shards: of the split.
        data: frames and stride of a clip.
        config: number of clips and of levels.
        ranks: this process among its peers.
        device: where the model is.
        micro_batch: clips that are evaluated at once.
    """

    diffusion: Diffusion
    shards: LatentShards
    data: DataConfig
    config: ValidationConfig
    ranks: Ranks
    device: torch.device
    micro_batch: int
    _clips: list[tuple[Tensor, Tensor | None]] = field(default_factory=list)

    @property
    def levels(self) -> list[int]:
        """The grid of timesteps: the middles of equal parts of 1..T."""
        count, last = self.config.levels, self.diffusion.num_timesteps
        return [max(1, round((k + 0.5) / count * last)) for k in range(count)]

    @property
    def cells(self) -> list[tuple[int, int]]:
        """The grid's places (own level, neighbours' level); a clip of one frame has no neighbours."""
        count = self.config.levels
        return [(i, j) for i in range(count) for j in range(count) if i == j or self.data.frames > 1]

    def measure(self, model: Backbone, step: int, tracker: Tracker | None) -> None:
        """Measure, log and report. Collective. Where it fails, a line says why, and training continues."""
        began = time.monotonic()
        own, error = attempt(lambda: self.losses(model))
        if own is None or error:
            if self.ranks.is_main:
                logger.warning("no held-out loss of step %d: %s", step, error)
            return
        own = own.to(self.device)
        dist.all_reduce(own)  # Each row is of one rank, and 0 on the others.
        if tracker is None:
            return
        values = self.summary(own.cpu())
        tracker.metrics(values, step)
        seconds = time.monotonic() - began
        logger.info("held-out loss of step %d: %.4f, in %.0f s", step, values["validation/loss"], seconds)

    def summary(self, losses: Tensor) -> dict[str, float]:
        """Metrics by name of losses `(clips, levels, levels)` by own t and neighbours' t."""
        grid, cells = losses.mean(0), self.cells
        same = [grid[i, j] for i, j in cells if i == j]
        other = [grid[i, j] for i, j in cells if i != j]
        values = {"loss": same + other, "loss_one_t": same, "loss_t_per_frame": other}
        values |= {f"t_{self.levels[i]:04d}_neighbours_{self.levels[j]:04d}": [grid[i, j]] for i, j in cells}
        return {f"validation/{name}": float(sum(each) / len(each)) for name, each in values.items() if each}

    @torch.no_grad()
    def losses(self, model: Backbone) -> Tensor:
        """Losses by own t and neighbours' t, float64 `(clips, levels, levels)`: this rank's clips, zeros elsewhere."""
        count, levels = self.config.num, self.levels
        found = torch.zeros(count, len(levels), len(levels), dtype=torch.float64)
        own = list(self.ranks.share(count))
        if not self._clips:
            self._clips = self._load(len(own))
        for first in range(0, len(own), self.micro_batch):
            rows = own[first : first + self.micro_batch]
            clips = self._clips[first : first + self.micro_batch]
            x_0 = torch.cat([clip for clip, _ in clips]).to(self.device)
            labels = [label for _, label in clips if label is not None]
            y = torch.cat(labels).to(self.device) if model.config.conditional and labels else None
            noise = torch.stack([self._noise(number, x_0.shape[1:]) for number in rows]).to(self.device)
            even = torch.arange(x_0.shape[1], device=self.device) % 2 == 0
            for i, j in self.cells:
                if i > j:
                    continue  # Measured with (j, i), on the other frames.
                t = torch.where(even, levels[i], levels[j]).expand(len(rows), -1)
                error = self._error(model, x_0, noise, t, y)
                if i == j:
                    found[rows, i, i] = error.mean(1).cpu()
                else:
                    found[rows, i, j] = error[:, even].mean(1).cpu()
                    found[rows, j, i] = error[:, ~even].mean(1).cpu()
        return found

    def _error(self, model: Backbone, x_0: Tensor, noise: Tensor, t: Tensor, y: Tensor | None) -> Tensor:
        """Squared error of the estimate of the noise of each frame, float64 `(b f)`."""
        x_t = self.diffusion.q_sample(x_0, t, noise)
        eps = self.diffusion.predict(model(x_t, t, y), x_t, t).eps
        return (eps - noise).double().square().flatten(2).mean(2)

    def _load(self, count: int) -> list[tuple[Tensor, Tensor | None]]:
        """This rank's clips and labels, the same ones whatever the number of ranks."""
        ranks = self.ranks
        data = replace(self.data, batch_size=ranks.world_size, workers=0, flip=False)
        stream = batches(self.shards, data, rank=ranks.rank, world_size=ranks.world_size, seed=SEED)
        return [(batch.x_0, batch.y) for batch, _ in zip(stream, range(count), strict=False)]

    @staticmethod
    def _noise(number: int, shape: torch.Size) -> Tensor:
        """The noise of a clip, `(f c h w)`."""
        return torch.randn(shape, generator=torch.Generator().manual_seed(sample_seed(SEED, number)))


def held_out_shards(config: ValidationConfig, data: DataConfig, shards: LatentShards) -> LatentShards:
    """The shards that the held-out loss is measured on.

    Args:
        config: folder and split.
        data: those that are trained on.
        shards: those that are trained on.

    Raises:
        ValueError: if there are none, or they are of another VAE or size.
    """
    found = LatentShards(config.path or data.path, config.split, data.cache)
    found.require(vae_identity=shards.manifest.vae_identity, latent_shape=shards.latent_shape)
    return found
