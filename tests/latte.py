"""A scalar-timestep Latte, written from its published structure with its published weight names, to compare with."""

import math

import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from torch import Tensor, nn


def timestep_embedding(t: Tensor, dim: int = 256) -> Tensor:
    rates = torch.exp(-math.log(10000) * torch.arange(dim // 2).float() / (dim // 2))
    angles = t[:, None].float() * rates
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


class Mlp(nn.Module):
    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(width, hidden), nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x), approximate="tanh"))


class Attention(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = rearrange(self.qkv(x), "b n (three h e) -> three b h n e", three=3, h=self.heads)
        weights = (q @ k.transpose(-2, -1) / q.shape[-1] ** 0.5).softmax(-1)
        return self.proj(rearrange(weights @ v, "b h n e -> b n (h e)"))


class Block(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.attn, self.mlp = Attention(width, heads), Mlp(width, 4 * width)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 6 * width))

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        a, b, g, a2, b2, g2 = self.adaLN_modulation(c).chunk(6, dim=1)

        def norm(z: Tensor) -> Tensor:
            return F.layer_norm(z, z.shape[-1:], eps=1e-6)

        x = x + g[:, None] * self.attn(norm(x) * (1 + b[:, None]) + a[:, None])
        return x + g2[:, None] * self.mlp(norm(x) * (1 + b2[:, None]) + a2[:, None])


class OfficialLatte(nn.Module):
    """`forward(x (b f c h w), t (b) in 0..999, y (b) or None)`."""

    def __init__(
        self, depth: int, width: int, heads: int, patch: int, channels: int, size: int, frames: int, classes: int = 0
    ) -> None:
        super().__init__()
        self.patch, self.frames, self.side = patch, frames, size // patch
        self.x_embedder = nn.ModuleDict({"proj": nn.Conv2d(channels, width, patch, patch)})
        self.t_embedder = nn.ModuleDict(
            {"mlp": nn.Sequential(nn.Linear(256, width), nn.SiLU(), nn.Linear(width, width))}
        )
        if classes:
            self.y_embedder = nn.ModuleDict({"embedding_table": nn.Embedding(classes + 1, width)})
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(depth))
        self.final_layer = nn.ModuleDict(
            {
                "linear": nn.Linear(width, patch * patch * channels * 2),
                "adaLN_modulation": nn.Sequential(nn.SiLU(), nn.Linear(width, 2 * width)),
            }
        )
        self.pos_embed = nn.Parameter(space_positions(width, self.side)[None], requires_grad=False)
        self.temp_embed = nn.Parameter(positions(width, torch.arange(frames))[None], requires_grad=False)

    def forward(self, x: Tensor, t: Tensor, y: Tensor | None = None) -> Tensor:
        b, f = x.shape[:2]
        x = self.x_embedder["proj"](x.flatten(0, 1)).flatten(2).transpose(1, 2) + self.pos_embed  # ((b f) n d)
        c = self.t_embedder["mlp"](timestep_embedding(t))
        if y is not None:
            c = c + self.y_embedder["embedding_table"](y)
        n = x.shape[1]
        for i in range(0, len(self.blocks), 2):
            x = self.blocks[i](x, repeat(c, "b d -> (b f) d", f=f))
            x = rearrange(x, "(b f) n d -> (b n) f d", b=b)
            if i == 0:
                x = x + self.temp_embed
            x = self.blocks[i + 1](x, repeat(c, "b d -> (b n) d", n=n))
            x = rearrange(x, "(b n) f d -> (b f) n d", b=b)
        shift, scale = self.final_layer["adaLN_modulation"](repeat(c, "b d -> (b f) d", f=f)).chunk(2, dim=1)
        x = F.layer_norm(x, x.shape[-1:], eps=1e-6) * (1 + scale[:, None]) + shift[:, None]
        x = self.final_layer["linear"](x)
        s, p = self.side, self.patch
        return rearrange(x, "(b f) (h w) (p q c) -> b f c (h p) (w q)", b=b, h=s, w=s, p=p, q=p)


def positions(width: int, where: Tensor) -> Tensor:
    rates = 1.0 / 10000 ** (torch.arange(width // 2, dtype=torch.float64) / (width / 2.0))
    angles = torch.outer(where.double(), rates)
    return torch.cat([angles.sin(), angles.cos()], dim=1).float()


def space_positions(width: int, side: int) -> Tensor:
    """As DiT: token (row i, column j) encodes j in the first half and i in the second."""
    rows = [
        torch.cat([positions(width // 2, torch.tensor([j])), positions(width // 2, torch.tensor([i]))], dim=1)
        for i in range(side)
        for j in range(side)
    ]
    return torch.cat(rows)


def randomised(model: nn.Module, seed: int = 0) -> nn.Module:
    """Every trainable weight drawn again, so that no zero hides a mistake."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.copy_(torch.randn(p.shape, generator=generator) * (0.5 / p.shape[-1] ** 0.5 if p.ndim > 1 else 0.1))
    return model
