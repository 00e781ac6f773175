"""What a solver costs, and how near it comes: the measurements of benchmarks/sampler_speed.py."""

import itertools
import statistics
import time
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from benchmarks import process_memory
from benchmarks.models import open_model
from benchmarks.sampler_config import SamplerSpeedConfig
from fvdm.diffusion.guidance import Guidance
from fvdm.diffusion.sampling import SamplerConfig
from fvdm.diffusion.solvers import SOLVERS, solver
from fvdm.diffusion.tasks import given_frames, on_window
from fvdm.diffusion.timesteps import spaced
from fvdm.diffusion.video import sample_video
from fvdm.evaluation import fvd
from fvdm.evaluation.distances import quiet
from fvdm.evaluation.protocols import protocol, select_real
from fvdm.evaluation.sources import device, open_source
from fvdm.generation.frames import class_numbers
from fvdm.generation.pipeline import Trained
from fvdm.media.preprocess import one_spelling
from fvdm.models.compilation import compile_blocks
from fvdm.models.config import Backend

STEPS = {"ddpm": (250, 1000), "ddim": (10, 25, 50, 100)}
OTHERS = (10, 15, 20)  # steps of every other solver
STOCHASTIC = ("ddpm",)
SMOKE_STEPS = {"ddpm": (10,), "ddim": (3, 6, 12)}
SMOKE_OTHERS = (3, 6)


@dataclass(frozen=True)
class SampledSetting:
    """What is sampled, and how it is computed."""

    task: str
    batch: int
    precision: str
    attention: Backend

    def __str__(self) -> str:
        """As MLflow groups it."""
        return f"{self.task}.batch_{self.batch}.{self.precision}.{self.attention}"


@dataclass(frozen=True)
class Row:
    """What was measured of one solver.

    Attributes:
        setting: what was sampled.
        solver: solver by name.
        steps: its steps.
        seconds: per clip, the median of the repeats.
        evaluations: network evaluations per clip.
        memory: peak, in MiB: of the GPU's allocator, or of the process.
        error: distance to the reference; None for a stochastic solver.
        fvd: Fréchet video distance, where there are real clips.
    """

    setting: str
    solver: str
    steps: int
    seconds: float
    evaluations: float
    memory: float
    error: float | None = None
    fvd: float | None = None

    @property
    def quality(self) -> float | None:
        """What the figure shows: the distance to real clips where it is known."""
        return self.error if self.fvd is None else self.fvd


class Counter:
    """The model, counting the clips it is shown."""

    def __init__(self, trained: Trained) -> None:
        self.model, self.clips = trained.model, 0
        self.null = trained.model.null

    def __call__(self, x: Tensor, t: Tensor, y: Tensor | None) -> Tensor:
        """The model's output."""
        self.clips += len(x)
        return self.model(x, t, y)


class SolverBench:
    """A model in one setting, that makes the same clips by any solver."""

    def __init__(self, setting: SampledSetting, config: SamplerSpeedConfig) -> None:
        self.setting, self.config = setting, config
        self.trained = open_model(config.checkpoint, setting.precision, setting.attention, config.frames)
        if config.compile:
            compile_blocks(self.trained.model)
        network = self.trained.model.config
        shape = (config.clips, *network.clip_shape)
        self.source = torch.zeros(shape, device=self.trained.device)

    def sample(self, name: str, steps: int) -> tuple[Tensor, float, int]:
        """Latents `(n f c h w)` of all clips, the seconds they took, and how many clips the network has seen."""
        config, network, classes = self.config, self.trained.model.config, self.trained.classes
        counter, parts, batch = Counter(self.trained), [], self.setting.batch
        sampler = SamplerConfig(solver(name), Guidance(config.guidance if classes else 1.0))
        levels = spaced(sampler.solver.spacing, steps, self.trained.diffusion.noise_levels())
        schedule = on_window(self.setting.task, levels, network.frames, 2 * network.frames).schedule
        _synchronize()
        begun = time.perf_counter()
        for first in range(0, config.clips, batch):
            seeds = [config.seed + k for k in range(first, min(first + batch, config.clips))]
            y = class_numbers("", classes, seeds)
            y = None if y is None else y.to(self.source.device)
            clip = self.source[first : first + batch]
            parts.append(sample_video(counter, self.trained.diffusion, clip, schedule, seeds, sampler, y))
        _synchronize()
        return torch.cat(parts).float(), time.perf_counter() - begun, counter.clips


