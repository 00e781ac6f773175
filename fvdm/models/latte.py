"""The network: Latte's transformer (alternating space and time blocks, adaLN-Zero) with a timestep per frame.

Read top to bottom: `Latte.forward` is the whole network in ten lines. The condition is `(b f d)`, one vector per
frame, and is broadcast over the frame's tokens, so that modulation is computed once per frame.
"""

import math
import re

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from fvdm.diffusion.process import check_timesteps
from fvdm.models.attention import attention
from fvdm.models.backbone import Backbone
from fvdm.models.config import Backend, LatteConfig
from fvdm.models.layers import GELU, modulated, patchify, unpatchify


class Embedding(nn.Sequential):
    """Sinusoids of a timestep, through two layers. In float32: integers above 256 are not exact in bfloat16."""

    FREQUENCIES = 128

    def __init__(self, width: int) -> None:
        super().__init__(nn.Linear(2 * self.FREQUENCIES, width), nn.SiLU(), nn.Linear(width, width))

    def forward(self, t: Tensor) -> Tensor:
        """Embed `t (b f)` in 0..T as `(b f d)`, in the dtype of the weights.

        The network counts its noise levels from 0, which is one step of noise; a clean frame shares that level.
        """
        # Not a buffer: a model that is cast to bfloat16 would cast the rates too.
        exponents = torch.arange(self.FREQUENCIES, device=t.device, dtype=torch.float32) / self.FREQUENCIES
        rates = torch.exp(-math.log(10000) * exponents)
        angles = (t - 1).clamp(min=0).float()[..., None] * rates
        waves = torch.cat([angles.cos(), angles.sin()], dim=-1)  # (b f 256)
        return super().forward(waves.to(next(self.parameters()).dtype))


class Attention(nn.Module):
    """Multi-head self-attention over the tokens of a frame (`space`) or the frames of a token's place (`time`).

    The rows of `qkv` are ordered (head, q/k/v, e), so that tokens and heads merge as a view: neither direction
    copies its input or output to rearrange it.
    """

    def __init__(self, width: int, heads: int, axis: str, backend: Backend) -> None:
        super().__init__()
        self.heads, self.axis, self.backend = heads, axis, backend
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
        """Residual tokens `(b f n d)`, their frames' shift and scale `(b f 1 d)` `-> (b f n d)`."""
        _, f, n, _ = x.shape
        qkv = modulated(self.qkv, x, shift, scale)  # (b f n 3d)
        if self.axis == "space":
            q, k, v = rearrange(qkv, "b f n (h three e) -> three (b f) n h e", h=self.heads, three=3)
            return self.proj(rearrange(attention(q, k, v, self.backend), "(b f) n h e -> b f n (h e)", f=f))
        q, k, v = rearrange(qkv, "b f n (h three e) -> three b f (n h) e", h=self.heads, three=3)
        return self.proj(rearrange(attention(q, k, v, self.backend), "b f (n h) e -> b f n (h e)", n=n))


class Block(nn.Module):
    """A DiT block with adaLN-Zero (DiT, section 3.2); space and time differ only in what attention mixes."""

    def __init__(self, width: int, heads: int, axis: str, backend: Backend) -> None:
        super().__init__()
        self.attn = Attention(width, heads, axis, backend)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), GELU(), nn.Linear(4 * width, width))
        self.modulation = nn.Linear(width, 6 * width)

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        """Tokens `x (b f n d)`, activated condition `c (b f d)` `-> (b f n d)`."""
        shift_1, scale_1, gate_1, shift_2, scale_2, gate_2 = self.modulation(c).unsqueeze(2).chunk(6, dim=-1)
        x = torch.addcmul(x, gate_1, self.attn(x, shift_1, scale_1))
        up, activation, down = self.mlp
        return torch.addcmul(x, gate_2, down(activation(modulated(up, x, shift_2, scale_2))))


