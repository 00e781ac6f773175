"""Layers of diffusers' image VAE that take fewer passes over memory, for the same bits."""

import functools
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def save_passes(model: Any) -> None:
    """Let the layers of diffusers take fewer passes over memory, for the same bits."""
    from diffusers.models.downsampling import Downsample2D
    from diffusers.models.resnet import ResnetBlock2D

    for block in model.modules():
        if isinstance(block, Downsample2D) and block.use_conv and block.padding == 0 and block.norm is None:
            block.forward = functools.partial(_downsample, block)
        if isinstance(block, ResnetBlock2D) and block.output_scale_factor == 1 and type(block.nonlinearity) is nn.SiLU:
            assert block.time_emb_proj is None
            assert block.upsample is None
            assert block.downsample is None
            block.forward = functools.partial(_residual, block)


def _residual(block: Any, x: Tensor, temb: None = None) -> Tensor:
    """Without gradients: activations and sums in place, and no division by 1."""
    hidden = block.conv1(F.silu(block.norm1(x), inplace=True))
    hidden = block.conv2(F.silu(block.norm2(hidden), inplace=True))
    return hidden.add_(x if block.conv_shortcut is None else block.conv_shortcut(x))


def _downsample(block: Any, x: Tensor) -> Tensor:
    """A row and a column of zeros more, then the convolution; without filling all of it with zeros first."""
    n, c, h, w = x.shape
    padded = torch.empty((n, c, h + 1, w + 1), dtype=x.dtype, device=x.device, memory_format=torch.channels_last)
    padded[..., :h, :w] = x
    padded[..., h, :] = 0
    padded[..., w] = 0
    return block.conv(padded)
