"""How long a checkpoint holds training up, written beside it (from a copy) and with training waiting for the disk.

    torchrun --nproc-per-node 2 benchmarks/checkpoint_stall.py --model S/2

Takes optimizer steps on random latents, saves as a run does, and logs to MLflow: the time of a step without a
checkpoint, the time for which training stands still, and by how much the checkpoint and the steps after it take longer
in all than these steps without it.
"""

import shutil
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if __package__ in (None, ""):  # run as a file: the folder above holds the packages
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.on_ranks import run_on_ranks

if TYPE_CHECKING:
    from torch import Tensor

    from fvdm.checkpoints.writer import AsyncCheckpointWriter
    from fvdm.distributed import Ranks


@dataclass(frozen=True)
class CheckpointStallConfig:
    """The checkpoints that are timed.

    Attributes:
        model: size and patch.
        size: side of the latent frames.
        frames: frames of a clip.
        steps: steps without a checkpoint, and after each.
        rounds: checkpoints of either kind.
        out: folder for the checkpoints, which are removed at the end, and the journal of the MLflow run.
    """

    model: str = "S/2"
    size: int = 16
    frames: int = 16
    steps: int = 5
    rounds: int = 3
    out: str = "runs/benchmarks/checkpoint_stall"


class TrainingState:
    """A network that is trained on random latents, and its checkpoints."""

    def __init__(self, config: CheckpointStallConfig, ranks: "Ranks") -> None:
        """Collective."""
        from benchmarks.models import network, zero_engine

        shape = network(config.model, config.size, config.frames)
        self.engine, self.ema = zero_engine(shape, ranks, ranks.world_size)
        self.ranks, self.out = ranks, Path(config.out)
        self.shape = (1, *shape.clip_shape)
        self.taken = 0

    def step(self) -> float:
        """Take an optimizer step; its seconds."""
        import torch

        from fvdm.diffusion.process import Diffusion
        from fvdm.diffusion.timesteps import sample_timesteps

        start = time.monotonic()
        x_0 = torch.randn(self.shape, device=self.engine.device)
        t = sample_timesteps(x_0.shape[:2], 0.2).to(self.engine.device)
        self.engine.backward(Diffusion().training_losses(self.engine, x_0, t, None).mean())
        self.engine.step(self.taken, 10**6)
        self.ema.update()
        self.taken += 1
        return time.monotonic() - start

    def save(self, writer: "AsyncCheckpointWriter") -> None:
        """Begin a checkpoint, as `fvdm.training.run` does."""
        from fvdm.checkpoints.save import save

        state = {"names": self.engine.names, "settings": {}}
        start = [part.start for part in self.engine.slices]
        rank, world_size = self.ranks.rank, self.ranks.world_size

        def write(slices: "dict[str, Tensor]") -> None:
            save(self.out / "checkpoints", self.taken, slices, start, state, rank, world_size, writer.barrier)

        writer.begin(self.engine.state() | self.engine.own("ema", self.ema.shards), write)


def measure(config: CheckpointStallConfig, ranks: "Ranks") -> dict[str, float]:
    """The times, in seconds, and the GB of a rank; no checkpoint is left. Collective.

    Raises:
        ValueError: if there is no such model, or the folder holds checkpoints.
    """
    folder = Path(config.out) / "checkpoints"
    if folder.exists():  # It is removed at the end.
        raise ValueError(f"--out {config.out} holds checkpoints already; name another folder, or remove them")
    training = TrainingState(config, ranks)
    figures = time_checkpoints(training, config.steps, config.rounds)
    figures["rank_gb"] = 16 * sum(map(len, training.engine.slices)) / 1e9
    training.engine.close()
    if ranks.is_main:
        shutil.rmtree(folder)
    return figures


def time_checkpoints(training: TrainingState, steps: int, rounds: int) -> dict[str, float]:
    """Medians over the rounds, in seconds; both ways take turns. Collective."""
    import torch.distributed as dist

    from fvdm.checkpoints.writer import AsyncCheckpointWriter

    writers = {"background": AsyncCheckpointWriter(True, 600), "waiting": AsyncCheckpointWriter(False, 600)}
    for _ in range(2):
        training.step()
    found: dict[str, list[float]] = {}
    for _ in range(rounds):
        usual = statistics.median(training.step() for _ in range(steps))
        found.setdefault("step", []).append(usual)
        for name, writer in writers.items():
            dist.barrier()
            start = time.monotonic()
            training.save(writer)
            found.setdefault(f"{name}_stalled", []).append(writer.stalled)
            for _ in range(steps):
                training.step()
            writer.wait()
            found.setdefault(f"{name}_costs", []).append(time.monotonic() - start - steps * usual)
    return {name: statistics.median(values) for name, values in found.items()}


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, print, and log to MLflow."""
    run_on_ranks(CheckpointStallConfig, argv, __doc__, measure, "checkpoint_stall", "speed")


if __name__ == "__main__":
    main()
