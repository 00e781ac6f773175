"""What a sampling step costs on top of the network's forward pass, and seconds of a clip.

    python benchmarks/sampling_step.py --model XL/2 --precision bf16 --steps 50 --compile

Random weights, DDIM, one clip of latents. The forward pass is timed within the same sampling, call by call, so that
both figures are of the same moments. Prints, and logs to MLflow.
"""

import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

if __package__ in (None, ""):  # run as a file: the folder above holds the packages
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from fvdm import config as settings

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from fvdm.models.backbone import Backbone


@dataclass(frozen=True)
class SamplingStepConfig:
    """The sampling that is timed.

    Attributes:
        model: size and patch.
        size: side of the latent frames.
        frames: frames of a clip.
        batch: clips at once.
        precision: of the weights.
        steps: of DDIM.
        rounds: how often a clip is sampled; the median counts.
        compile: compile the blocks.
        out: folder for the journal of the MLflow run.
    """

    model: str = "S/2"
    size: int = 32
    frames: int = 16
    batch: int = 1
    precision: Literal["bf16", "fp32"] = "fp32"
    steps: int = 50
    rounds: int = 5
    compile: bool = False
    out: str = "runs/benchmarks/sampling_step"


def _now() -> float:
    import torch

    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def time_sampling(model: "Backbone", steps: int, clips: int, device: "torch.device") -> tuple[float, float]:
    """Seconds of sampling some clips, and of the forward passes in it."""
    import torch

    from fvdm.diffusion.process import Diffusion
    from fvdm.diffusion.sampling import sample
    from fvdm.diffusion.timesteps import full_sequence

    inside = 0.0

    def timed(x: "Tensor", t: "Tensor", y: "Tensor | None") -> "Tensor":
        nonlocal inside
        start = _now()
        output = model(x, t, y)
        inside += _now() - start
        return output

    x = torch.randn(clips, *model.config.clip_shape, device=device)
    schedule = full_sequence(steps=steps, frames=x.shape[1])
    start = _now()
    sample(timed, x, schedule, Diffusion())
    return _now() - start, inside


def measure(config: SamplingStepConfig, device: "torch.device") -> dict[str, float]:
    """Seconds of a clip, and what a step costs over its forward pass.

    Raises:
        ValueError: if there is no such model, or it cannot be compiled.
    """
    import torch

    from benchmarks.models import network, random_backbone
    from fvdm.models.compilation import compile_blocks

    dtype = torch.bfloat16 if config.precision == "bf16" else torch.float32
    model = random_backbone(network(config.model, config.size, config.frames), device, dtype).eval()
    if config.compile:
        compile_blocks(model)
    time_sampling(model, 2, config.batch, device)  # Warm-up: kernels are chosen, memory is allocated.
    rounds = [time_sampling(model, config.steps, config.batch, device) for _ in range(config.rounds)]
    return {
        "seconds_per_clip": statistics.median(total for total, _ in rounds) / config.batch,
        "step_over_forward": statistics.median(total / inside for total, inside in rounds),
    }


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, print, and log to MLflow."""
    try:
        config = settings.parse(SamplingStepConfig, argv, __doc__)
        import torch

        from benchmarks.reporting import conclude

        figures = measure(config, torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    except ValueError as error:
        settings.fail(error)
    conclude(figures, config, f"sampling_step {config.model}", "speed")


if __name__ == "__main__":
    main()
