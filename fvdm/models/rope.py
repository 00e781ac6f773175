"""Rotary position embeddings in three dimensions: frame, row and column (RoFormer; Wan, section 4.2)."""

from typing import Any

import torch
from torch import Tensor

BASE = 10000.0


def rotation_table(grid: tuple[int, int, int], head_width: int, device: torch.device | str = "cpu") -> Tensor:
    """The angles' cosines and sines for every token of a clip.

    A third of a head's pairs of numbers turn with the row, a third with the column, the rest with the frame.

    Args:
        grid: frames, rows and columns `(f, h, w)` of tokens.
        head_width: numbers e of a head, even.
        device: where the table is made.

    Returns:
        float32 `(f*h*w, 1, e / 2, 2)`: cosine and sine of each pair's angle.
    """
    side = 2 * (head_width // 6)
    widths = (head_width - 2 * side, side, side)
    angles = []
    for axis, (size, width) in enumerate(zip(grid, widths, strict=True)):
        rates = BASE ** (-torch.arange(0, width, 2, dtype=torch.float64, device=device) / width)
        angle = torch.arange(size, device=device)[:, None] * rates  # (size, width / 2)
        shape = [1, 1, 1, width // 2]
        shape[axis] = size
        angles.append(angle.view(shape).expand(*grid, -1))
    total = torch.cat(angles, dim=-1).flatten(0, 2)[:, None]
    return torch.stack([total.cos(), total.sin()], dim=-1).float()


class _Rotate(torch.autograd.Function):
    """Complex products: one pass over the memory, and nothing but the table is kept for the backward pass."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, table: Tensor) -> Tensor:
        ctx.save_for_backward(table)
        return _turn(x, torch.view_as_complex(table))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        (table,) = ctx.saved_tensors
        return _turn(gradients[0], torch.view_as_complex(table).conj()), None


def _turn(x: Tensor, phases: Tensor) -> Tensor:
    pairs = torch.view_as_complex(x.float().contiguous().unflatten(-1, (-1, 2)))
    return torch.view_as_real(pairs * phases).flatten(-2).to(x.dtype)


def rotate(x: Tensor, table: Tensor) -> Tensor:
    """Turn each pair of numbers of queries or keys `(b n h e)` by its token's angles; computed in float32.

    Args:
        x: queries or keys `(b n h e)`.
        table: from `rotation_table`, `(n, 1, e / 2, 2)`.
    """
    if not torch.compiler.is_compiling():
        return _Rotate.apply(x, table)
    # A compiler makes one loop of the real form, and knows no complex numbers.
    first, second = x.float().unflatten(-1, (-1, 2)).unbind(-1)
    cos, sin = table.unbind(-1)
    return torch.stack([first * cos - second * sin, first * sin + second * cos], dim=-1).flatten(-2).to(x.dtype)
