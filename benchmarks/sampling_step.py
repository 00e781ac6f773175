"""What a sampling step costs on top of the network's forward pass, and seconds of a clip.

    python benchmarks/sampling_step.py --model XL/2 --precision bf16 --steps 50 --compile

Random weights, DDIM, one clip of latents. The forward pass is timed within the same walk, call by call, so that both
figures are of the same moments. Prints, and logs to MLflow.
"""

import argparse
import statistics
import time
from pathlib import Path

import torch
from torch import Tensor

from fvdm.config import fail
from fvdm.diffusion.process import Diffusion
from fvdm.diffusion.sampling import sample
from fvdm.diffusion.timesteps import full_sequence
from fvdm.models.backbone import Backbone
from fvdm.models.compilation import compile_blocks
from fvdm.models.loading import build, preset
from fvdm.tracking.config import TrackingConfig
from fvdm.tracking.tracker import Tracker


def _now() -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def walk(model: Backbone, steps: int, clips: int, device: torch.device) -> tuple[float, float]:
    """Seconds of a whole walk, and of the forward passes in it."""
    inside = 0.0

    def timed(x: Tensor, t: Tensor, y: Tensor | None) -> Tensor:
        nonlocal inside
        began = _now()
        output = model(x, t, y)
        inside += _now() - began
        return output

    x = torch.randn(clips, *model.config.clip_shape, device=device)
    schedule = full_sequence(steps=steps, frames=x.shape[1])
    began = _now()
    sample(timed, x, schedule, Diffusion())
    return _now() - began, inside


def main() -> None:
    """Measure, print, and log to MLflow."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="S/2", help="size and patch")
    parser.add_argument("--size", type=int, default=32, help="side of the latent frames")
    parser.add_argument("--batch", type=int, default=1, help="clips at once")
    parser.add_argument("--precision", choices=("bf16", "fp32"), default="fp32")
    parser.add_argument("--steps", type=int, default=50, help="of DDIM")
    parser.add_argument("--rounds", type=int, default=5, help="the median of so many walks counts")
    parser.add_argument("--compile", action="store_true", help="compile the blocks")
    parser.add_argument("--out", type=Path, default=Path("runs/benchmarks/sampling_step"), help="journal of the run")
    options = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        config = preset(options.model).fit((4, options.size, options.size), 16)
        model = build(config).to(device, torch.bfloat16 if options.precision == "bf16" else torch.float32).eval()
        if options.compile:
            compile_blocks(model)
    except ValueError as error:
        fail(error)
    walk(model, 2, options.batch, device)  # Warm-up: kernels are chosen, memory is allocated.
    rounds = [walk(model, options.steps, options.batch, device) for _ in range(options.rounds)]
    figures = {
        "seconds_per_clip": statistics.median(whole for whole, _ in rounds) / options.batch,
        "step_over_forward": statistics.median(whole / inside for whole, inside in rounds),
    }
    for name, value in figures.items():
        print(f"{name:24s} {value:.4f}")
    settings = TrackingConfig(experiment="benchmarks")
    tracker = Tracker(options.out, settings, f"sampling_step {options.model}", vars(options), {"device": str(device)})
    tracker.metrics(figures, 0)
    tracker.close()


if __name__ == "__main__":
    main()
