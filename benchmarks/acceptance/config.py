"""Settings of the acceptance program; imports no torch."""

from dataclasses import dataclass
from typing import Literal, get_args

Part = Literal["correctness", "attention", "speed", "memory", "training", "sampling", "profile"]
PARTS: tuple[str, ...] = get_args(Part)


@dataclass(frozen=True)
class AcceptanceConfig:
    """The acceptance program.

    Attributes:
        part: parts to run; all of them when not given.
        device: where the checks run; cpu is for trying the program itself.
        smoke: tiny networks and few steps, to see that every part works.
        model: size and patch of the network that is timed.
        batch: clips of a timed step.
        out: folder for results.
    """

    part: tuple[Part, ...] = ()
    device: Literal["cuda", "cpu"] = "cuda"
    smoke: bool = False
    model: str = ""
    batch: int = 0
    out: str = "runs/gpu_acceptance"

    @property
    def timed_model(self) -> str:
        """The network that is timed: XL/2, or a tiny one for smoke."""
        return self.model or ("T/2" if self.smoke else "XL/2")

    @property
    def timed_batch(self) -> int:
        """Clips of a timed step: 8, or 1 for smoke."""
        return self.batch or (1 if self.smoke else 8)

    @property
    def size(self) -> int:
        """Side of the latent frames."""
        return 8 if self.smoke else 32

    @property
    def frames(self) -> int:
        """Frames of a clip."""
        return 4 if self.smoke else 16
