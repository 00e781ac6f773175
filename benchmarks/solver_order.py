"""Error against steps of every solver, on Gaussian data whose probability-flow ODE is known exactly.

    python benchmarks/solver_order.py --out docs/solver_order.png

Each number of the data is Gaussian, with deviations from 0.1 to 1. The left picture ends above the last timestep, where
the theoretical order of a solver is seen; the right one goes from pure noise to clean data, as sampling does.
"""

import argparse
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from fvdm.config import fail
from fvdm.diffusion import Diffusion, DiffusionConfig
from fvdm.samplers import sample
from fvdm.solvers import solver
from fvdm.timesteps import SPACINGS, spaced

ORDERS = {"ddim": 1, "dpm++": 2, "unipc": 3}
SPACING = {"ddim": "even", "dpm++": "log-snr", "unipc": "log-snr"}
TOP, END = 960, 192
SPREAD = torch.logspace(-1, 0, 16, dtype=torch.float64)


def denoiser(diffusion: Diffusion) -> Callable[[Tensor, Tensor, Tensor | None], Tensor]:
    """The exact noise estimate for independent Gaussian numbers of deviation `SPREAD` along the last axis."""

    def model(x: Tensor, t: Tensor, y: Tensor | None = None) -> Tensor:
        alpha, sigma = diffusion.levels(t)
        return sigma * x.double() / (alpha**2 * SPREAD**2 + sigma**2)

    return model


def error(diffusion: Diffusion, name: str, levels: Tensor) -> float:
    """Root mean square distance from the exact end of the way down `levels (s + 1,)`."""
    x = torch.randn((1, 1, 1, 256, len(SPREAD)), generator=torch.Generator().manual_seed(0))
    got = sample(denoiser(diffusion), x, levels[:, None], diffusion, solver=solver(name))
    (a, s), (a_end, s_end) = (diffusion.levels(level.view(1, 1)) for level in (levels[0], levels[-1]))
    exact = ((a_end**2 * SPREAD**2 + s_end**2) / (a**2 * SPREAD**2 + s**2)).sqrt() * x
    return (got - exact).square().mean().sqrt().item()


def main() -> None:
    """Command line: measure, print, draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", default="solver_order.png", help="picture to write (png, svg or pdf)")
    out = Path(parser.parse_args().out)
    if out.suffix not in (".png", ".svg", ".pdf") or not out.parent.is_dir():
        fail(f"--out {out}: name a .png, .svg or .pdf in a folder that exists")
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    diffusion = Diffusion(DiffusionConfig(learned_variance=False))
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(11, 4.4))
    for name, order in ORDERS.items():
        steps = [8, 12, 16, 24, 32, 48, 64]
        found = [error(diffusion, name, torch.linspace(TOP, END, n + 1).round().long()) for n in steps]
        left.loglog(steps, found, "o-", label=f"{name} (order {order})")
        left.loglog(steps, [found[-1] * (steps[-1] / n) ** order for n in steps], "k:", linewidth=0.8)
        counts = [5, 8, 10, 15, 20, 25, 35, 50, 75, 100]
        for spacing in SPACINGS:
            found = [error(diffusion, name, spaced(spacing, n, diffusion.noise_levels())) for n in counts]
            print(f"{name:6} {spacing:9}", "  ".join(f"{n}: {e:.4f}" for n, e in zip(counts, found, strict=True)))
            if spacing == SPACING[name]:
                right.loglog(counts, found, "o-", label=f"{name}, {spacing}")
                if name == "ddim":
                    right.axhline(found[counts.index(50)], color="k", linewidth=0.8, linestyle=":")
    left.set_title(f"t = {TOP} to {END} in even steps; dotted: theory", fontsize=10)
    right.set_title("t = 1000 to 0; dotted: ddim at 50 steps", fontsize=10)
    for axis in (left, right):
        axis.set(xlabel="network evaluations", ylabel="error (RMS)")
        axis.legend()
        axis.grid(alpha=0.3, which="both")
    figure.tight_layout()
    figure.savefig(out, dpi=110)
    print(f"picture: {out}")


if __name__ == "__main__":
    main()
