"""The paper's Figure 3 as one command: probability p, samplers and model scales, FVD against training iterations.

    python benchmarks/ablation.py --config configs/ffs_xl.yaml --real ffs --base S/2 --steps 200000
    python benchmarks/ablation.py --smoke

Trains one model for each p at the base size, and one for each size at the base p; measures every kept checkpoint, and
those of the base model with every sampler. What is done is skipped: type the same command again to go on. Trainings run
on this machine one after the other; where sbatch exists they are submitted all at once, and the same command, typed
again when the jobs are over, measures. Words that are no option here are settings of the training.

In MLflow: one parent run with the three figures, and each training below it, with its FVD beside its loss.
"""

import argparse
import json
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

if __package__ in (None, ""):  # run as a file: the folder above holds the packages
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np

from benchmarks import fvd
from benchmarks.plots import Point, curves
from benchmarks.reporting import Report, machine, send
from benchmarks.smoke import smoke_clips, smoke_latents
from fvdm.checkpoints.layout import STEP
from fvdm.config import fail
from fvdm.distributed import Ranks
from fvdm.files import write_text
from fvdm.tracking.config import TrackingConfig
from fvdm.tracking.tracker import Tracker, run_of

ROOT = Path(__file__).parent.parent
TITLES = {
    "p": "probability p of a timestep per frame",
    "samplers": "samplers, on the base model",
    "models": "model scales, at the base p",
}


@dataclass(frozen=True)
class Cell:
    """One training: a model and the probability of a timestep per frame."""

    model: str
    p: float

    @property
    def name(self) -> str:
        """The run's name."""
        return f"{self.model.replace('/', '-')}_p{self.p:g}"


@dataclass(frozen=True)
class Spot:
    """One measurement: a training at a step, and the sampler."""

    cell: Cell
    step: int
    sampler: str

    def file(self, out: Path) -> Path:
        """Where its result is kept."""
        return out / "fvd" / self.cell.name / f"{self.step:08d}-{self.sampler.replace(':', '-')}.json"


