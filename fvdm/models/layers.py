"""Layers that the backbones share: modulation per frame in little memory, GELU, and patches of frames."""

import math
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

EPS = 1e-6  # of every norm


class ModulatedLinear(torch.autograd.Function):
    """`linear(layer_norm(x) (1 + scale) + shift)`, which keeps `x` alone for the backward pass.

    The backward pass recomputes the norm and the modulated tokens: two cheap passes in place of two tensors of the size
    of `x`.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, shift: Tensor, scale: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        """Tokens `(b f n d)`, shift and scale `(b f 1 d)`, weight `(e d)`, bias `(e)` `-> (b f n e)`."""
        ctx.save_for_backward(x, shift, scale, weight)
        tokens = torch.native_layer_norm(x, x.shape[-1:], None, None, EPS)[0]
        return F.linear(torch.addcmul(shift, tokens, 1 + scale, out=tokens), weight, bias)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, ...]:
        """Gradients of all five."""
        (gradient,) = gradients
        x, shift, scale, weight = ctx.saved_tensors
        normed, mean, rstd = torch.native_layer_norm(x, x.shape[-1:], None, None, EPS)
        tokens = torch.addcmul(shift, normed, 1 + scale)
        rows = gradient.flatten(0, 2)
        to_weight = rows.T @ tokens.flatten(0, 2)
        to_tokens = torch.mm(rows, weight, out=tokens.view(-1, x.shape[-1])).view_as(x)
        to_scale = normed.mul_(to_tokens).sum(2, keepdim=True)
        scaled = torch.mul(to_tokens, 1 + scale, out=normed)
        mask = [True, False, False]
        to_x = torch.ops.aten.native_layer_norm_backward(scaled, x, x.shape[-1:], mean, rstd, None, None, mask)[0]
        return to_x, to_tokens.sum(2, keepdim=True), to_scale, to_weight, rows.sum(0)


def modulated(linear: nn.Module, x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """A linear layer of tokens `(b f n d)`, normalised and moved by their frame's `(b f 1 d)` shift and scale."""
    # A wrapper (LoRA), hooks and autocast need the layer's own forward, and a compiler finds what need not be stored.
    hooks = (linear._forward_hooks, linear._forward_pre_hooks, linear._backward_hooks, linear._backward_pre_hooks)
    bare = type(linear) is nn.Linear and not any(hooks)
    if torch.compiler.is_compiling() or torch.is_autocast_enabled(x.device.type) or not bare:
        return linear(torch.addcmul(shift, F.layer_norm(x, x.shape[-1:], eps=EPS), 1 + scale))
    return ModulatedLinear.apply(x, shift, scale, linear.weight, linear.bias)


class GELU(nn.Module):
    """GELU with the tanh approximation, in whichever of two equal forms is faster: `tanh(u) = 2 sigmoid(2u) - 1`."""

    def forward(self, x: Tensor) -> Tensor:
        """Elementwise, any shape."""
        if torch.compiler.is_compiling():  # one pass either way; the sigmoid's costs half of the tanh's on CPUs
            return x * torch.sigmoid(2 * math.sqrt(2 / math.pi) * (x + 0.044715 * x * x * x))
        return F.gelu(x, approximate="tanh")


def patchify(x: Tensor, patch: int) -> Tensor:
    """Cut frames into tokens: `(b f c h w) -> (b f n c*p*p)`."""
    return rearrange(x, "b f c (h p) (w q) -> b f (h w) (c p q)", p=patch, q=patch)


def unpatchify(x: Tensor, patch: int, grid: tuple[int, int]) -> Tensor:
    """Put tokens back in place: `(b f n p*p*c) -> (b f c h w)`; `grid` is the rows and columns of tokens."""
    return rearrange(x, "b f (h w) (p q c) -> b f c (h p) (w q)", h=grid[0], p=patch, q=patch)
