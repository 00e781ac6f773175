"""Clips through the causal VAE of Wan, a few frames at a time, with a cache of features between them.

The result is that of diffusers' own `encode` and `decode`, but neither pixels nor activations of the whole clip are
held: memory does not grow with the length of a clip.
"""

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from einops import rearrange
from torch import Tensor


def encode_chunks(model: Any, chunks: Iterable[Tensor]) -> Iterator[Tensor]:
    """Moments of a clip.

    Args:
        model: an AutoencoderKLWan.
        chunks: pixels in [-1, 1], `(b 3 n h w)`: the first frame, then groups of as many as the temporal stride.

    Yields:
        mean and log-variance of one latent frame, `(b 2c 1 h w)`.
    """
    patch = model.config.patch_size or 1
    cache: list[Any] = [None] * model._cached_conv_counts["encoder"]
    for chunk in chunks:
        patches = rearrange(chunk, "b c f (h p) (w q) -> b (c q p) f h w", p=patch, q=patch)
        yield model.quant_conv(model.encoder(patches, feat_cache=cache, feat_idx=[0]))


def decode_chunks(model: Any, latents: Iterable[Tensor]) -> Iterator[Tensor]:
    """Pixels of a clip.

    Args:
        model: an AutoencoderKLWan.
        latents: latent frames `(b c 1 h w)`, unscaled, one after the other.

    Yields:
        pixels in about [-1, 1], `(b 3 n h w)`: of the first frame, then of as many as the temporal stride.
    """
    patch = model.config.patch_size or 1
    cache: list[Any] = [None] * model._cached_conv_counts["decoder"]
    for number, z in enumerate(latents):
        first = {"first_chunk": True} if number == 0 else {}
        pixels = model.decoder(model.post_quant_conv(z), feat_cache=cache, feat_idx=[0], **first)
        yield rearrange(pixels, "b (c q p) f h w -> b c f (h p) (w q)", p=patch, q=patch)


def to_pixels(x: Tensor) -> Tensor:
    """uint8 of what a decoder gives in [-1, 1]; any shape."""
    return ((x.float() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)
