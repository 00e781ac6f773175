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
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

if __package__ in (None, ""):  # run as a file: the folder above holds the packages
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.experiment import ROOT, Arm, Bench, Experiment, TrainingRun, Trial
from fvdm import config as settings
from fvdm.evaluation.config import FVDConfig

if TYPE_CHECKING:
    import numpy as np

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


class Ablation(Experiment):
    """The paper's grid of training runs, and what of it is done.

    Attributes:
        base: the arm at which p, samplers and sizes are varied.
    """

    def __init__(self, config: AblationConfig, words: Sequence[str]) -> None:
        """With settings of its own, and words of the training runs."""
        super().__init__(config.experiment, Path(config.out))
        self.config, self.words = config, list(words)
        self.base = Arm("", config.base, config.base_p)
        self.bench = FVDBench(self)

    def arms(self) -> list[Arm]:
        """Each p at the base size, and each size at the base p; the base first."""
        config = self.config
        varied = [(config.base, p) for p in config.p] + [(model, config.base_p) for model in config.models]
        return list(dict.fromkeys([self.base, *(Arm("", model, p) for model, p in varied)]))

    def run(self, arm: Arm) -> TrainingRun:
        """The training run of an arm."""
        config = self.config
        launcher = ["--cluster", config.cluster, "--nodes", str(config.nodes), *self.words]
        fixed = {
            "checkpoint.every": config.interval,
            "checkpoint.keep_every": config.interval,
            "checkpoint.keep_last": 1,
            "register_as": "none",
            "tracking.experiment": config.experiment,
        }
        return TrainingRun(arm.name, self.out / "runs", config.steps, launcher, arm.settings | fixed)

    @property
    def benches(self) -> dict[str, Bench]:
        """The one that measures FVD."""
        return {"": self.bench}

    def draw(self, found: Mapping[Trial, float]) -> dict[str, Path]:
        """The three figures: p, samplers, model scales."""
        from benchmarks.plots import curves

        first = self.config.samplers[0]
        lines: dict[str, dict[str, list[tuple[float, float]]]] = {"p": {}, "samplers": {}, "models": {}}
        for trial, value in found.items():
            assert trial.arm
            arm, at = trial.arm, (float(trial.step), value)
            if trial.sampler == first and arm.model == self.base.model and arm.p in self.config.p:
                lines["p"].setdefault(f"p = {arm.p:g}", []).append(at)
            if arm == self.base:
                lines["samplers"].setdefault(trial.sampler.replace(":", " "), []).append(at)
            if trial.sampler == first and arm.p == self.base.p:
                lines["models"].setdefault(arm.model, []).append(at)
        shown = {name: dict(sorted(series.items())) for name, series in lines.items() if series}
        return {
            name: curves(series, self.out / f"{name}.png", TITLES[name], "training iterations", "FVD")
            for name, series in shown.items()
        }

    def publish(self, found: Mapping[Trial, float]) -> None:
        """Write results.json and the figures, and report them as the parent run."""
        from fvdm.files import write_text

        rows = [
            {"model": k.arm.model, "p": k.arm.p, "step": k.step, "sampler": k.sampler, "fvd": v}
            for k, v in found.items()
            if k.arm
        ]
        table, steps = self.out / "results.json", self.config.steps
        write_text(table, json.dumps(rows, indent=1))
        last = {
            f"fvd/{k.arm.name}_{k.sampler.replace(':', '_')}": v for k, v in found.items() if k.arm and k.step == steps
        }
        tags = {"kind": "ablation", "config": " ".join(self.words)}
        params = settings.flatten(self.config)
        self.report(f"ablation {self.out.name}", params, tags, last, {table: ""}, self.draw(found), steps)