class Latte(Backbone):
    """The denoiser: `forward(x (b f c h w), t (b f), y (b) or None) -> (b f c h w)`, 2c with learned variance."""

    Config = LatteConfig
    config: LatteConfig
    space: Tensor
    time: Tensor

    def __init__(self, config: LatteConfig) -> None:
        super().__init__()
        self.config = config
        c = config
        self.x_embedder = nn.Linear(c.channels * c.patch**2, c.width)
        self.t_embedder = Embedding(c.width)
        # One more row than classes: the last stands for "no class", which guidance needs.
        self.y_embedder = nn.Embedding(c.num_classes + 1, c.width) if c.num_classes else None
        axes = ("space", "time")
        self.blocks = nn.ModuleList(Block(c.width, c.heads, axes[i % 2], c.attention) for i in range(c.depth))
        self.final_modulation = nn.Linear(c.width, 2 * c.width)
        self.final_layer = nn.Linear(c.width, c.patch**2 * c.channels * (2 if c.learned_variance else 1))
        self.register_buffer("space", space_table(c.width, *c.grid), persistent=False)  # (n d)
        self.register_buffer("time", sinusoids(c.width, torch.arange(c.frames)), persistent=False)  # (f d)
        self.initialise()

    def initialise(self) -> None:
        """Draw the weights as DiT does: Xavier, small embeddings, and zeros where a block should begin as identity."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        for name, weight in self.named_parameters():
            if name.endswith("modulation.weight") or name == "final_layer.weight":
                nn.init.zeros_(weight)
            elif re.match(r"[ty]_embedder.*weight", name):
                nn.init.normal_(weight, std=0.02)

    def forward(self, x: Tensor, t: Tensor, y: Tensor | None = None) -> Tensor:
        """Estimate the noise of every frame.

        Args:
            x: noisy latents `(b f c h w)`.
            t: timesteps `(b f)` in 0..T, one per frame.
            y: class labels `(b)`; `num_classes` stands for no class. None for an unconditional model.

        Returns:
            `(b f c h w)` in the dtype of the weights; `2c` channels with learned variance.

        Raises:
            ValueError: if the shapes do not fit the model, or labels are missing, or the model takes none.
        """
        self._check(x, t, y)
        c = self.t_embedder(t)  # (b f d)
        if self.y_embedder is not None:
            c = c + self.y_embedder(y)[:, None]
        c = F.silu(c)
        x = self.x_embedder(patchify(x.to(c.dtype), self.config.patch))  # (b f n d)
        x = x + self.space.to(x.dtype)
        for i in range(self.config.depth):
            if i == 1:
                x = x + self.time[: x.shape[1], None].to(x.dtype)
            x = self.run_block(i, x, c)
        shift, scale = self.final_modulation(c).unsqueeze(2).chunk(2, dim=-1)
        return unpatchify(modulated(self.final_layer, x, shift, scale), self.config.patch, self.config.grid)

    def null(self, count: int) -> Tensor | None:
        """The label "no class" for `count` clips, int64 `(count)`; None for an unconditional model."""
        classes = self.config.num_classes
        return torch.full((count,), classes, device=self.device) if classes else None

    def _check(self, x: Tensor, t: Tensor, y: Tensor | None) -> None:
        check_timesteps(x, t)
        frames, *latent_shape = self.config.clip_shape
        if list(x.shape[2:]) != latent_shape or x.shape[1] > frames:
            raise ValueError(
                f"the model takes clips of up to {frames} frames of {' x '.join(map(str, latent_shape))}, "
                f"not {tuple(x.shape[1:])}"
            )
        if (y is None) != (self.y_embedder is None):
            raise ValueError(
                "the model needs class labels y (b)"
                if y is None
                else "the model has no classes; leave out the labels y"
            )

    def num_parameters(self) -> int:
        """Number of parameters, with the fixed position tables, as the paper counts them."""
        return super().num_parameters() + self.space.numel() + self.time.numel()


def sinusoids(width: int, positions: Tensor) -> Tensor:
    """Sine, then cosine, of positions `(n)` at `width / 2` rates: float32 `(n d)` (Transformer, section 3.5)."""
    rates = 1 / 10000 ** (torch.arange(width // 2, dtype=torch.float64) / (width / 2))
    angles = positions.double()[:, None] * rates
    return torch.cat([angles.sin(), angles.cos()], dim=1).float()


def space_table(width: int, rows: int, columns: int) -> Tensor:
    """Positions in a grid of tokens, `(rows * columns, d)`: the first half encodes the column, the second the row."""
    row, column = torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij")
    return torch.cat([sinusoids(width // 2, z.flatten()) for z in (column, row)], dim=1)
