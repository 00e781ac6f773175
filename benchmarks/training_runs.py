"""Training runs that a benchmark compares: one after the other or side by side, here or on Slurm; each only once."""

import subprocess
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from fvdm.checkpoints.layout import STEP

ROOT = Path(__file__).resolve().parents[1]


@dataclass(frozen=True)
class TrainingRun:
    """One training run.

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

    def checkpoint(self, step: int) -> Path:
        """The run's checkpoint of a step."""
        return self.folder / "checkpoints" / STEP.format(step)

    @property
    def done(self) -> bool:
        """Whether it was trained to its last step."""
        return self.checkpoint(self.steps).exists()

    @property
    def command(self) -> list[str]:
        """Its command line."""
        named = {"name": self.name, "runs": self.runs, "steps": self.steps} | dict(self.settings)
        words = [f"--{key}={str(value).lower() if isinstance(value, bool) else value}" for key, value in named.items()]
        return [sys.executable, str(ROOT / "launchers" / "slurm_train.py"), *self.launcher, *words]


def train(runs: Sequence[TrainingRun], at_once: int = 1, quiet: bool = False) -> bool:
    """Do, or submit, the runs that are neither done nor in the queue; whether all are done.

    Args:
        runs: in the order in which they start.
        at_once: how many run side by side.
        quiet: hide what the launcher prints.

    Raises:
        ValueError: if one fails.
    """
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


def queued(name: str) -> bool:
    """Whether a job of that name waits or runs on the cluster."""
    try:
        command = ["squeue", "--noheader", "--name", name]
        return bool(subprocess.run(command, capture_output=True, text=True, timeout=60).stdout.strip())
    except (OSError, subprocess.TimeoutExpired):
        return False
