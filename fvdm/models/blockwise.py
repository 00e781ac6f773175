"""Exact softmax attention a head and a block of queries at a time, by plain matrix products: for bfloat16 on CPUs.

PyTorch's fused attention on CPUs multiplies small tiles, which takes twice as long in bfloat16 as the same products in
larger pieces. Here a block of queries meets all keys of its head at once, its scores stay in the processor's cache, and
the backward pass computes them again, so that nothing but queries, keys and values is kept.

The scores are rounded to bfloat16 before the softmax, which is computed in float32, as with the backend `math`. The two
functions are operators of PyTorch's own kind: a compiler calls them as they are.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

SCORES = 2**20  # of a block; as float32, 4 MB
FEWEST = 128  # queries of a block: products of fewer rows are slow


def _heads(q: Tensor, k: Tensor) -> Iterator[tuple[int, int, list[slice]]]:
    """Sample, head, and the blocks of its queries."""
    n = q.shape[1]
    count = -(-n // max(FEWEST, SCORES // k.shape[1]))
    rows = -(-n // count)
    blocks = [slice(begin, min(begin + rows, n)) for begin in range(0, n, rows)]
    for sample in range(q.shape[0]):
        for head in range(q.shape[2]):
            yield sample, head, blocks


def _weights(q: Tensor, k: Tensor) -> Tensor:
    """Softmax over the keys, float32 `(n m)`, of queries `(n e)` and keys `(m e)`."""
    return (q @ k.T).float().mul_(q.shape[-1] ** -0.5).softmax(-1)


@torch.library.custom_op("fvdm::blockwise_attention", mutates_args=())
def blockwise_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Softmax attention of each head over the positions of the keys.

    Args:
        q: queries `(b n h e)`.
        k: keys `(b m h e)`.
        v: values `(b m h e)`.

    Returns:
        `(b n h e)` in the dtype of `q`.
    """
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    for b, h, blocks in _heads(q, k):
        keys, values = k[b, :, h].contiguous(), v[b, :, h].contiguous()
        for rows in blocks:
            out[b, rows, h] = _weights(q[b, rows, h].contiguous(), keys).to(v.dtype) @ values
    return out


@torch.library.custom_op("fvdm::blockwise_attention_backward", mutates_args=())
def _backward(gradient: Tensor, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of queries, keys and values; those of keys and values are summed over the blocks in float32."""
    scale = q.shape[-1] ** -0.5
    to_q, to_k, to_v = (torch.empty(z.shape, dtype=z.dtype, device=z.device) for z in (q, k, v))
    for b, h, blocks in _heads(q, k):
        keys, values = k[b, :, h].contiguous(), v[b, :, h].contiguous()
        sum_k, sum_v = torch.zeros_like(keys, dtype=torch.float32), torch.zeros_like(values, dtype=torch.float32)
        for rows in blocks:
            queries, part = q[b, rows, h].contiguous(), gradient[b, rows, h].contiguous()
            weights = _weights(queries, keys)
            sum_v += weights.to(v.dtype).T @ part
            to_weights = (part @ values.T).float()
            to_scores = torch._softmax_backward_data(to_weights, weights, -1, torch.float32)
            to_scores = to_scores.mul_(scale).to(q.dtype)
            to_q[b, rows, h] = to_scores @ keys
            sum_k += to_scores.T @ queries
        to_k[b, :, h], to_v[b, :, h] = sum_k, sum_v
    return to_q, to_k, to_v


@blockwise_attention.register_fake
def _(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return q.new_empty(q.shape)


@_backward.register_fake
def _(gradient: Tensor, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _keep(ctx: torch.autograd.function.FunctionCtx, inputs: tuple[Tensor, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _gradients(ctx: torch.autograd.function.FunctionCtx, gradient: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return _backward(gradient, *ctx.saved_tensors)  # type: ignore[attr-defined]


blockwise_attention.register_autograd(_gradients, setup_context=_keep)
