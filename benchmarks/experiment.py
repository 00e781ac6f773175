"""Training runs that differ in a few settings, and the measurements of them: what evidence.py and ablation.py compare.

Everything is made once, and the same command continues: a training run is done when its last checkpoint is there, a
measurement when its files are. In MLflow one run is the parent of the others.
"""

import subprocess
import sys
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from fvdm.checkpoints.layout import STEP
from fvdm.files import LockHeldError, lock

ROOT = Path(__file__).resolve().parents[1]
PTSS = "ptss"  # the paper's rule: each frame on its own


@dataclass(frozen=True)
class Arm:
    """The settings by which one training run differs from the others.

    Attributes:
        data: name of its set of clips; empty where all have the same.
        model: size and patch.
        p: probability of a timestep per frame.
        seed: of initial weights, data order and noise: equal in all arms of that seed; None keeps that of the settings.
        rule: how the timesteps of a clip differ where they do.
    """

    data: str
    model: str
    p: float
    seed: int | None = None
    rule: str = PTSS

    @property
    def name(self) -> str:
        """The run's name."""
        rule = "" if self.rule == PTSS else self.rule
        seed = "" if self.seed is None else f"s{self.seed}"
        return "_".join(filter(None, (self.data, self.model.replace("/", "-"), f"p{self.p:g}", rule, seed)))

    @property
    def settings(self) -> dict[str, object]:
        """Settings of the training run, by dotted name."""
        seed = {} if self.seed is None else {"seed": self.seed}
        rule = {} if self.rule == PTSS else {"timesteps.rule": self.rule}
        return {"model": self.model, "p": self.p} | seed | rule


@dataclass(frozen=True)
class Trial:
    """One measurement: clips of one arm (or of none), made in one way.

    Attributes:
        data: name of the set.
        arm: what makes the clips; None for real clips and for what needs no model.
        task: generate, image-to-video, interpolate, long, or validation.
        method: sampled, held, replacement, frozen, straight (the digit flies on in a line), vae, test or train (real
            clips of that split), or loss.
        sampler: SOLVER:STEPS; empty where nothing is sampled.
        clips: how many.
        step: of the training run's checkpoint; 0 is the last.
    """

    data: str
    arm: Arm | None
    task: str
    method: str
    sampler: str
    clips: int
    step: int = 0

    @property
    def name(self) -> str:
        """Its name among all, which patterns match."""
        who = self.arm.name if self.arm else self.data
        step = f"{self.step:08d}" if self.step else ""
        return "/".join(filter(None, (who, self.task, self.method, self.sampler.replace(":", "-"), step)))

    @property
    def solver(self) -> tuple[str, int]:
        """The solver of its sampler, and the steps."""
        solver, _, steps = self.sampler.partition(":")
        return solver, int(steps)


@dataclass(frozen=True)
class TrainingRun:
    """One training run, as launchers/slurm_train.py does it.

    Attributes:
        name: of the run.
        runs: folder of all runs.
        steps: optimizer steps.
        launcher: options of launchers/slurm_train.py, and files of settings.
        settings: settings of the run, by dotted name.
    """

    name: str
    runs: Path
    steps: int
    launcher: Sequence[str]
    settings: Mapping[str, object]

    @property
    def folder(self) -> Path:
        """The run's folder."""
        return self.runs / self.name

    def checkpoint(self, step: int = 0) -> Path:
        """The run's checkpoint of a step; 0 is the last."""
        return self.folder / "checkpoints" / STEP.format(step or self.steps)

    @property
    def done(self) -> bool:
        """Whether it was trained to its last step."""
        return self.checkpoint().exists()

    @property
    def command(self) -> list[str]:
        """Its command line."""
        named = {"name": self.name, "runs": self.runs, "steps": self.steps} | dict(self.settings)
        words = [f"--{key}={str(value).lower() if isinstance(value, bool) else value}" for key, value in named.items()]
        return [sys.executable, str(ROOT / "launchers" / "slurm_train.py"), *self.launcher, *words]


class Bench(ABC):
    """Makes the measurements of one set of clips, each in parts, which are files.

    Several processes share the parts: who holds a part's lock makes it. A killed process leaves no lock, so the next
    start makes what it left.

    Attributes:
        trials: the measurements.
    """

    trials: Sequence[Trial]

    @abstractmethod
    def parts(self, trial: Trial) -> list[Path]:
        """The files of a measurement."""

    @abstractmethod
    def make(self, trial: Trial, number: int, path: Path) -> None:
        """Make one part, the file `path`.

        Raises:
            ValueError: if clips or a checkpoint cannot be used.
        """

    def outcome(self, trial: Trial) -> str:
        """What is printed of a measurement when it is done."""
        return "measured"

    def done(self, trial: Trial) -> bool:
        """Whether all of a measurement is there."""
        return all(path.exists() for path in self.parts(trial))

    def work(self, trial: Trial) -> None:
        """Make the parts that nobody has made or is making.

        Raises:
            ValueError: as `make`.
        """
        for number, path in enumerate(self.parts(trial)):
            if not path.exists():
                with claimed(path) as mine:
                    if mine and not path.exists():
                        self.make(trial, number, path)