class Truth:
    """What solvers are held against for one task: the exact result in float32, and features of real clips."""

    def __init__(self, task: str, config: SamplerSpeedConfig) -> None:
        exact = SampledSetting("generate", max(config.batch_sizes), "fp32", "auto")
        bench = SolverBench(exact, config)
        self.source = bench.source
        if given_frames(task, bench.source.shape[1]):
            # Frames that the model itself might have made are given, so that no data are needed.
            self.source, *_ = bench.sample("ddim", config.reference_steps)
        bench = SolverBench(replace(exact, task=task), config)
        bench.source = self.source
        self.latents, *_ = bench.sample("ddim", config.reference_steps)
        self.net = fvd.load_i3d(device=device()) if config.real else None
        self.real = self._features(config, one_spelling(bench.trained.frame_size)) if config.real else None

    def _features(self, config: SamplerSpeedConfig, size: int | tuple[int, int]) -> Tensor:
        assert self.net is not None
        source = open_source(config.real, size)
        clips = select_real(protocol("even"), source.lengths, self.latents.shape[1], clips=config.clips)
        return torch.cat([fvd.features(self.net, source.read([clip])) for clip in clips])

    def error(self, latents: Tensor) -> float:
        """Root mean square distance, over the root mean square of the exact result."""
        return float((latents - self.latents).square().mean().sqrt() / self.latents.square().mean().sqrt())

    def distance(self, latents: Tensor, trained: Trained) -> float | None:
        """Fréchet video distance to the real clips; None without."""
        if self.net is None or self.real is None:
            return None
        found = torch.cat([fvd.features(self.net, trained.vae.decode(part)) for part in latents.split(1)])
        with quiet():
            return fvd.frechet_distance(self.real, found)


def measure(bench: SolverBench, name: str, steps: int, truth: Truth) -> Row:
    """What one solver costs, and how near it comes."""
    bench.source = truth.source
    reset_peak()
    times = []
    for _ in range(bench.config.repeats):
        latents, seconds, clips = bench.sample(name, steps)
        times.append(seconds / len(latents))
    memory = peak()
    error = None if name in STOCHASTIC else truth.error(latents)
    distance = truth.distance(latents, bench.trained)
    return Row(str(bench.setting), name, steps, statistics.median(times), clips / len(latents), memory, error, distance)


def plan(config: SamplerSpeedConfig) -> list[tuple[str, int]]:
    """Solvers and their steps: those named as `ddim:50`, or else the whole table.

    Raises:
        ValueError: for a solver that does not exist, or steps that are no number.
    """
    if config.solvers:
        found = [word.partition(":") for word in config.solvers]
        if any(name not in SOLVERS or not steps.isdigit() for name, _, steps in found):
            raise ValueError(f"--solvers takes words such as ddim:50; solvers are {', '.join(SOLVERS)}")
        return [(name, int(steps)) for name, _, steps in found]
    table, others = (SMOKE_STEPS, SMOKE_OTHERS) if config.smoke else (STEPS, OTHERS)
    return [(name, steps) for name in SOLVERS for steps in table.get(name, others)]


def reset_peak() -> None:
    """Forget the largest memory so far."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    else:
        process_memory.reset_peak()


def peak() -> float:
    """Largest memory since, in MiB: of the GPU's allocator, or of the whole process; NaN where that is not known."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**20
    return process_memory.peak() / 2**20


def _synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def run_all(config: SamplerSpeedConfig) -> list[Row]:
    """Measure everything that was asked for, and print each row.

    Raises:
        ValueError: for a task, solver, backend or checkpoint that does not exist.
    """
    solvers, rows = plan(config), []
    print(f"{'':58} steps  s/clip  evaluations    MiB   error     FVD")
    for task in config.tasks:
        truth = Truth(task, config)
        for batch, precision, attention in itertools.product(config.batch_sizes, config.precisions, config.attention):
            bench = SolverBench(SampledSetting(task, batch, precision, attention), config)
            bench.sample(*solvers[0][:1], steps=2)  # Warm-up: kernels are chosen, memory is allocated.
            for name, steps in solvers:
                row = measure(bench, name, steps, truth)
                rows.append(row)
                shown = ["-" if value is None else f"{value:.4g}" for value in (row.error, row.fvd)]
                print(
                    f"{row.setting:<50} {name:<8} {steps:4}  {row.seconds:7.3f}  {row.evaluations:9.0f}  "
                    f"{row.memory:6.0f}  {shown[0]:>7}  {shown[1]:>6}",
                    flush=True,
                )
    return rows
