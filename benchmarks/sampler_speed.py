"""What every solver costs and how near it comes: seconds, network evaluations, memory, and quality; a Pareto front.

    python benchmarks/sampler_speed.py --checkpoint runs/ffs_xl --real ffs --clips 2048
    python benchmarks/sampler_speed.py --smoke

For each task, batch size, precision and attention backend, DDPM with 250 and 1000 steps, DDIM with 100, 50, 25 and 10,
and every other solver with 10, 15 and 20. Quality is the root mean square distance to what DDIM with
1000 steps makes of the same noise, over the root mean square of that (a stochastic solver draws noise of its own, so
that its distance says nothing); with --real it is the Fréchet video distance of as many clips. On a terminal, in
results.json, and as figures in MLflow.
"""

import argparse
import contextlib
import itertools
import json
import math
import re
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

if __package__ in (None, ""):  # run as a file: the folder above holds the packages
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from torch import Tensor

from benchmarks.models import open_model
from benchmarks.plots import pareto
from benchmarks.reporting import Data, Report, send
from fvdm.config import fail
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
from fvdm.files import write_text
from fvdm.generation.pipeline import Trained, class_numbers
from fvdm.models.compilation import compile_blocks
from fvdm.models.config import BACKENDS, Backend

TASKS = ("generate", "image-to-video", "interpolate", "long")  # the paper's
STEPS = {"ddpm": (250, 1000), "ddim": (10, 25, 50, 100)}
OTHERS = (10, 15, 20)  # steps of every other solver
STOCHASTIC = ("ddpm",)
SMOKE_STEPS = {"ddpm": (10,), "ddim": (3, 6, 12)}
SMOKE_OTHERS = (3, 6)


@dataclass(frozen=True)
class Setting:
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


class Bench:
    """A model in one setting, that makes the same clips by any solver."""

    def __init__(self, setting: Setting, options: argparse.Namespace) -> None:
        self.setting, self.options = setting, options
        self.trained = open_model(options.checkpoint, setting.precision, setting.attention, options.frames)
        if options.compile:
            compile_blocks(self.trained.model)
        network = self.trained.model.config
        shape = (options.clips, *network.clip_shape)
        self.source = torch.zeros(shape, device=self.trained.device)

    def sample(self, name: str, steps: int) -> tuple[Tensor, float, int]:
        """Latents `(n f c h w)` of all clips, the seconds they took, and how many clips the network has seen."""
        options, network, classes = self.options, self.trained.model.config, self.trained.classes
        counter, parts, batch = Counter(self.trained), [], self.setting.batch
        sampler = SamplerConfig(solver(name), Guidance(options.guidance if classes else 1.0))
        levels = spaced(sampler.solver.spacing, steps, self.trained.diffusion.noise_levels())
        schedule = on_window(self.setting.task, levels, network.frames, 2 * network.frames).schedule
        _synchronize()
        begun = time.perf_counter()
        for first in range(0, options.clips, batch):
            seeds = [options.seed + k for k in range(first, min(first + batch, options.clips))]
            y = class_numbers("", classes, seeds)
            y = None if y is None else y.to(self.source.device)
            clip = self.source[first : first + batch]
            parts.append(sample_video(counter, self.trained.diffusion, clip, schedule, seeds, sampler, y))
        _synchronize()
        return torch.cat(parts).float(), time.perf_counter() - begun, counter.clips


class Truth:
    """What solvers are held against for one task: the exact result in float32, and features of real clips."""

    def __init__(self, task: str, options: argparse.Namespace) -> None:
        exact = Setting("generate", max(options.batch_sizes), "fp32", "auto")
        bench = Bench(exact, options)
        self.source = bench.source
        if given_frames(task, bench.source.shape[1]):
            # Frames that the model itself might have made are given, so that no data are needed.
            self.source, *_ = bench.sample("ddim", options.reference_steps)
        bench = Bench(replace(exact, task=task), options)
        bench.source = self.source
        self.latents, *_ = bench.sample("ddim", options.reference_steps)
        self.net = fvd.load_i3d(device=device()) if options.real else None
        self.real = self._features(options, bench.trained.size) if options.real else None

    def _features(self, options: argparse.Namespace, size: int) -> Tensor:
        assert self.net is not None
        source = open_source(options.real, size)
        clips = select_real(protocol("even"), source.lengths, self.latents.shape[1], clips=options.clips)
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


def measure(bench: Bench, name: str, steps: int, truth: Truth) -> Row:
    """What one solver costs, and how near it comes."""
    bench.source = truth.source
    reset_peak()
    times = []
    for _ in range(bench.options.repeats):
        latents, seconds, clips = bench.sample(name, steps)
        times.append(seconds / len(latents))
    memory = peak()
    error = None if name in STOCHASTIC else truth.error(latents)
    distance = truth.distance(latents, bench.trained)
    return Row(str(bench.setting), name, steps, statistics.median(times), clips / len(latents), memory, error, distance)


def plan(options: argparse.Namespace) -> list[tuple[str, int]]:
    """Solvers and their steps: those named as `ddim:50`, or else the whole table.

    Raises:
        ValueError: for a solver that does not exist, or steps that are no number.
    """
    if options.solvers:
        found = [word.partition(":") for word in options.solvers]
        if any(name not in SOLVERS or not steps.isdigit() for name, _, steps in found):
            raise ValueError(f"--solvers takes words such as ddim:50; solvers are {', '.join(SOLVERS)}")
        return [(name, int(steps)) for name, _, steps in found]
    table, others = (SMOKE_STEPS, SMOKE_OTHERS) if options.smoke else (STEPS, OTHERS)
    return [(name, steps) for name in SOLVERS for steps in table.get(name, others)]


