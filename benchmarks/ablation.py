"""The paper's Figure 3 as one command: probability p, samplers and model scales, FVD against training iterations.

    python benchmarks/ablation.py --config configs/ffs_xl.yaml --real ffs --base S/2 --steps 200000
    python benchmarks/ablation.py --smoke

Trains one model for each p at the base size, and one for each size at the base p; measures every kept checkpoint, and
those of the base model with every sampler. What is done is skipped: type the same command again to continue. On this
machine the runs follow each other; where sbatch exists they are submitted all at once, and the same command, typed
again when the jobs are over, measures. Words that are no option here are settings of the training runs.

In MLflow: one parent run with the three figures, and each training run below it, with its FVD beside its loss.
"""

import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

if __package__ in (None, ""):  # run as a file: the folder above holds the packages
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from fvdm import config as settings
from fvdm.evaluation.config import FVDConfig

if TYPE_CHECKING:
    import numpy as np

    from benchmarks.training_runs import TrainingRun

ROOT = Path(__file__).parent.parent
TITLES = {
    "p": "probability p of a timestep per frame",
    "samplers": "samplers, on the base model",
    "models": "model scales, at the base p",
}


@dataclass(frozen=True)
class AblationConfig:
    """The paper's Figure 3. Other options are settings of the training runs.

    Attributes:
        real: real videos or latent shards, for the FVD.
        p: probabilities of a timestep per frame; the paper's by default.
        models: model scales.
        samplers: SOLVER:STEPS; the first one measures every run, all measure the base run.
        base: model at which p and samplers are varied.
        base_p: p at which models and samplers are varied.
        steps: training iterations.
        every: iterations between two measurements; 0 is a tenth of all.
        protocol: FVD protocol.
        frames: frames of a clip.
        clips: clips behind each FVD.
        guidance: of class-conditional models; 1 is none.
        cluster: where training runs are started, as for slurm_train.py.
        nodes: nodes, or processes here, of each training run.
        experiment: MLflow experiment.
        smoke: tiny models and few steps on made-up clips; takes minutes on two cores.
        out: folder for training runs, results and figures.
    """

    real: str = ""
    p: tuple[float, ...] = (0, 0.1, 0.2, 0.3, 0.5, 0.6, 0.8, 1)
    models: tuple[str, ...] = ("S/2", "B/2", "L/2", "XL/2")
    samplers: tuple[str, ...] = ("ddim:50", "ddim:100", "ddpm:250")
    base: str = "S/2"
    base_p: float = 0.2
    steps: int = 200_000
    every: int = 0
    protocol: str = "styleganv"
    frames: int = 16
    clips: int = 2048
    guidance: float = 1.0
    cluster: Literal["auto", "slurm", "local"] = "auto"
    nodes: int = 1
    experiment: str = "ablation"
    smoke: bool = False
    out: str = "runs/ablation"

    @property
    def interval(self) -> int:
        """Iterations between two measurements."""
        return self.every or max(1, self.steps // 10)


SMOKE = AblationConfig(
    p=(0.0, 1.0),
    models=("T/2",),
    samplers=("ddim:2", "ddpm:2"),
    base="T/2",
    base_p=1.0,
    steps=4,
    every=2,
    protocol="even",
    frames=9,
    clips=2,
    cluster="local",
    smoke=True,
)


@dataclass(frozen=True)
class Cell:
    """One training run: a model and the probability of a timestep per frame."""

    model: str
    p: float

    @property
    def name(self) -> str:
        """The run's name."""
        return f"{self.model.replace('/', '-')}_p{self.p:g}"


@dataclass(frozen=True)
class Spot:
    """One measurement: a training run at a step, and the sampler."""

    cell: Cell
    step: int
    sampler: str

    def file(self, out: Path) -> Path:
        """Where its result is kept."""
        return out / "fvd" / self.cell.name / f"{self.step:08d}-{self.sampler.replace(':', '-')}.json"


class Ablation:
    """The grid, and what of it is done."""

    def __init__(self, config: AblationConfig, words: Sequence[str]) -> None:
        self.config, self.words, self.out = config, list(words), Path(config.out)
        self.base = Cell(config.base, config.base_p)
        cells = [Cell(config.base, p) for p in config.p] + [Cell(model, config.base_p) for model in config.models]
        self.cells = list(dict.fromkeys([self.base, *cells]))
        self.features: dict[str, np.ndarray] = {}

    def run(self, cell: Cell) -> "TrainingRun":
        """The training run of a cell."""
        from benchmarks.training_runs import TrainingRun

        config = self.config
        launcher = ["--cluster", config.cluster, "--nodes", str(config.nodes), *self.words]
        settings = {
            "model": cell.model,
            "p": cell.p,
            "checkpoint.every": config.interval,
            "checkpoint.keep_every": config.interval,
            "checkpoint.keep_last": 1,
            "register_as": "none",
            "tracking.experiment": config.experiment,
        }
        return TrainingRun(cell.name, self.out / "runs", config.steps, launcher, settings)

    def steps(self) -> list[int]:
        """Iterations at which is measured."""
        every = self.config.interval
        return [*range(every, self.config.steps, every), self.config.steps]

    def points(self) -> Iterator[Spot]:
        """Everything to measure: each run by the first sampler, the base by all."""
        for cell in self.cells:
            for sampler in self.config.samplers if cell == self.base else self.config.samplers[:1]:
                for step in self.steps():
                    yield Spot(cell, step, sampler)

    def train(self) -> bool:
        """Do, or submit, the training runs that are not done; whether all are.

        Raises:
            ValueError: if one fails.
        """
        from benchmarks.training_runs import train

        return train([self.run(cell) for cell in self.cells])

    def measure(self) -> dict[Spot, float]:
        """The distances of all checkpoints that are there; those measured before are read.

        Raises:
            ValueError: if the real clips or a checkpoint cannot be used.
        """
        found: dict[Spot, float] = {}
        for point in self.points():
            file = point.file(self.out)
            if not file.exists() and self.run(point.cell).checkpoint(point.step).exists():
                self._measure(point, file)
            if file.exists():
                found[point] = float(json.loads(file.read_text())["fvd"])
        return found

    def _measure(self, point: Spot, file: Path) -> None:
        from benchmarks.reporting import BenchmarkReport, send
        from fvdm.distributed import Ranks
        from fvdm.evaluation import comparison
        from fvdm.files import write_text
        from fvdm.tracking.config import TrackingConfig
        from fvdm.tracking.tracker import run_of

        config, run, (solver, _, steps) = self.config, self.run(point.cell), point.sampler.partition(":")
        fvd = FVDConfig(
            config.real,
            str(run.checkpoint(point.step)),
            config.protocol,
            frames=config.frames,
            clips=config.clips,
            steps=int(steps),
            solver=solver,
            guidance=config.guidance,
            bootstrap=0,
        )
        result = comparison.measure(fvd, Ranks(), self.features)
        file.parent.mkdir(parents=True, exist_ok=True)
        write_text(file, json.dumps(result, indent=1))
        print(f"{point.cell.name}, step {point.step}, {point.sampler}: FVD {result['fvd']:.1f}", flush=True)
        run_id = run_of(run.folder)
        if run_id:
            name = f"fvd/{config.protocol}_{config.frames}f_{point.sampler.replace(':', '_')}"
            found = BenchmarkReport("fvd", "fvd", [(point.step, {name: result["fvd"]})])
            send(found, self.out, run_id=run_id, tracking=TrackingConfig(experiment=config.experiment), show=False)

    def draw(self, found: dict[Spot, float]) -> dict[str, Path]:
        """The three figures: p, samplers, model scales."""
        from benchmarks.plots import curves

        first = self.config.samplers[0]
        lines: dict[str, dict[str, list[tuple[float, float]]]] = {"p": {}, "samplers": {}, "models": {}}
        for point, value in found.items():
            cell, at = point.cell, (float(point.step), value)
            if point.sampler == first and cell.model == self.base.model and cell.p in self.config.p:
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


def report(ablation: Ablation, found: dict[Spot, float]) -> None:
    """Write results.json and the figures, and report them as the parent run."""
    from benchmarks.reporting import machine
    from fvdm.files import write_text
    from fvdm.tracking.config import TrackingConfig
    from fvdm.tracking.tracker import Tracker, run_of

    out, config = ablation.out, ablation.config
    rows = [
        {"model": k.cell.model, "p": k.cell.p, "step": k.step, "sampler": k.sampler, "fvd": v} for k, v in found.items()
    ]
    write_text(out / "results.json", json.dumps(rows, indent=1))
    tracking = TrackingConfig(experiment=config.experiment, system_metrics=False)
    tags = {"kind": "ablation", "config": " ".join(ablation.words)} | machine()
    # In one folder, so that the same command continues in the same MLflow run.
    tracker = Tracker(out / ".tracking" / "parent", tracking, f"ablation {out.name}", settings.flatten(config), tags)
    last = {f"fvd/{k.cell.name}_{k.sampler.replace(':', '_')}": v for k, v in found.items() if k.step == config.steps}
    tracker.figures(last, final=False)
    for name, path in ablation.draw(found).items():
        tracker.artifact(path, "figures")
        tracker.image(path, f"figures/{name}", config.steps)
    tracker.artifact(out / "results.json")
    for child in filter(None, (run_of(ablation.run(cell).folder) for cell in ablation.cells)):
        tracker.set_parent(child)
    tracker.close()


def smoke_settings(out: Path) -> tuple[AblationConfig, list[str]]:
    """The small grid, and the settings of its training runs."""
    from benchmarks.smoke import smoke_clips, smoke_latents

    clips, latents = smoke_clips(out / "data"), smoke_latents(out / "data")
    tiny = {"data.path": latents, "data.frames": 9, "data.stride": 1, "data.batch_size": 2, "data.workers": 0}
    tiny |= {"previews.every": 0, "log_every": 1, "engine.precision": "fp32", "tracking.system_metrics": "false"}
    words = [f"--{name}={value}" for name, value in tiny.items()]
    return replace(SMOKE, real=str(clips)), ["--config", str(ROOT / "configs" / "ffs_xl.yaml"), *words]


def main(argv: Sequence[str] | None = None) -> None:
    """Command line."""
    own, words = settings.split_words(AblationConfig, sys.argv[1:] if argv is None else argv)
    try:
        config = settings.parse(AblationConfig, own, __doc__)
        if config.smoke:
            small, fixed = smoke_settings(Path(config.out))
            config, words = settings.parse(AblationConfig, own, defaults=small), [*fixed, *words]
        if not config.real:
            raise ValueError("--real is missing: name the real videos or latent shards that FVD compares with")
        if any(not sampler.partition(":")[2].isdigit() for sampler in config.samplers):
            raise ValueError(f"--samplers {' '.join(config.samplers)}: each is SOLVER:STEPS, such as ddim:50")
        ablation = Ablation(config, words)
        done = ablation.train()
        found = ablation.measure()
    except ValueError as error:
        settings.fail(error)
    report(ablation, found)
    print(f"{len(found)} of {len(list(ablation.points()))} measurements; figures and results.json in {config.out}")
    if not done:
        print("type the same command again when the jobs are over")


if __name__ == "__main__":
    main()
