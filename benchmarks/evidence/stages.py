"""The stages of benchmarks/evidence.py that make clips, trainings and measurements. Each skips what is done."""

import argparse
import os
import shlex
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from fnmatch import fnmatch
from functools import cached_property
from pathlib import Path

import torch

from benchmarks.ablation import queued
from benchmarks.evidence.data import VIDEOS, folders, made_of, prepare, smoke_videos
from benchmarks.evidence.measure import Bench
from benchmarks.evidence.plan import ROOT, SCALAR, Arm, Budget, Job, arms, base_p, jobs, rank
from fvdm.checkpoints.layout import STEP
from fvdm.evaluation.sources import device

EXPERIMENT = "evidence"


class Evidence:
    """One budget, carried out in one folder."""

    def __init__(self, name: str, budget: Budget, options: argparse.Namespace) -> None:
        self.name, self.budget, self.options = name, budget, options
        self.out = Path(options.out)

    def checkpoint(self, arm: Arm) -> Path:
        """Where a training ends."""
        steps = self.budget.sets[arm.data].steps
        return self.out / "runs" / arm.name / "checkpoints" / STEP.format(steps)

    def prepare(self) -> list[str]:
        """Make the clips; returns the sets that have some.

        Raises:
            ValueError: if a set cannot be made, or no set has clips.
        """
        if self.name == "smoke" and not self.options.videos:
            self.options.videos = [str(smoke_videos(self.out / "made"))]
        videos = folders(self.options.videos, self.budget.sets)
        ready = []
        for name, config in self.budget.sets.items():
            folder = self.out / "data" / name
            if self.name == "paper" and name not in videos and not folder.exists():
                print(f"{name}: no folder was named, so it is left out")
                continue
            prepare(name, config, folder, videos.get(name), self.options.digits)
            ready.append(name)
        if not ready:
            raise ValueError(f"no set has videos: name folders with --videos NAME=DIR, or in {VIDEOS}")
        return ready

    def train(self, wanted: Sequence[Arm]) -> bool:
        """Do, or submit, the trainings that are not done, some side by side; whether all are.

        Raises:
            ValueError: if one fails.
        """
        missing = [arm for arm in wanted if not self.checkpoint(arm).exists() and not queued(f"fvdm-{arm.name}")]
        print(f"trainings: {len(wanted) - len(missing)} of {len(wanted)} done or in the queue", flush=True)
        # A training that takes every GPU shares none; on Slurm this only submits.
        alone = self.budget.gpus == -1 and torch.cuda.is_available()
        with ThreadPoolExecutor(1 if alone else self.budget.workers) as pool:
            codes = list(pool.map(self._train, missing))
        for arm, code in zip(missing, codes, strict=True):
            if code:
                raise ValueError(f"the training {arm.name} ended with code {code}: see above, mend it, and go on")
        return all(self.checkpoint(arm).exists() for arm in wanted)

    def _train(self, arm: Arm) -> int:
        code = subprocess.run(self.command(arm), stdout=subprocess.DEVNULL).returncode
        print(f"{arm.name}: {'trained' if not code else f'ended with code {code}'}", flush=True)
        return code

    @property
    def cores(self) -> int:
        """The share of one that runs beside others; more threads than cores would wait for each other."""
        return max(1, len(os.sched_getaffinity(0)) // self.budget.workers)

    def command(self, arm: Arm) -> list[str]:
        """The command line of a training."""
        config, budget = self.budget.sets[arm.data], self.budget
        command = [sys.executable, str(ROOT / "launchers" / "slurm_train.py"), "--cluster", budget.cluster]
        command += ["--nodes", str(budget.nodes), "--gpus-per-node", str(budget.gpus)]
        if budget.cluster == "local":
            command += ["--cpus-per-task", str(max(1, self.cores // budget.nodes))]
        command += ["--config", str(ROOT / "configs" / "ffs_xl.yaml")]
        settings = {
            "name": arm.name,
            "runs": self.out / "runs",
            "model": arm.model,
            "p": arm.p,
            "seed": arm.seed,
            "steps": config.steps,
            "data.path": self.out / "data" / arm.data / "latents-train",
            "data.frames": config.frames,
            "data.stride": config.stride,
            "tracking.experiment": EXPERIMENT,
        }
        return [*command, *(f"--{key}={_word(value)}" for key, value in (settings | config.train).items())]

    @cached_property
    def benches(self) -> dict[str, Bench]:
        """The sets that have clips."""
        found = {}
        for name, config in self.budget.sets.items():
            if (self.out / "data" / name / "latents-test" / "manifest.json").exists():
                found[name] = Bench(name, config, self.out, self._checkpoint_of, self.budget.batch)
        return found

    def _checkpoint_of(self, job: Job) -> Path:
        assert job.arm
        return self.checkpoint(job.arm)

    def open_jobs(self) -> list[tuple[Bench, Job]]:
        """The measurements that are wanted, not done, and whose training is; the first questions first."""
        found = []
        for name, bench in self.benches.items():
            for job in jobs(name, bench.config):
                ready = job.arm is None or self.checkpoint(job.arm).exists()
                if ready and fnmatch(job.name, self.options.only) and not bench.done(job):
                    found.append((bench, job))
        return sorted(found, key=lambda entry: rank(entry[1], entry[0].config))

    def measure(self) -> None:
        """Do the measurements that are not done, in some processes side by side.

        Raises:
            ValueError: if a process fails.
        """
        print(f"measurements: {len(self.open_jobs())} to do", flush=True)
        if not self.open_jobs():
            return
        command = [
            sys.executable,
            str(Path(__file__).resolve().parents[1] / "evidence.py"),
            "--budget",
            self.name,
            "--out",
            str(self.out),
        ]
        command += ["--only", self.options.only, "--stages", "worker"]
        shared = os.environ | {"OMP_NUM_THREADS": str(self.cores)}
        running = [subprocess.Popen(command, env=shared | {"LOCAL_RANK": str(k)}) for k in range(self.budget.workers)]
        codes = [process.wait() for process in running]
        if any(codes):
            raise ValueError("a process that measures has failed: see above, mend it, and go on")

    def work(self) -> None:
        """One process that measures: every part that no other has."""
        if torch.cuda.is_available():
            torch.cuda.set_device(device())  # A model goes to the current GPU.
        for bench, job in self.open_jobs():
            bench.work(job)
            if bench.done(job):
                print(f"{job.name}: measured", flush=True)

    @property
    def again(self) -> str:
        """The command that does all of this here."""
        words = [*made_of(self.out / "data", self.budget.sets), "--out", str(self.out)]
        return f"{self.shown} {shlex.join(words)}"

    @property
    def shown(self) -> str:
        """The command without what is this machine's alone."""
        return f"python benchmarks/evidence.py --budget {self.name}"

    def arms(self) -> list[Arm]:
        """The trainings of the sets that have clips; the two that the paper's first claim is about come first."""
        found = [arm for name, bench in self.benches.items() for arm in arms(name, bench.config)]

        def order(arm: Arm) -> tuple[bool, int]:
            config = self.budget.sets[arm.data]
            main = arm.model == config.model and arm.p in (SCALAR, base_p(config))
            return not main, config.seeds.index(arm.seed)

        return sorted(found, key=order)


def _word(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)
