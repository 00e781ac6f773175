"""Wan's transformer with a timestep per frame (Wan 2.1 and 2.2, text to video), with the weight names of diffusers.

Read top to bottom: `Wan.forward` is the whole network. Tokens are `(b f n d)`: n tokens in each of f latent frames. The
modulation is `(b f 6 d)`, computed once per frame and broadcast over the frame's tokens, where an implementation with a
timestep per token holds it for every token.

All tokens of a clip attend to each other, with rotary positions; each block then attends to the text, `y (b l e)`,
which is padded with zeros and has no mask.
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from fvdm.diffusion.process import check_timesteps
from fvdm.models.attention import attention
from fvdm.models.backbone import Backbone
from fvdm.models.config import Backend
from fvdm.models.layers import EPS, GELU, modulated, patchify, unpatchify
from fvdm.models.rope import rotate, rotation_table
from fvdm.models.wan_config import WanConfig, to_diffusers


class Projection(nn.Module):
    """Two linear layers with an activation between them."""

    def __init__(self, width_in: int, width: int, activation: nn.Module) -> None:
        super().__init__()
        self.linear_1, self.linear_2 = nn.Linear(width_in, width), nn.Linear(width, width)
        self.activation = activation

    def forward(self, x: Tensor) -> Tensor:
        """`(... e) -> (... d)`."""
        return self.linear_2(self.activation(self.linear_1(x)))


class Conditions(nn.Module):
    """Embeds the timesteps of the frames and the text."""

    def __init__(self, config: WanConfig) -> None:
        super().__init__()
        self.frequencies = config.frequencies
        self.time_embedder = Projection(config.frequencies, config.width, nn.SiLU())
        self.time_proj = nn.Linear(config.width, 6 * config.width)
        self.text_embedder = Projection(config.text_width, config.width, GELU())

    def forward(self, t: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """`t (b f)`, `y (b l e)` -> embedding `(b f d)`, modulation `(b f 6 d)`, text `(b l d)`."""
        dtype = self.time_proj.weight.dtype
        count = self.frequencies // 2
        # In float32: integers above 256 are not exact in bfloat16.
        exponents = torch.arange(count, device=t.device, dtype=torch.float32) / count
        rates = torch.exp(-math.log(10000) * exponents)
        angles = t.float()[..., None] * rates
        embedded = self.time_embedder(torch.cat([angles.cos(), angles.sin()], dim=-1).to(dtype))
        modulation = self.time_proj(F.silu(embedded)).unflatten(-1, (6, -1))
        return embedded, modulation, self.text_embedder(y.to(dtype))


class Attention(nn.Module):
    """Multi-head attention whose queries and keys are normalised over all heads together."""

    def __init__(self, width: int, heads: int, backend: Backend) -> None:
        super().__init__()
        self.heads, self.backend = heads, backend
        self.to_q, self.to_k, self.to_v = (nn.Linear(width, width) for _ in range(3))
        self.to_out = nn.ModuleList([nn.Linear(width, width)])
        self.norm_q, self.norm_k = nn.RMSNorm(width, eps=EPS), nn.RMSNorm(width, eps=EPS)

    def forward(self, x: Tensor, context: Tensor, rotation: Tensor | None = None) -> Tensor:
        """Queries of `x (b m d)`, keys and values of `context (b l d)` `-> (b m d)`; rotated by `rotation`, if any."""
        q, k = self.norm_q(self.to_q(x)), self.norm_k(self.to_k(context))
        q, k, v = (rearrange(z, "b m (h e) -> b m h e", h=self.heads) for z in (q, k, self.to_v(context)))
        if rotation is not None:
            q, k = rotate(q, rotation), rotate(k, rotation)
        return self.to_out[0](attention(q, k, v, self.backend).flatten(2))


class Activated(nn.Module):
    """The first layer of a feed-forward network with its activation; `proj` alone is called by `Block`."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.proj = nn.Linear(width, hidden)


class FeedForward(nn.Module):
    """`net.0.proj`, GELU, `net.2`, as the weights are named."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.net = nn.ModuleList([Activated(width, hidden), GELU(), nn.Linear(hidden, width)])

    def forward(self, x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
        """Residual tokens `(b f n d)`, their frames' shift and scale `(b f 1 d)` `-> (b f n d)`."""
        first, activation, last = self.net
        return last(activation(modulated(first.proj, x, shift, scale)))  # type: ignore[arg-type]


