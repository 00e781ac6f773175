"""Errors of the solvers on Gaussian data: the measurements of benchmarks/solver_order.py."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fvdm.diffusion.config import DiffusionConfig
from fvdm.diffusion.process import Diffusion
from fvdm.diffusion.sampling import sample
from fvdm.diffusion.solvers import solver
from fvdm.diffusion.timesteps import SPACINGS, spaced

ORDERS = {"ddim": 1, "dpm++": 2, "unipc": 3}
SPACING = {"ddim": "even", "dpm++": "log-snr", "unipc": "log-snr"}
TOP, END = 960, 192
FRAMES = {1: ("at once", "o"), 2: ("late", "^"), 3: ("with a wait", "s"), 4: ("stops early", "v")}  # of `asynchronous`
STEPS = (8, 12, 16, 24, 32, 48, 64)
COUNTS = (5, 8, 10, 15, 20, 25, 35, 50, 75, 100)
SPREAD = torch.logspace(-1, 0, 16, dtype=torch.float64)


def denoiser(diffusion: Diffusion) -> Callable[[Tensor, Tensor, Tensor | None], Tensor]:
    """The exact noise estimate for independent Gaussian numbers of deviation `SPREAD` along the last axis."""

    def model(x: Tensor, t: Tensor, y: Tensor | None = None) -> Tensor:
        alpha, sigma = diffusion.levels(t)
        return sigma * x.double() / (alpha**2 * SPREAD**2 + sigma**2)

    return model


def synchronous(steps: int) -> Tensor:
    """One frame, in even steps: `(steps + 1, 1)`."""
    return torch.linspace(TOP, END, steps + 1).round().long()[:, None]


def asynchronous(steps: int) -> Tensor:
    """Frame 0 is held; 1 starts at once, 2 late; 3 starts at once, waits half way, and continues; 4 stops early.

    Returns:
        int64 `(2 steps + 1, 5)`.
    """
    levels = synchronous(steps)[:, 0]
    rows, middle = torch.arange(2 * steps + 1), steps // 2
    late = (rows - middle).clamp(0, steps)
    waiting = torch.where(rows <= middle, rows, torch.where(rows <= steps, middle, rows - middle)).clamp(max=steps)
    columns = [torch.full_like(rows, steps), rows.clamp(max=steps), late, waiting, rows.clamp(max=middle)]
    return levels[torch.stack(columns, dim=1)]


def errors(diffusion: Diffusion, name: str, schedule: Tensor) -> Tensor:
    """Root mean square distance of each frame from the exact end of its way down `schedule (s + 1, f)`: `(f)`."""
    shape = (1, schedule.shape[1], 1, 256, len(SPREAD))
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    got = sample(denoiser(diffusion), x, schedule, diffusion, solver=solver(name))
    (a, s), (a_end, s_end) = (diffusion.levels(row[None]) for row in (schedule[0], schedule[-1]))
    exact = ((a_end**2 * SPREAD**2 + s_end**2) / (a**2 * SPREAD**2 + s**2)).sqrt() * x
    return (got - exact).square().mean((0, 2, 3, 4)).sqrt()


def order(steps: Sequence[int], found: Tensor) -> float:
    """By a line through the logarithms of the errors."""
    return -float(np.polyfit(np.log2(steps), found.log2().numpy(), 1)[0])


def draw_order(axis: Any, diffusion: Diffusion) -> None:
    """The errors of frames that go together, beside the theory."""
    for name, theory in ORDERS.items():
        found = torch.cat([errors(diffusion, name, synchronous(n)) for n in STEPS])
        axis.loglog(STEPS, found, "o-", label=f"{name} (order {theory})")
        axis.loglog(STEPS, [float(found[-1]) * (STEPS[-1] / n) ** theory for n in STEPS], "k:", linewidth=0.8)
    axis.set_title(f"t = {TOP} to {END} in even steps; dotted: theory", fontsize=10)


def draw_frames(axis: Any, diffusion: Diffusion) -> None:
    """The errors of frames that each go their own way, beside the theory."""
    for k, (name, theory) in enumerate(ORDERS.items()):
        found = torch.stack([errors(diffusion, name, asynchronous(n)) for n in STEPS])
        for frame, (what, marker) in FRAMES.items():
            label = what if name == "ddim" else None
            axis.loglog(STEPS, found[:, frame], f"{marker}-", color=f"C{k}", label=label, markersize=5, linewidth=0.8)
            print(f"{name:6} {what:12} order {order(STEPS, found[:, frame]):.2f}")
        axis.loglog(STEPS, [float(found[-1, 1]) * (STEPS[-1] / n) ** theory for n in STEPS], "k:", linewidth=0.8)
    axis.set_title("each frame in its own time; colours as on the left", fontsize=10)


def draw_sampling(axis: Any, diffusion: Diffusion) -> None:
    """The errors from noise to data, every solver in the spacing that suits it."""
    for name in ORDERS:
        for spacing in SPACINGS:
            ways = [spaced(spacing, n, diffusion.noise_levels())[:, None] for n in COUNTS]
            found = [errors(diffusion, name, way).item() for way in ways]
            print(f"{name:6} {spacing:9}", "  ".join(f"{n}: {e:.4f}" for n, e in zip(COUNTS, found, strict=True)))
            if spacing == SPACING[name]:
                axis.loglog(COUNTS, found, "o-", label=f"{name}, {spacing}")
                if name == "ddim":
                    axis.axhline(found[COUNTS.index(50)], color="k", linewidth=0.8, linestyle=":")
    axis.set_title("t = 1000 to 0; dotted: ddim at 50 steps", fontsize=10)


def draw_all(out: Path) -> None:
    """Measure, print, and draw the three panels into a file."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    diffusion = Diffusion(DiffusionConfig(learned_variance=False))
    figure, axes = pyplot.subplots(1, 3, figsize=(15, 4.4))
    for axis, draw in zip(axes, (draw_order, draw_frames, draw_sampling), strict=True):
        draw(axis, diffusion)
        axis.set(xlabel="steps of a frame", ylabel="error (RMS)")
        axis.legend()
        axis.grid(alpha=0.3, which="both")
    figure.tight_layout()
    figure.savefig(out, dpi=110)
