"""Peak memory of a rank in real ZeRO-2 steps, beside what `fvdm.training.plan` predicts.

    torchrun --nproc-per-node 2 benchmarks/train_memory.py --model XL/2 --size 16

Runs optimizer steps on random latents, on GPUs where there are any, and logs to MLflow.
"""

import argparse
import logging
import resource
import time
from dataclasses import replace
from pathlib import Path

import torch
import torch.distributed as dist

from benchmarks.reporting import conclude
from fvdm.config import fail
from fvdm.diffusion.process import Diffusion
from fvdm.diffusion.timesteps import sample_timesteps
from fvdm.distributed import Ranks, from_environment, seed_everything
from fvdm.models.loading import build, preset
from fvdm.training.config import EngineConfig
from fvdm.training.ema import EMA
from fvdm.training.engine import Engine, initialise
from fvdm.training.plan import memory, parameters


def peak(device: torch.device) -> float:
    """Bytes that this rank has held at most: of the GPU, or of the whole process on a CPU."""
    if device.type == "cuda":
        return float(torch.cuda.max_memory_reserved(device))
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024.0


def steps(options: argparse.Namespace, ranks: Ranks) -> dict[str, float]:
    """Take the steps; the figures of the rank that needed most. Collective."""
    seed_everything(0)
    config = replace(
        preset(options.model).fit((options.channels, options.size, options.size), options.frames),
        activation_checkpointing=options.activation_checkpointing,
    )
    settings = EngineConfig(precision=options.precision, grad_clip_start=0)
    device = initialise(settings.timeout)
    engine = Engine(build(config).to(device), settings, options.micro_batch * ranks.world_size, ranks)
    ema = EMA(engine.masters)
    built = peak(device)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    diffusion = Diffusion()
    seconds = 0.0
    for step in range(options.steps):
        began = time.monotonic()
        x_0 = torch.randn(options.micro_batch, *config.clip_shape, device=device)
        t = sample_timesteps(x_0.shape[:2], 0.2).to(device)
        loss = diffusion.training_losses(engine, x_0, t, None).mean()
        engine.backward(loss)
        assert engine.step(step, options.steps), "the gradient was not finite"
        ema.update()
        seconds = time.monotonic() - began
        if ranks.is_main:
            print(f"step {step + 1}: loss {loss.item():.4f}, {seconds:.1f} s", flush=True)
    kind = "gpu" if device.type == "cuda" else "cpu"
    predicted = memory(config, settings, ranks.world_size, options.micro_batch, kind).peak
    figures = torch.tensor([built, peak(device), seconds], dtype=torch.float64, device=device)
    dist.all_reduce(figures, op=dist.ReduceOp.MAX)
    built, measured, seconds = figures.tolist()
    engine.close()
    return {
        "parameters": float(parameters(config)),
        "ranks": float(ranks.world_size),
        "built_gb": built / 1e9,
        "peak_gb": measured / 1e9,
        "predicted_gb": predicted / 1e9,
        "measured_over_predicted": measured / predicted,
        "seconds_per_step": seconds,
    }


def main() -> None:
    """Measure, print, and log to MLflow."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="XL/2", help="size and patch")
    parser.add_argument("--size", type=int, default=32, help="side of the latent frames")
    parser.add_argument("--frames", type=int, default=16, help="frames of a clip")
    parser.add_argument("--channels", type=int, default=4, help="latent channels")
    parser.add_argument("--micro-batch", type=int, default=1, help="clips of a rank")
    parser.add_argument("--activation-checkpointing", type=int, default=0, help="compute every k-th block again")
    parser.add_argument("--precision", choices=("bf16", "fp32"), default="bf16")
    parser.add_argument("--steps", type=int, default=3, help="optimizer steps")
    parser.add_argument("--out", type=Path, default=Path("runs/benchmarks/train_memory"), help="journal of the run")
    options = parser.parse_args()
    logging.basicConfig(level=logging.WARNING)
    try:
        ranks = from_environment()
        figures = steps(options, ranks)
    except ValueError as error:
        fail(error)
    if ranks.is_main:
        name = f"train_memory {options.model} x{figures['ranks']:.0f}"
        conclude(figures, options.out, name, vars(options), "memory")


if __name__ == "__main__":
    main()
