"""The randomness of a training step: timesteps, noise and dropped conditions, from each sample's own seed."""

import numpy as np
import torch
from torch import Tensor

from fvdm.data.loader import Batch
from fvdm.diffusion.training_timesteps import sample_training_timesteps
from fvdm.models.backbone import Backbone
from fvdm.training.config import TrainConfig

DROPOUT = 2**62  # added to the number of a sample, for randomness that is independent of its noise


class NoiseSampler:
    """Samples timesteps, noise and which conditions are dropped, from (seed, number of the sample) alone.

    On the CPU, whatever the device: a GPU would launch eight small kernels for every sample, and give other numbers.
    One asynchronous copy then takes a whole micro-batch to the device.
    """

    def __init__(self, config: TrainConfig, model: Backbone, device: torch.device) -> None:
        """Prepare.

        Args:
            config: seed, p, noise process, share of dropped conditions.
            model: its null condition takes the place of a dropped one.
            device: of the results.
        """
        self.config, self.model, self.device = config, model, device
        self.generator = torch.Generator()

    def __call__(self, batch: Batch) -> tuple[Tensor, Tensor, Tensor | None]:
        """`t (b f)`, noise `(b f c h w)` and condition `(b ...)` of a batch, on the device."""
        config, (b, f) = self.config, batch.x_0.shape[:2]
        pin = self.device.type == "cuda"
        noise = torch.empty(batch.x_0.shape, dtype=batch.x_0.dtype, pin_memory=pin)
        t = torch.empty((b, f), dtype=torch.long, pin_memory=pin)
        hide = torch.empty(b, pin_memory=pin)
        for i, position in enumerate(batch.positions):  # in one sequence of samples, see fvdm.data.loader
            self.generator.manual_seed(sample_seed(config.seed, position))
            t[i] = sample_training_timesteps(
                (1, f), config.p, config.timesteps, config.diffusion.num_timesteps, generator=self.generator
            )
            noise[i].normal_(generator=self.generator)
            hide[i].uniform_(generator=self.generator)
        if config.lora.dropout:
            # Of the network's own generator, so a resumed run has the same; exact on any ranks for one clip at a time.
            torch.manual_seed(sample_seed(config.seed, DROPOUT + batch.positions[0]))
        t, noise, hide = (tensor.to(self.device, non_blocking=True) for tensor in (t, noise, hide))
        null = self.model.null(b)
        if null is None:
            return t, noise, None
        assert batch.y is not None
        dropped = (hide < config.condition_dropout).view(-1, *[1] * (batch.y.ndim - 1))
        return t, noise, torch.where(dropped, null, batch.y)


def sample_seed(seed: int, number: int) -> int:
    """The seed of a sample's own randomness, 63 bits: from the run's seed and the number of the sample."""
    state = np.random.SeedSequence([seed, number]).generate_state(1, np.uint64)[0]
    return int(state >> np.uint64(1))
