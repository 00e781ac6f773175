"""One attention function for space and time: flash-attn where it is installed and fits, else PyTorch's own.

The only place that imports flash_attn.
"""

import functools
import importlib.util
import logging

import torch
import torch.nn.functional as F
from torch import Tensor

from fvdm.models.config import BACKENDS, Backend

# Positions up to which plain products in bfloat16 beat PyTorch's fused attention on CPUs, 2 to 8 times.
CPU_PRODUCTS = 512
FLASH_PAYS = 200  # positions from which flash-attn pays: launches dominate below

logger = logging.getLogger(__name__)


def attention(q: Tensor, k: Tensor, v: Tensor, backend: Backend = "auto") -> Tensor:
    """Softmax attention of each head over `n` positions.

    Strided views are welcome: no backend needs contiguous input, and all return memory laid out as `(b n h e)`.

    Args:
        q: queries `(b n h e)`; likewise `k` and `v`.
        k: keys.
        v: values.
        backend: `auto` picks; `flash`, `sdpa` and `math` force one.

    Returns:
        `(b n h e)` in the dtype of `q`.

    Raises:
        ValueError: if the forced backend is unknown or cannot run on these tensors.
    """
    chosen = _choose(q.device.type, q.dtype, _reach(q.shape[1]), q.shape[3], backend)
    if chosen == "flash":
        from flash_attn import flash_attn_func

        return flash_attn_func(q, k, v)
    q, k, v = (z.transpose(1, 2) for z in (q, k, v))  # (b h n e)
    if chosen == "sdpa":
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2)
    q, k, v = (z.contiguous() for z in (q, k, v))  # The products would copy them anyway, and again in the backward.
    weights = (q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5).softmax(-1, dtype=torch.float32)
    return (weights.to(v.dtype) @ v).transpose(1, 2)


def _reach(positions: int) -> str:
    """How long a sequence is: words, so that a compiled graph need not be made anew for every number of frames."""
    if positions < FLASH_PAYS:
        return f"fewer than {FLASH_PAYS}"
    return f"up to {CPU_PRODUCTS}" if positions <= CPU_PRODUCTS else f"more than {CPU_PRODUCTS}"


@torch.compiler.assume_constant_result
def _choose(device: str, dtype: torch.dtype, reach: str, width: int, backend: Backend) -> str:
    """The backend for such tensors. A compiler asks while it traces, and keeps the answer: no break in its graph."""
    return _chosen(device, dtype, reach, width, backend)


@functools.cache
def _chosen(device: str, dtype: torch.dtype, reach: str, width: int, backend: Backend) -> str:
    """Cached, so that each choice is made, and logged, once."""
    if backend not in BACKENDS:
        raise ValueError(f"attention backend {backend!r} is unknown; choose one of {', '.join(BACKENDS)}")
    fits = device == "cuda" and dtype in (torch.bfloat16, torch.float16) and width <= 256 and width % 8 == 0
    installed = importlib.util.find_spec("flash_attn") is not None
    if backend == "flash" and not (fits and installed):
        reason = (
            f"it takes bf16 or fp16 on CUDA with head width a multiple of 8 up to 256, not {dtype} on {device} "
            f"with {width}"
            if installed
            else "it is not installed"
        )
        raise ValueError(f"flash-attn cannot be used: {reason}; set attention to auto or sdpa")
    chosen = backend
    if backend == "auto":
        chosen = "flash" if fits and installed and reach != _reach(0) else "sdpa"
        if device == "cpu" and dtype == torch.bfloat16 and reach != _reach(CPU_PRODUCTS + 1):
            chosen = "math"
    logger.info("attention over %s positions on %s in %s: %s", reach, device, dtype, chosen)
    return chosen
