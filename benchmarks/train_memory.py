"""Peak memory of a rank in real ZeRO-2 steps, beside what `fvdm.training.plan` predicts.

    torchrun --nproc-per-node 2 benchmarks/train_memory.py --model XL/2 --size 16

Runs optimizer steps on random latents, on GPUs where there are any, and logs to MLflow.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

if __package__ in (None, ""):  # run as a file: the folder above holds the packages
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import process_memory
from benchmarks.on_ranks import run_on_ranks

if TYPE_CHECKING:
    import torch

    from fvdm.distributed import Ranks


@dataclass(frozen=True)
class TrainMemoryConfig:
    """The steps whose memory is measured.

    Attributes:
        model: size and patch.
        size: side of the latent frames.
        frames: frames of a clip.
        channels: latent channels.
        micro_batch: clips of a rank.
        activation_checkpointing: recompute the activations of every k-th block; 0 is none.
        precision: of the weights.
        steps: optimizer steps.
        out: folder for the journal of the MLflow run.
    """

    model: str = "XL/2"
    size: int = 32
    frames: int = 16
    channels: int = 4
    micro_batch: int = 1
    activation_checkpointing: int = 0
    precision: Literal["bf16", "fp32"] = "bf16"
    steps: int = 3
    out: str = "runs/benchmarks/train_memory"


def peak(device: "torch.device") -> float:
    """Bytes that this rank has held at most.

    Of a GPU, which no other process may use: with its context and NCCL's buffers, which PyTorch's allocator does not
    count. On a CPU, of the whole process.
    """
    import torch

    if device.type != "cuda":
        return process_memory.peak()
    free, total = torch.cuda.mem_get_info(device)
    outside = total - free - torch.cuda.memory_reserved(device)
    # What the allocator has given back since is part of the peak.
    return float(outside + torch.cuda.max_memory_reserved(device))


def steps(config: TrainMemoryConfig, ranks: "Ranks") -> dict[str, float]:
    """Take the steps; the figures of the rank that needed most. Collective."""
    import time

    import torch
    import torch.distributed as dist

    from benchmarks.models import network, zero_engine
    from fvdm.diffusion.process import Diffusion
    from fvdm.diffusion.timesteps import sample_timesteps
    from fvdm.training.plan import memory, parameters

    shape = network(config.model, config.size, config.frames, config.channels)
    shape = replace(shape, activation_checkpointing=config.activation_checkpointing)
    engine, ema = zero_engine(shape, ranks, config.micro_batch * ranks.world_size, precision=config.precision)
    device = engine.device
    built = peak(device)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    diffusion, seconds = Diffusion(), 0.0
    for step in range(config.steps):
        start = time.monotonic()
        x_0 = torch.randn(config.micro_batch, *shape.clip_shape, device=device)
        t = sample_timesteps(x_0.shape[:2], 0.2).to(device)
        loss = diffusion.training_losses(engine, x_0, t, None).mean()
        engine.backward(loss)
        assert engine.step(step, config.steps), "the gradient was not finite"
        ema.update()
        seconds = time.monotonic() - start
        if ranks.is_main:
            print(f"step {step + 1}: loss {loss.item():.4f}, {seconds:.1f} s", flush=True)
    kind = "gpu" if device.type == "cuda" else "cpu"
    predicted = memory(shape, engine.config, ranks.world_size, config.micro_batch, kind).peak
    figures = torch.tensor([built, peak(device), seconds], dtype=torch.float64, device=device)
    dist.all_reduce(figures, op=dist.ReduceOp.MAX)
    built, measured, seconds = figures.tolist()
    engine.close()
    return {
        "parameters": float(parameters(shape)),
        "ranks": float(ranks.world_size),
        "built_gb": built / 1e9,
        "peak_gb": measured / 1e9,
        "predicted_gb": predicted / 1e9,
        "measured_over_predicted": measured / predicted,
        "seconds_per_step": seconds,
    }


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, print, and log to MLflow."""
    run_on_ranks(TrainMemoryConfig, argv, __doc__, steps, "train_memory", "memory")


if __name__ == "__main__":
    main()
