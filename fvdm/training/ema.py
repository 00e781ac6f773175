"""Exponential moving average of the weights: float32, sharded like the optimizer, without communication."""

from collections.abc import Sequence

import torch
from torch import Tensor


class EMA:
    """Average of the float32 master weights that this rank owns: 4 bytes x parameters / world size."""

    def __init__(self, masters: Sequence[Tensor], decay: float = 0.9999) -> None:
        """Begin at the present weights.

        Raises:
            ValueError: unless 0 <= decay < 1.
        """
        if not 0.0 <= decay < 1.0:
            raise ValueError(f"ema decay {decay}: choose 0 <= decay < 1 (the paper uses 0.9999)")
        self.decay = decay
        self.masters = list(masters)
        self.shards = [master.detach().clone() for master in masters]

    @torch.no_grad()
    def update(self) -> None:
        """Move the average towards the weights; call once after each optimizer step that was applied."""
        torch._foreach_lerp_(self.shards, [m.detach() for m in self.masters], 1.0 - self.decay)
