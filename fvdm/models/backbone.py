"""What every backbone is: a network that estimates each frame, the list of its blocks, and its null condition."""

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from fvdm.models.config import BackboneConfig
from fvdm.models.pretrained import Pretrained


class Backbone(Pretrained, nn.Module):
    """A denoiser: `forward(x (b f c h w), t (b f), y or None) -> (b f c h w)`, `2c` channels with learned variance.

    The condition `y (b ...)` is whatever the backbone takes, such as class labels `(b)`; nothing outside the backbone
    looks into it.

    Attributes:
        config: its settings.
        blocks: what is compiled, and whose activations are checkpointed.
        empty_prompt: `(l e)`, of a backbone that takes text: what `null` says; whoever has the text encoder sets it.
    """

    config: BackboneConfig
    blocks: nn.ModuleList
    empty_prompt: Tensor | None

    def null(self, count: int) -> Tensor | None:
        """The condition that says nothing, for `count` clips: `(count ...)`; None if the network takes no condition."""
        raise NotImplementedError

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return next(self.parameters()).device

    def run_block(self, i: int, *inputs: Tensor) -> Tensor:
        """Run the i-th block, with activation checkpointing where the settings ask for it."""
        every = self.config.activation_checkpointing
        if every and i % every == 0 and torch.is_grad_enabled():
            output: Tensor = checkpoint(self.blocks[i], *inputs, use_reentrant=False)
            return output
        return self.blocks[i](*inputs)

    def num_parameters(self) -> int:
        """Number of parameters."""
        return sum(p.numel() for p in self.parameters())
