"""Error against steps of every solver, on Gaussian data whose probability-flow ODE is known exactly.

    python benchmarks/solver_order.py --out docs/solver_order.png

Each number of the data is Gaussian, with deviations from 0.1 to 1. The left panel ends above the last timestep, where
the theoretical order of a solver is seen; the middle one shows it frame by frame, for a schedule in which the frames
are denoised at different times; the right one goes from pure noise to clean data, as sampling does.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

if __package__ in (None, ""):  # run as a file: the folder above holds the packages
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from fvdm import config as settings


@dataclass(frozen=True)
class SolverOrderConfig:
    """The figure of the solvers' errors.

    Attributes:
        out: image to write (png, svg or pdf).
    """

    out: str = "solver_order.png"


def main(argv: Sequence[str] | None = None) -> None:
    """Command line: measure, print, draw."""
    try:
        out = Path(settings.parse(SolverOrderConfig, argv, __doc__).out)
        if out.suffix not in (".png", ".svg", ".pdf") or not out.parent.is_dir():
            raise ValueError(f"--out {out}: name a .png, .svg or .pdf in a folder that exists")
    except ValueError as error:
        settings.fail(error)
    from benchmarks.solver_errors import draw_all

    draw_all(out)
    print(f"image: {out}")


if __name__ == "__main__":
    main()