class Ablation:
    """The grid, and what of it is done."""

    def __init__(self, options: argparse.Namespace, words: Sequence[str]) -> None:
        self.options, self.words, self.out = options, list(words), Path(options.out)
        self.base = Cell(options.base, options.base_p)
        cells = [Cell(options.base, p) for p in options.p] + [Cell(model, options.base_p) for model in options.models]
        self.cells = list(dict.fromkeys([self.base, *cells]))
        self.known: dict[str, np.ndarray] = {}

    def folder(self, cell: Cell) -> Path:
        """A training's run."""
        return self.out / "runs" / cell.name

    def checkpoint(self, cell: Cell, step: int) -> Path:
        """A training's checkpoint."""
        return self.folder(cell) / "checkpoints" / STEP.format(step)

    def steps(self) -> list[int]:
        """Iterations at which is measured."""
        every = self.options.every
        return [*range(every, self.options.steps, every), self.options.steps]

    def points(self) -> Iterator[Spot]:
        """Everything to measure: each training by the first sampler, the base by all."""
        for cell in self.cells:
            for sampler in self.options.samplers if cell == self.base else self.options.samplers[:1]:
                for step in self.steps():
                    yield Spot(cell, step, sampler)

    def command(self, cell: Cell) -> list[str]:
        """The training's command line."""
        options = self.options
        command = [sys.executable, str(ROOT / "launchers" / "slurm_train.py"), "--cluster", options.cluster]
        command += ["--nodes", str(options.nodes), *self.words, "--name", cell.name, "--runs", str(self.out / "runs")]
        command += ["--model", cell.model, "--p", str(cell.p), "--steps", str(options.steps)]
        command += ["--checkpoint.every", str(options.every), "--checkpoint.keep_every", str(options.every)]
        return [
            *command,
            "--checkpoint.keep_last",
            "1",
            "--register_as",
            "none",
            "--tracking.experiment",
            options.experiment,
        ]

    def train(self) -> bool:
        """Do, or submit, the trainings that are not done; whether all are.

        Raises:
            ValueError: if a training fails.
        """
        for cell in self.cells:
            if self.checkpoint(cell, self.options.steps).exists():
                print(f"{cell.name}: trained")
            elif queued(f"fvdm-{cell.name}"):
                print(f"{cell.name}: in the queue")
            else:
                print(f"{cell.name}: training", flush=True)
                code = subprocess.run(self.command(cell)).returncode
                if code:
                    raise ValueError(f"the training {cell.name} ended with code {code}: see above, mend it, and go on")
        return all(self.checkpoint(cell, self.options.steps).exists() for cell in self.cells)

    def measure(self) -> dict[Spot, float]:
        """The distances of all checkpoints that are there; those measured before are read.

        Raises:
            ValueError: if the real clips or a checkpoint cannot be used.
        """
        found: dict[Spot, float] = {}
        for point in self.points():
            file = point.file(self.out)
            if not file.exists() and self.checkpoint(point.cell, point.step).exists():
                self._measure(point, file)
            if file.exists():
                found[point] = float(json.loads(file.read_text())["fvd"])
        return found

    def _measure(self, point: Spot, file: Path) -> None:
        options, (solver, _, steps) = self.options, point.sampler.partition(":")
        words = ["--real", options.real, "--fake", str(self.checkpoint(point.cell, point.step)), "--bootstrap", "0"]
        words += ["--protocol", options.protocol, "--frames", str(options.frames), "--clips", str(options.clips)]
        words += ["--solver", solver, "--steps", steps, "--guidance", str(options.guidance)]
        result = fvd.measure(fvd.arguments().parse_args(words), Ranks(), self.known)
        file.parent.mkdir(parents=True, exist_ok=True)
        write_text(file, json.dumps(result, indent=1))
        print(f"{point.cell.name}, step {point.step}, {point.sampler}: FVD {result['fvd']:.1f}", flush=True)
        run_id = run_of(self.folder(point.cell))
        if run_id:
            name = f"fvd/{options.protocol}_{options.frames}f_{point.sampler.replace(':', '_')}"
            found = Report("fvd", "fvd", [(point.step, {name: result["fvd"]})])
            send(found, self.out, run_id=run_id, tracking=TrackingConfig(experiment=options.experiment), show=False)

    def draw(self, found: dict[Spot, float]) -> dict[str, Path]:
        """The three figures: p, samplers, model scales."""
        first = self.options.samplers[0]
        lines: dict[str, dict[str, list[Point]]] = {"p": {}, "samplers": {}, "models": {}}
        for point, value in found.items():
            cell, at = point.cell, (float(point.step), value)
            if point.sampler == first and cell.model == self.base.model and cell.p in self.options.p:
                lines["p"].setdefault(f"p = {cell.p:g}", []).append(at)
            if cell == self.base:
                lines["samplers"].setdefault(point.sampler.replace(":", " "), []).append(at)
            if point.sampler == first and cell.p == self.base.p:
                lines["models"].setdefault(cell.model, []).append(at)
        shown = {name: dict(sorted(series.items())) for name, series in lines.items() if series}
        return {
            name: curves(series, self.out / f"{name}.png", TITLES[name], "training iterations", "FVD")
            for name, series in shown.items()
        }


def queued(name: str) -> bool:
    """Whether a job of that name waits or runs on the cluster."""
    try:
        command = ["squeue", "--noheader", "--name", name]
        return bool(subprocess.run(command, capture_output=True, text=True, timeout=60).stdout.strip())
    except (OSError, subprocess.TimeoutExpired):
        return False


def report(ablation: Ablation, found: dict[Spot, float]) -> None:
    """Write results.json and the figures, and report them as the parent run."""
    out, options = ablation.out, ablation.options
    rows = [
        {"model": k.cell.model, "p": k.cell.p, "step": k.step, "sampler": k.sampler, "fvd": v} for k, v in found.items()
    ]
    write_text(out / "results.json", json.dumps(rows, indent=1))
    tracking = TrackingConfig(experiment=options.experiment, system_metrics=False)
    tags = {"kind": "ablation", "config": " ".join(ablation.words)} | machine()
    # In one folder, so that the same command goes on in the same MLflow run.
    tracker = Tracker(out / ".tracking" / "parent", tracking, f"ablation {out.name}", vars(options), tags)
    for point, value in found.items():
        if point.step == options.steps:
            tracker.metrics({f"fvd_final/{point.cell.name}_{point.sampler.replace(':', '_')}": value}, point.step)
    for name, path in ablation.draw(found).items():
        tracker.artifact(path, "figures")
        tracker.image(path, f"figures/{name}", options.steps)
    tracker.artifact(out / "results.json")
    for child in filter(None, (run_of(ablation.folder(cell)) for cell in ablation.cells)):
        tracker.set_parent(child)
    tracker.close()