class FVDBench(Bench):
    """Measures FVD, by fvdm.evaluation.comparison: each arm by the first sampler, the base by all.

    Attributes:
        trials: the measurements, of every checkpoint that is kept.
    """

    def __init__(self, ablation: Ablation) -> None:
        """Of an ablation."""
        config, every = ablation.config, ablation.config.interval
        self.ablation = ablation
        self.features: dict[str, np.ndarray] = {}
        self.trials = [
            Trial("", arm, "generate", "sampled", sampler, config.clips, step)
            for arm in ablation.arms()
            for sampler in (config.samplers if arm == ablation.base else config.samplers[:1])
            for step in (*range(every, config.steps, every), config.steps)
        ]

    def parts(self, trial: Trial) -> list[Path]:
        """One file a measurement."""
        assert trial.arm
        name = f"{trial.step:08d}-{trial.sampler.replace(':', '-')}.json"
        return [self.ablation.out / "fvd" / trial.arm.name / name]

    def make(self, trial: Trial, number: int, path: Path) -> None:
        """Sample a checkpoint and measure FVD; to the file, and to the MLflow run of its training run.

        Raises:
            ValueError: if the real clips or the checkpoint cannot be used.
        """
        from benchmarks.reporting import BenchmarkReport, send
        from fvdm.distributed import Ranks
        from fvdm.evaluation import comparison
        from fvdm.files import write_text
        from fvdm.tracking.config import TrackingConfig
        from fvdm.tracking.tracker import run_of

        assert trial.arm
        config, (solver, steps) = self.ablation.config, trial.solver
        fvd = FVDConfig(
            config.real,
            str(self.ablation.checkpoint(trial)),
            config.protocol,
            frames=config.frames,
            clips=config.clips,
            steps=steps,
            solver=solver,
            guidance=config.guidance,
            bootstrap=0,
        )
        result = comparison.measure(fvd, Ranks(), self.features)
        write_text(path, json.dumps(result, indent=1))
        run_id = run_of(self.ablation.run(trial.arm).folder)
        if run_id:
            name = f"fvd/{config.protocol}_{config.frames}f_{trial.sampler.replace(':', '_')}"
            found = BenchmarkReport("fvd", "fvd", [(trial.step, {name: result["fvd"]})])
            tracking = TrackingConfig(experiment=config.experiment)
            send(found, self.ablation.out, run_id=run_id, tracking=tracking, show=False)

    def outcome(self, trial: Trial) -> str:
        """The distance."""
        return f"FVD {self.values()[trial]:.1f}"

    def values(self) -> dict[Trial, float]:
        """The distances that are measured."""
        return {
            trial: float(json.loads(path.read_text())["fvd"])
            for trial in self.trials
            for path in self.parts(trial)
            if path.exists()
        }


def small(config: AblationConfig) -> AblationConfig:
    """The settings of `--smoke`, on clips that are made in the folder of the results."""
    from benchmarks.clips import smoke_clips

    return replace(SMOKE, real=str(smoke_clips(Path(config.out) / "data")))


def smoke_words(out: Path) -> list[str]:
    """The settings of the training runs of `--smoke`, on latents that are made in a folder."""
    from benchmarks.clips import smoke_latents

    tiny = {"data.path": smoke_latents(out / "data"), "data.frames": 9, "data.stride": 1, "data.batch_size": 2}
    tiny |= {"data.workers": 0, "previews.every": 0, "log_every": 1, "engine.precision": "fp32"}
    words = [f"--{name}={value}" for name, value in tiny.items()]
    return ["--config", str(ROOT / "configs" / "ffs_xl.yaml"), *words, "--tracking.system_metrics=false"]


def main(argv: Sequence[str] | None = None) -> None:
    """Command line."""
    own, words = settings.split_words(AblationConfig, sys.argv[1:] if argv is None else argv)
    try:
        config = settings.parse_small(AblationConfig, own, __doc__, small)
        if config.smoke:
            words = [*smoke_words(Path(config.out)), *words]
        if not config.real:
            raise ValueError("--real is missing: name the real videos or latent shards that FVD compares with")
        if any(not sampler.partition(":")[2].isdigit() for sampler in config.samplers):
            raise ValueError(f"--samplers {' '.join(config.samplers)}: each is SOLVER:STEPS, such as ddim:50")
        ablation = Ablation(config, words)
        done = ablation.train()
        ablation.work()
    except ValueError as error:
        settings.fail(error)
    found = ablation.bench.values()
    ablation.publish(found)
    print(f"{len(found)} of {len(ablation.bench.trials)} measurements; figures and results.json in {config.out}")
    if not done:
        print("type the same command again when the jobs are over")


if __name__ == "__main__":
    main()