class Block(nn.Module):
    """Attention over the clip, attention to the text, and a feed-forward network; the first and last are modulated."""

    def __init__(self, config: WanConfig) -> None:
        super().__init__()
        d = config.width
        self.attn1 = Attention(d, config.heads, config.attention)
        self.attn2 = Attention(d, config.heads, config.attention)
        self.norm2: nn.Module = nn.LayerNorm(d, eps=EPS) if config.cross_norm else nn.Identity()
        self.ffn = FeedForward(d, config.hidden)
        self.scale_shift_table = nn.Parameter(torch.zeros(1, 6, d))

    def forward(self, x: Tensor, text: Tensor, modulation: Tensor, rotation: Tensor) -> Tensor:
        """Tokens `x (b f n d)`, text `(b l d)`, modulation `(b f 6 d)`, rotations `-> (b f n d)`."""
        frames = x.shape[1]
        # Few numbers, so in float32 whatever the weights are: the table is small beside what is added to it.
        table = (self.scale_shift_table.float() + modulation.float()).to(x.dtype)
        shift_1, scale_1, gate_1, shift_2, scale_2, gate_2 = table.chunk(6, dim=2)  # (b f 1 d)
        tokens = torch.addcmul(shift_1, F.layer_norm(x, x.shape[-1:], eps=EPS), 1 + scale_1).flatten(1, 2)
        x = torch.addcmul(x, gate_1, self.attn1(tokens, tokens, rotation).unflatten(1, (frames, -1)))
        x = x + self.attn2(self.norm2(x).flatten(1, 2), text).unflatten(1, (frames, -1))
        return torch.addcmul(x, gate_2, self.ffn(x, shift_2, scale_2))


class Wan(Backbone):
    """The denoiser: `forward(x (b f c h w), t (b f), y (b l e)) -> (b f c h w)`; it estimates `noise - x_0`."""

    Config = WanConfig
    config: WanConfig

    def __init__(self, config: WanConfig) -> None:
        super().__init__()
        self.config = c = config
        self.patch_embedding = nn.Conv3d(c.channels, c.width, (1, c.patch, c.patch), (1, c.patch, c.patch))
        self.condition_embedder = Conditions(c)
        self.blocks = nn.ModuleList(Block(c) for _ in range(c.depth))
        self.proj_out = nn.Linear(c.width, c.patch**2 * c.channels)
        self.scale_shift_table = nn.Parameter(torch.zeros(1, 2, c.width))
        self.register_buffer("empty_prompt", None, persistent=False)  # (l e)
        self.initialise()

    def initialise(self) -> None:
        """Draw new weights: Xavier, small embeddings and tables, and an output of zero."""
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Conv3d):
                nn.init.xavier_uniform_(module.weight.flatten(1))
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        for name, weight in self.named_parameters():
            if "embedder" in name and name.endswith("weight"):
                nn.init.normal_(weight, std=0.02)
            elif name.endswith("scale_shift_table"):
                nn.init.normal_(weight, std=self.config.width**-0.5)
        nn.init.zeros_(self.proj_out.weight)

    def forward(self, x: Tensor, t: Tensor, y: Tensor | None = None) -> Tensor:
        """Estimate the velocity `noise - x_0` of every frame.

        Args:
            x: noisy latents `(b f c h w)`; f and the size are free.
            t: timesteps `(b f)` in 0..1000, one per latent frame.
            y: text embeddings `(b l e)`, padded with zeros.

        Returns:
            `(b f c h w)` in the dtype of the weights.

        Raises:
            ValueError: if the shapes do not fit the model, or the text is missing.
        """
        y = self._check(x, t, y)
        patch, (rows, columns) = self.config.patch, (side // self.config.patch for side in x.shape[3:])
        embedded, modulation, text = self.condition_embedder(t, y)
        rotation = rotation_table((x.shape[1], rows, columns), self.config.width // self.config.heads, x.device)
        # A convolution whose stride is its size is a linear layer of patches.
        embed = self.patch_embedding
        x = F.linear(patchify(x.to(text.dtype), patch), embed.weight.flatten(1), embed.bias)
        for i in range(self.config.depth):
            x = self.run_block(i, x, text, modulation, rotation)
        shift, scale = (self.scale_shift_table + embedded.unsqueeze(2)).chunk(2, dim=2)
        return unpatchify(modulated(self.proj_out, x, shift, scale), patch, (rows, columns))

    def config_dict(self) -> dict[str, Any]:
        """The contents of `config.json`, as diffusers reads it."""
        return to_diffusers(self.config)

    def null(self, count: int) -> Tensor:
        """The embedding of the empty prompt for `count` clips, `(count l e)`.

        Raises:
            ValueError: if nobody has set `empty_prompt (l e)`, which a text encoder makes.
        """
        if self.empty_prompt is None:
            raise ValueError(
                "the embedding of the empty prompt is not known; set model.empty_prompt, or pass a negative condition"
            )
        return self.empty_prompt.expand(count, -1, -1)

    def _check(self, x: Tensor, t: Tensor, y: Tensor | None) -> Tensor:
        check_timesteps(x, t)
        c = self.config
        if x.shape[2] != c.channels or x.shape[3] % c.patch or x.shape[4] % c.patch:
            raise ValueError(
                f"the model takes latents of {c.channels} channels whose sides are multiples of {c.patch}, "
                f"not {tuple(x.shape[2:])}"
            )
        if max(x.shape[1], x.shape[3] // c.patch, x.shape[4] // c.patch) > c.positions:
            raise ValueError(f"the model knows {c.positions} positions in each direction, not {tuple(x.shape)}")
        if y is None or y.ndim != 3 or y.shape[0] != x.shape[0] or y.shape[2] != c.text_width:
            found = "none" if y is None else str(tuple(y.shape))
            raise ValueError(
                f"the model needs text embeddings y (b l {c.text_width}) for {x.shape[0]} clips, not {found}"
            )
        return y