def reset_peak() -> None:
    """Forget the largest memory so far."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    else:
        with contextlib.suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")  # Linux: the high-water mark of the process begins anew.


def peak() -> float:
    """Largest memory since, in MiB: of the GPU's allocator, or of the whole process; NaN where that is not known."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**20
    with contextlib.suppress(OSError):
        found = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
        return int(found[1]) / 2**10 if found else math.nan
    return math.nan


def _synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def run_all(options: argparse.Namespace) -> list[Row]:
    """Measure everything that was asked for, and print each row.

    Raises:
        ValueError: for a task, solver, backend or checkpoint that does not exist.
    """
    solvers, rows = plan(options), []
    print(f"{'':58} steps  s/clip  evaluations    MiB   error     FVD")
    for task in options.tasks:
        truth = Truth(task, options)
        for batch, precision, attention in itertools.product(
            options.batch_sizes, options.precisions, options.attention
        ):
            bench = Bench(Setting(task, batch, precision, attention), options)
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


def figures(rows: Sequence[Row], out: Path, exact: int) -> dict[str, Path]:
    """A figure of quality against time for every setting; `exact` are the steps of the reference."""
    images = {}
    for setting in dict.fromkeys(row.setting for row in rows):
        groups: dict[str, dict[str, tuple[float, float]]] = {}
        for row in rows:
            if row.setting == setting and row.quality:
                groups.setdefault(row.solver, {})[str(row.steps)] = (row.seconds, row.quality)
        if not groups:
            continue  # Only stochastic solvers, and no real clips.
        y = "FVD" if rows[0].fvd is not None else f"distance to {exact} steps of DDIM, relative"
        images[setting] = pareto(groups, out / f"{setting}.png", setting, "seconds per clip", y)
    return images


def report(rows: Sequence[Row], options: argparse.Namespace) -> None:
    """Write results.json and the figures to `--out`, and report them to MLflow."""
    out = Path(options.out)
    out.mkdir(parents=True, exist_ok=True)
    write_text(out / "results.json", json.dumps([asdict(row) for row in rows], indent=1))
    names = {"seconds": "seconds_per_clip", "evaluations": "evaluations", "memory": "peak_mib", "error": "error"}
    names["fvd"] = "fvd"
    metrics = [
        (row.steps, {f"{row.setting}/{shown}_{row.solver}": value})
        for row in rows
        for key, shown in names.items()
        if (value := getattr(row, key)) is not None
    ]
    data = [Data(Path(options.real).name, options.real, "real")] if options.real else []
    found = Report(
        "sampler_speed",
        f"sampler speed {Path(options.checkpoint).name}",
        metrics,
        {key: value for key, value in vars(options).items() if key != "out"},
        {"config": options.checkpoint},
        [out / "results.json"],
        figures(rows, out, options.reference_steps),
        data,
    )
    send(found, out)


def arguments() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add(
        "--checkpoint", default="random:XS/2", help="run or checkpoint; or random:SIZE for random weights [random:XS/2]"
    )
    add("--frames", type=int, default=16, help="frames of a model of random weights [16]")
    add("--tasks", nargs="+", default=list(TASKS), help=f"tasks that need not be told more [{' '.join(TASKS)}]")
    add("--batch-sizes", nargs="+", type=int, default=[1, 4], help="clips at once [1 4]")
    add("--precisions", nargs="+", default=["fp32", "bf16"], help="fp32, bf16 [both]")
    add("--attention", nargs="+", default=["auto"], help=f"backends: {', '.join(BACKENDS)} [auto]")
    add("--solvers", nargs="+", default=[], help="words such as ddim:50 [the whole table]")
    add("--clips", type=int, default=4, help="clips that are made each time [4]")
    add("--repeats", type=int, default=3, help="the median of so many times counts [3]")
    add("--reference-steps", type=int, default=1000, help="steps of DDIM that count as exact [1000]")
    add("--guidance", type=float, default=1.0, help="of a class-conditional model [1, none]")
    add("--seed", type=int, default=0, help="of the first clip [0]")
    add("--compile", action="store_true", help="compile the blocks, as the setting compile of a training does")
    add("--real", default="", help="real videos or latent shards: measure the FVD of so many clips, too")
    add("--smoke", action="store_true", help="a tiny model, few steps: a minute on two CPU cores")
    add("--out", default="sampler_speed", help="folder for results and figures [sampler_speed]")
    return parser


def main(words: Sequence[str] | None = None) -> None:
    """Command line."""
    parser = arguments()
    options = parser.parse_args(words)
    if options.smoke:
        small = {"frames": 9, "tasks": ["generate", "image-to-video"], "batch_sizes": [2], "clips": 2, "repeats": 1}
        small |= {"checkpoint": "random:T/2", "precisions": ["fp32"], "reference_steps": 50}
        parser.set_defaults(**small)
        options = parser.parse_args(words)
    try:
        rows = run_all(options)
    except ValueError as error:
        fail(error)
    report(rows, options)


if __name__ == "__main__":
    main()