class Experiment(ABC):
    """Training runs and their measurements, in one folder and below one MLflow run."""

    def __init__(self, name: str, out: Path) -> None:
        """Of an MLflow experiment, in a folder."""
        self.experiment, self.out = name, out

    @abstractmethod
    def arms(self) -> list[Arm]:
        """The training runs, in the order in which they start."""

    @abstractmethod
    def run(self, arm: Arm) -> TrainingRun:
        """The training run of an arm."""

    @property
    @abstractmethod
    def benches(self) -> Mapping[str, Bench]:
        """What measures, by the set of clips."""

    def train(self, only: str = "*", at_once: int = 1, quiet: bool = False) -> bool:
        """Do, or submit, the training runs that are neither done nor in the queue; whether all are done.

        Args:
            only: pattern of the names of those that are done.
            at_once: how many run side by side.
            quiet: hide what the launcher prints.

        Raises:
            ValueError: if one fails.
        """
        runs = [self.run(arm) for arm in self.arms() if fnmatch(arm.name, only)]
        missing = [run for run in runs if not run.done and not queued(f"fvdm-{run.name}")]
        print(f"training runs: {len(runs) - len(missing)} of {len(runs)} done or in the queue", flush=True)

        def start(run: TrainingRun) -> int:
            print(f"{run.name}: started", flush=True)
            code = subprocess.run(run.command, stdout=subprocess.DEVNULL if quiet else None).returncode
            print(f"{run.name}: {'trained' if not code else f'ended with code {code}'}", flush=True)
            return code

        with ThreadPoolExecutor(at_once) as pool:
            codes = list(pool.map(start, missing))
        for run, code in zip(missing, codes, strict=True):
            if code:
                raise ValueError(
                    f"the training run {run.name} ended with code {code}: see above, and type the command again"
                )
        return all(run.done for run in runs)

    def checkpoint(self, trial: Trial) -> Path:
        """The checkpoint that a measurement is of."""
        assert trial.arm
        return self.run(trial.arm).checkpoint(trial.step)

    def open_trials(self, only: str = "*") -> list[tuple[Bench, Trial]]:
        """The measurements that are not done, and whose checkpoint is there; those whose names match a pattern."""
        return [
            (bench, trial)
            for bench in self.benches.values()
            for trial in bench.trials
            if fnmatch(trial.name, only)
            and (trial.arm is None or self.checkpoint(trial).exists())
            and not bench.done(trial)
        ]

    def work(self, only: str = "*") -> None:
        """Measure, as one of the processes that do: every part that no other has.

        Raises:
            ValueError: if clips or a checkpoint cannot be used.
        """
        for bench, trial in self.open_trials(only):
            bench.work(trial)
            if bench.done(trial):
                print(f"{trial.name}: {bench.outcome(trial)}", flush=True)

    def run_ids(self) -> dict[str, str]:
        """The MLflow runs of the training runs by name; empty where there is none yet."""
        from fvdm.tracking.tracker import run_of

        return {arm.name: run_of(self.run(arm).folder) for arm in self.arms()}

    def report(
        self,
        title: str,
        params: Mapping[str, Any],
        tags: Mapping[str, str],
        figures: Mapping[str, float],
        files: Mapping[Path, str],
        images: Mapping[str, Path],
        step: int = 0,
    ) -> str:
        """Report to the run that all others are below, the same one for the same folder.

        Args:
            title: the run's name.
            params: settings.
            tags: more tags than those of the machine.
            figures: numbers by name.
            files: artifacts, with the folder of each.
            images: by name; shown as images and kept as artifacts.
            step: at which the images are shown.

        Returns:
            The run's id; empty while the server is away.
        """
        from benchmarks.reporting import machine
        from fvdm.tracking.config import TrackingConfig
        from fvdm.tracking.tracker import Tracker

        tracking = TrackingConfig(experiment=self.experiment, system_metrics=False)
        tracker = Tracker(self.out / ".tracking" / "parent", tracking, title, dict(params), dict(tags) | machine())
        tracker.set_tags(dict(tags))
        if figures:
            tracker.figures(dict(figures), final=False)
        for name, path in images.items():
            tracker.artifact(path, "figures")
            tracker.image(path, f"figures/{name}", step)
        for path, folder in files.items():
            tracker.artifact(path, folder)
        for run_id in filter(None, self.run_ids().values()):
            tracker.set_parent(run_id)
        tracker.close()
        return tracker.run_id or ""


@contextmanager
def claimed(path: Path) -> Iterator[bool]:
    """Whether this process, and no other, may write a file for now."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with ExitStack() as held:
        try:
            held.enter_context(lock(path.with_suffix(".lock"), timeout=0))
        except LockHeldError:
            yield False
            return
        yield True


def queued(name: str) -> bool:
    """Whether a job of that name waits or runs on the cluster."""
    try:
        command = ["squeue", "--noheader", "--name", name]
        return bool(subprocess.run(command, capture_output=True, text=True, timeout=60).stdout.strip())
    except (OSError, subprocess.TimeoutExpired):
        return False
