"""One attention function for space and time: flash-attn where it is installed and fits, else PyTorch's own.

The only place that imports flash_attn.
"""

import functools
import logging
import math
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fvdm.choices import one_of
from fvdm.models.blockwise import blockwise_attention
from fvdm.models.config import BACKENDS, Backend

HALF = (torch.bfloat16, torch.float16)


class Choice(NamedTuple):
    """A line of the table by which `auto` picks.

    Attributes:
        device: cuda or cpu.
        dtypes: of the queries, keys and values.
        positions: length of the longest sequence for which the line holds.
        backend: what is picked, where it is installed and takes such tensors; else the next line that holds decides.
    """

    device: str
    dtypes: tuple[torch.dtype, ...]
    positions: float
    backend: str


# The first line that holds decides; where none does, PyTorch's own attention. `benchmarks/gpu_acceptance.py --part
# attention` prints the lines that its measurements suggest.
AUTO = (
    # Plain products in bfloat16 beat PyTorch's fused attention on CPUs: 2 to 8 times up to here, 2 times beyond.
    Choice("cpu", (torch.bfloat16,), 512, "math"),
    Choice("cpu", (torch.bfloat16,), math.inf, "blockwise"),
    # Launches dominate below this length. Not measured yet.
    Choice("cuda", HALF, 199, "sdpa"),
    Choice("cuda", HALF, math.inf, "flash"),
)
BOUNDS = sorted({choice.positions for choice in AUTO})
LAUNCH_LIMIT = 65535  # batch x heads of one CUDA launch: the second and third dimension of a grid end there

Function = Callable[[Tensor, Tensor, Tensor], Tensor]
logger = logging.getLogger(__name__)


def import_flash() -> Function | None:
    """flash-attn's function, of version 2 or 4, or None where neither can be imported.

    The function itself is imported: of flash-attn-4 only the subpackage `flash_attn.cute` exists, whose function
    returns the logarithm of the softmax's sums beside the output.
    """
    failures = (ImportError, OSError, RuntimeError)  # missing; or built for another CUDA or PyTorch
    try:
        from flash_attn import flash_attn_func

        return flash_attn_func
    except failures:
        pass
    try:
        from flash_attn.cute import flash_attn_func as with_sums
    except failures:
        return None
    return lambda q, k, v: with_sums(q, k, v)[0]


FLASH = import_flash()


def attention(q: Tensor, k: Tensor, v: Tensor, backend: Backend = "auto") -> Tensor:
    """Softmax attention of each head over the positions of the keys.

    Strided views are welcome: no backend needs contiguous input, and all return memory laid out as `(b n h e)`.

    Args:
        q: queries `(b n h e)`.
        k: keys `(b m h e)`.
        v: values `(b m h e)`.
        backend: `auto` picks; `flash`, `sdpa`, `math` and `blockwise` force one.

    Returns:
        `(b n h e)` in the dtype of `q`.

    Raises:
        ValueError: if the forced backend is unknown or cannot run on these tensors.
    """
    chosen = choose(q.device.type, q.dtype, _reach(max(q.shape[1], k.shape[1])), q.shape[3], backend)
    function = FLASH if chosen == "flash" and FLASH is not None else _FUNCTIONS[chosen]
    if q.device.type == "cuda":
        return in_launches(function, q, k, v, LAUNCH_LIMIT)
    return function(q, k, v)


def in_launches(function: Function, q: Tensor, k: Tensor, v: Tensor, limit: int) -> Tensor:
    """Call `function` on parts of the batch or of the heads, `limit` of batch x heads at most in each.

    Attention over time has a head for each token of a frame, which may be more than a CUDA grid holds.

    Args:
        function: attention of `(b n h e)`.
        q: queries `(b n h e)`.
        k: keys.
        v: values.
        limit: batch x heads of a launch.
    """
    b, _, h, _ = q.shape
    if b * h <= limit:
        return function(q, k, v)
    axis, size = (2, limit // b) if h >= b else (0, limit // h)
    queries, keys, values = (z.split(max(1, size), axis) for z in (q, k, v))
    parts = zip(queries, keys, values, strict=True)
    return torch.cat([in_launches(function, *part, limit) for part in parts], axis)


def _sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k, v = (z.transpose(1, 2) for z in (q, k, v))  # (b h n e)
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2)


def _math(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    # Contiguous: the products would copy them anyway, and again in the backward pass.
    q, k, v = (z.transpose(1, 2).contiguous() for z in (q, k, v))  # (b h n e)
    weights = (q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5).softmax(-1, dtype=torch.float32)
    return (weights.to(v.dtype) @ v).transpose(1, 2)


_FUNCTIONS: dict[str, Function] = {"sdpa": _sdpa, "math": _math, "blockwise": blockwise_attention}


def _reach(positions: int) -> float:
    """The bound of the table for a length: a graph is not compiled again for every number of frames."""
    return min(bound for bound in BOUNDS if positions <= bound)


def choose(device: str, dtype: torch.dtype, reach: float, width: int, backend: Backend) -> str:
    """The backend for such tensors. `compile_blocks` marks it as constant: evaluated once while a graph is traced."""
    return _chosen(device, dtype, reach, width, backend)


@functools.cache
def _chosen(device: str, dtype: torch.dtype, reach: float, width: int, backend: Backend) -> str:
    """Cached, so that each choice is made, and logged, once."""
    one_of("attention backend", backend, BACKENDS)
    fits = device == "cuda" and dtype in HALF and width <= 256 and width % 8 == 0
    installed = FLASH is not None
    if backend == "flash" and not (fits and installed):
        reason = (
            f"it takes bf16 or fp16 on CUDA with head width a multiple of 8 up to 256, not {dtype} on {device} "
            f"with {width}"
            if installed
            else "it is not installed"
        )
        raise ValueError(f"flash-attn cannot be used: {reason}; set attention to auto or sdpa")
    chosen: str = backend
    if backend == "auto":
        lines = [c.backend for c in AUTO if c.device == device and dtype in c.dtypes and reach <= c.positions]
        chosen = next((name for name in lines if name != "flash" or (fits and installed)), "sdpa")
    logger.info("attention over up to %s positions on %s in %s: %s", reach, device, dtype, chosen)
    return chosen
