"""How long a checkpoint holds training up, written beside it (from a copy) and with training waiting for the disk.

    torchrun --nproc-per-node 2 benchmarks/checkpoint_stall.py --model S/2

Takes optimizer steps on random latents, saves as a run does, and logs to MLflow: the time of a step without a
checkpoint, that for which training stands still, and by how much the checkpoint and the steps after it take longer in
all than these steps without it.
"""

import argparse
import logging
import shutil
import statistics
import time
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from benchmarks.reporting import conclude
from fvdm.checkpoints import checkpoint as ckpt
from fvdm.checkpoints.writer import Writer
from fvdm.config import fail
from fvdm.diffusion.process import Diffusion
from fvdm.diffusion.timesteps import sample_timesteps
from fvdm.distributed import Ranks, from_environment, seed_everything
from fvdm.models.loading import build, preset
from fvdm.training.config import EngineConfig
from fvdm.training.ema import EMA
from fvdm.training.engine import Engine, initialise


class Trained:
    """A model in training, and its checkpoints."""

    def __init__(self, options: argparse.Namespace, ranks: Ranks) -> None:
        """Collective."""
        config = preset(options.model).fit((4, options.size, options.size), options.frames)
        settings = EngineConfig(grad_clip_start=0)
        self.device = initialise(settings.timeout)
        self.engine = Engine(build(config).to(self.device), settings, ranks.world_size, ranks)
        self.ema, self.ranks, self.out = EMA(self.engine.masters), ranks, options.out
        self.shape = (1, *config.clip_shape)
        self.taken = 0

    def step(self) -> float:
        """Take an optimizer step; its seconds."""
        began = time.monotonic()
        x_0 = torch.randn(self.shape, device=self.device)
        t = sample_timesteps(x_0.shape[:2], 0.2).to(self.device)
        self.engine.backward(Diffusion().training_losses(self.engine, x_0, t, None).mean())
        self.engine.step(self.taken, 10**6)
        self.ema.update()
        self.taken += 1
        return time.monotonic() - began

    def save(self, writer: Writer) -> None:
        """Begin a checkpoint, as `fvdm.training.run` does."""
        state = {"names": self.engine.names, "settings": {}}
        begin, rank, world_size = self.engine.slice.start, self.ranks.rank, self.ranks.world_size

        def write(slices: dict[str, Tensor]) -> None:
            ckpt.save(self.out / "checkpoints", self.taken, slices, begin, state, rank, world_size, writer.barrier)

        own = slice(len(self.engine.slice))
        writer.begin(self.engine.state() | {"ema": self.ema.shards[0][own]}, write)


def measure(trained: Trained, steps: int, rounds: int) -> dict[str, float]:
    """Medians over the rounds, in seconds; both ways take turns. Collective."""
    writers = {"background": Writer(True, 600), "waiting": Writer(False, 600)}
    for _ in range(2):
        trained.step()
    found: dict[str, list[float]] = {}
    for _ in range(rounds):
        usual = statistics.median(trained.step() for _ in range(steps))
        found.setdefault("step", []).append(usual)
        for name, writer in writers.items():
            dist.barrier()
            began = time.monotonic()
            trained.save(writer)
            found.setdefault(f"{name}_stalled", []).append(writer.stalled)
            for _ in range(steps):
                trained.step()
            writer.wait()
            found.setdefault(f"{name}_costs", []).append(time.monotonic() - began - steps * usual)
    return {name: statistics.median(values) for name, values in found.items()}


def main() -> None:
    """Measure, print, and log to MLflow."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="S/2", help="size and patch")
    parser.add_argument("--size", type=int, default=16, help="side of the latent frames")
    parser.add_argument("--frames", type=int, default=16, help="frames of a clip")
    parser.add_argument("--steps", type=int, default=5, help="steps without a checkpoint, and after each")
    parser.add_argument("--rounds", type=int, default=3, help="checkpoints of either kind")
    parser.add_argument("--out", type=Path, default=Path("runs/benchmarks/checkpoint_stall"), help="the run's folder")
    options = parser.parse_args()
    logging.basicConfig(level=logging.WARNING)
    seed_everything(0)
    try:
        if (options.out / "checkpoints").exists():  # They are removed at the end.
            raise ValueError(f"--out {options.out} holds checkpoints already; name another folder, or remove them")
        ranks = from_environment()
        trained = Trained(options, ranks)
        figures = measure(trained, options.steps, options.rounds)
        figures["rank_gb"] = 16 * len(trained.engine.slice) / 1e9
    except ValueError as error:
        fail(error)
    trained.engine.close()
    if ranks.is_main:
        shutil.rmtree(options.out / "checkpoints")
        name = f"checkpoint_stall {options.model} x{ranks.world_size}"
        conclude(figures, options.out, name, vars(options), "speed")


if __name__ == "__main__":
    main()
