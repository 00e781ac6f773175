"""`fvdm plan --model XL/2 --nodes 4 --gpus-per-node 8`: estimate what a training run needs.

Counted from the shapes, not measured: parameters, bytes per rank under ZeRO-2, arithmetic per clip, bytes on the wire,
and from a GPU's data sheet the time of a step and what fits.
"""

from collections.abc import Sequence

from fvdm import config as settings
from fvdm.training.config import PlanConfig


def main(argv: Sequence[str] | None = None) -> None:
    """Command line."""
    try:
        config = settings.parse(PlanConfig, argv, __doc__, prog="fvdm plan")
        from fvdm.training.plan import report

        print("\n".join(report(config)))
    except ValueError as error:
        settings.fail(error)
