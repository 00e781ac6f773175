"""Settings of checkpoints."""

import math
from dataclasses import dataclass

from fvdm.config import in_range


@dataclass(frozen=True)
class CheckpointConfig:
    """When checkpoints are written and which are kept.

    Attributes:
        every: steps between checkpoints; one is also written at the end, and when the job receives a signal to stop.
        background: write while training continues, from a copy in host memory; otherwise training waits.
        keep_last: newest checkpoints that are kept; corrupt ones do not count, and are moved aside.
        keep_every: keep each checkpoint whose step is a multiple of this, too; 0 keeps none but the newest.
        timeout: seconds that a rank waits for another to write its part, on the slowest disk.
    """

    every: int = 5_000
    background: bool = True
    keep_last: int = 3
    keep_every: int = 0
    timeout: int = 1_800

    def __post_init__(self) -> None:
        """Raises ValueError for a setting out of its range."""
        some = (1, math.inf)
        in_range(self, "checkpoint", every=some, keep_last=some, keep_every=(0, math.inf), timeout=some)