def arguments() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    add = parser.add_argument
    add("--real", default="", help="real videos or latent shards, for the FVD")
    add(
        "--p", nargs="+", type=float, default=[0, 0.1, 0.2, 0.3, 0.5, 0.6, 0.8, 1], help="probabilities p [the paper's]"
    )
    add("--models", nargs="+", default=["S/2", "B/2", "L/2", "XL/2"], help="model scales [S/2 B/2 L/2 XL/2]")
    add("--samplers", nargs="+", default=["ddim:50", "ddim:100", "ddpm:250"], help="SOLVER:STEPS, the first for all")
    add("--base", default="S/2", help="model at which p and samplers are varied [S/2]")
    add("--base-p", type=float, default=0.2, help="p at which models and samplers are varied [0.2]")
    add("--steps", type=int, default=200_000, help="training iterations [200000]")
    add("--every", type=int, default=0, help="iterations between two measurements [a tenth of all]")
    add("--protocol", default="styleganv", help="FVD protocol [styleganv]")
    add("--frames", type=int, default=16, help="frames of a clip [16]")
    add("--clips", type=int, default=2048, help="clips behind each FVD [2048]")
    add("--guidance", type=float, default=1.0, help="of class-conditional models [1, none]")
    add("--cluster", default="auto", choices=["auto", "slurm", "local"], help="as slurm_train.py has it [auto]")
    add("--nodes", type=int, default=1, help="nodes, or processes here, of each training [1]")
    add("--experiment", default="ablation", help="MLflow experiment [ablation]")
    add("--smoke", action="store_true", help="tiny models, few steps, on clips that are made: minutes on two cores")
    add("--out", default="runs/ablation", help="folder for trainings, results and figures [runs/ablation]")
    return parser


def _smoke(parser: argparse.ArgumentParser, argv: Sequence[str] | None) -> tuple[argparse.Namespace, list[str]]:
    """The small grid, and the settings of its trainings."""
    out = Path(parser.parse_known_args(argv)[0].out)
    clips, latents = smoke_clips(out / "data"), smoke_latents(out / "data")
    small = {"p": [0.0, 1.0], "models": ["T/2"], "samplers": ["ddim:2", "ddpm:2"], "base": "T/2", "base_p": 1.0}
    small |= {
        "steps": 4,
        "every": 2,
        "frames": 9,
        "clips": 2,
        "cluster": "local",
        "real": str(clips),
        "protocol": "even",
    }
    parser.set_defaults(**small)
    options, words = parser.parse_known_args(argv)
    tiny = {"data.path": latents, "data.frames": 9, "data.stride": 1, "data.batch_size": 2, "data.workers": 0}
    tiny |= {"previews.every": 0, "log_every": 1, "engine.precision": "fp32", "tracking.system_metrics": "false"}
    fixed = [f"--{name}={value}" for name, value in tiny.items()]
    return options, ["--config", str(ROOT / "configs" / "ffs_xl.yaml"), *fixed, *words]


def main(argv: Sequence[str] | None = None) -> None:
    """Command line."""
    parser = arguments()
    options, words = parser.parse_known_args(argv)
    try:
        if options.smoke:
            options, words = _smoke(parser, argv)
        if not options.real:
            raise ValueError("--real is missing: name the real videos or latent shards that FVD compares with")
        if any(not sampler.partition(":")[2].isdigit() for sampler in options.samplers):
            raise ValueError(f"--samplers {' '.join(options.samplers)}: each is SOLVER:STEPS, such as ddim:50")
        options.every = options.every or max(1, options.steps // 10)
        ablation = Ablation(options, words)
        done = ablation.train()
        found = ablation.measure()
    except ValueError as error:
        fail(error)
    report(ablation, found)
    print(f"{len(found)} of {len(list(ablation.points()))} measurements; figures and results.json in {options.out}")
    if not done:
        print("type the same command again when the jobs are over")


if __name__ == "__main__":
    main()
