"""Every attention backend over space and time, and whether `auto` picks the fastest."""

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.acceptance.networks import DTYPES, free, network, seconds, synchronize
from benchmarks.acceptance.record import LeftOutError, Outcome, Record
from fvdm.models.attention import AUTO, attention
from fvdm.models.config import BACKENDS

if TYPE_CHECKING:
    from benchmarks.acceptance.config import AcceptanceConfig

KERNELS = {
    "cuDNN": SDPBackend.CUDNN_ATTENTION,
    "PyTorch's flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "PyTorch's math": SDPBackend.MATH,
}
HEADS = (16, 72)  # heads of XL, and their width
SLOWER = 1.1  # `auto` may take so many times as long as the fastest before it counts as a wrong choice
TIME = "forward + backward, ms"
GRID = 65536  # batch x heads from which flash's launch grid is too small


def run(record: Record, config: "AcceptanceConfig") -> None:
    """All checks of the part."""
    shape = network(config.timed_model, config)
    b, f, n = config.timed_batch, shape.frames, shape.tokens // shape.frames
    heads, width = (2, 32) if config.smoke else HEADS
    axes = {"space": (b * f, n, heads, width), "time": (b * n, f, heads, width)}
    rounds = 2 if config.smoke else 20
    subjects: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
        backend: functools.partial(attention, backend=backend) for backend in BACKENDS
    }
    subjects |= {name: functools.partial(fused, kernel) for name, kernel in KERNELS.items()}
    for precision in ("bf16",) if config.device == "cuda" else DTYPES:
        for axis, size in axes.items():
            title = f"{axis}, {size[1]} positions, {precision}"
            for name, function in subjects.items():
                measure = functools.partial(
                    time_backend, function, size, precision, config.device, rounds, name == "auto"
                )
                record.check(f"{title}: {name}", measure)
            record.check(f"{title}: the choice of auto", functools.partial(judge_auto, record, title))
            record.check(
                f"{title}: line of the table of auto",
                functools.partial(suggest_choice, record, title, precision, size[1]),
            )
    rows = 64 if config.smoke else GRID // heads
    size = (rows, f, heads, width)
    record.check(
        f"time at large latents, {rows * heads} rows of heads: auto",
        functools.partial(time_backend, subjects["auto"], size, "bf16", config.device, 1, True),
    )


def fused(kernel: SDPBackend, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """PyTorch's attention by one of its kernels, `(b n h e)` as ours."""
    with sdpa_kernel(kernel):
        return F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)).transpose(1, 2)


def time_backend(
    function: Callable[[Tensor, Tensor, Tensor], Tensor],
    size: tuple[int, ...],
    precision: str,
    device: str,
    rounds: int,
    needed: bool,
) -> Outcome:
    """Milliseconds forward and with the backward pass, the peak memory, and the distance from exact products.

    Raises:
        LeftOutError: if the backend does not run here on such tensors, and is not `needed`.
    """
    free()
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(size, generator=generator).to(device, DTYPES[precision]).requires_grad_() for _ in range(3))
    try:
        output = function(q, k, v)
        gradient = torch.randn_like(output)
        torch.autograd.grad(output, (q, k, v), gradient)
        synchronize(device)
    except (ValueError, RuntimeError, ImportError) as error:
        if needed:
            raise
        raise LeftOutError(str(error).strip().splitlines()[0]) from None

    def forward() -> None:
        with torch.no_grad():
            function(q, k, v)

    def backward() -> None:
        torch.autograd.grad(function(q, k, v), (q, k, v), gradient)

    values: dict[str, float] = {"forward, ms": 1e3 * seconds(forward, device, rounds)}
    values[TIME] = 1e3 * seconds(backward, device, rounds)
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        backward()
        values["peak, MiB"] = (torch.cuda.max_memory_allocated() - before) / 2**20
    few = [z[:2].detach().double().cpu() for z in (q, k, v)]
    exact = attention(few[0], few[1], few[2], "math")
    off = float((output[:2].detach().double().cpu() - exact).norm() / exact.norm())
    limit = 2e-2 if precision == "bf16" else 1e-4
    return Outcome(values | {"error": off}, off < limit, f"error {limit:g}")


def judge_auto(record: Record, title: str) -> Outcome:
    """Compare `auto` with the fastest of the backends that ran.

    Raises:
        LeftOutError: if `auto` did not run.
    """
    times = backend_times(record, title)
    if "auto" not in times:
        raise LeftOutError("auto has no time")
    own = times.pop("auto")
    fastest = min(times, key=times.__getitem__)
    values = {"auto, ms": own, "fastest": fastest, "fastest, ms": times[fastest]}
    # On a CPU a small network's times are noise: there, the choice is shown and not judged.
    good = own <= SLOWER * times[fastest] if record.device == "cuda" else None
    return Outcome(values | {"auto / fastest": own / times[fastest]}, good, f"{SLOWER:g} times the fastest")


def backend_times(record: Record, title: str) -> dict[str, float]:
    """Milliseconds forward and backward of each backend that ran, by name."""
    return {
        name.removeprefix(f"{title}: "): check["values"][TIME]
        for name, check in record.checks.items()
        if name.startswith(f"{title}: ") and TIME in check["values"]
    }


def suggest_choice(record: Record, title: str, precision: str, positions: int) -> Outcome:
    """The line of `fvdm.models.attention.AUTO` that these times ask for, and the backend that it has now.

    Raises:
        LeftOutError: if none of the backends that `auto` may pick ran.
    """
    times = {name: ms for name, ms in backend_times(record, title).items() if name in BACKENDS and name != "auto"}
    if not times:
        raise LeftOutError("no backend has a time")
    dtype = DTYPES[precision]
    line = f"Choice({record.device!r}, ({dtype},), {positions}, {min(times, key=times.__getitem__)!r})"
    held = [c.backend for c in AUTO if c.device == record.device and dtype in c.dtypes and positions <= c.positions]
    return Outcome({"measured": line, "in the table": " or else ".join([*held, "sdpa"])})
