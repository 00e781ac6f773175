"""The stages of benchmarks/evidence.py: they make clips, training runs and measurements. Each skips what is done."""

import json
import os
import shlex
import subprocess
import sys
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from benchmarks.clips import smoke_clips
from benchmarks.evidence.data import VIDEOS, folders, made_of, prepare
from benchmarks.evidence.measure import ClipBench
from benchmarks.evidence.plan import Budget, EvidenceConfig, arms, is_deciding, rank
from benchmarks.experiment import ROOT, Arm, Bench, Experiment, TrainingRun, Trial
from benchmarks.models import network
from fvdm.data.config import DataConfig
from fvdm.data.shards import LatentShards
from fvdm.evaluation.sources import device
from fvdm.training.plan import flops

SPEED = "speed/seconds_per_step"
HELD_OUT = ("validation/loss", "validation/loss_one_t", "validation/loss_t_per_frame")


def fast_bf16() -> bool:
    """Whether bf16 is faster on this machine: a GPU, or a CPU with instructions for it."""
    return torch.cuda.is_available() or torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


class Evidence(Experiment):
    """One budget, carried out in one folder."""

    def __init__(self, name: str, budget: Budget, options: EvidenceConfig) -> None:
        super().__init__("evidence", Path(options.out or f"runs/evidence-{name}"))
        self.name, self.budget, self.options = name, budget, options

    def prepare(self) -> list[str]:
        """Make the clips; returns the sets that have some.

        Raises:
            ValueError: if a set cannot be made, or no set has clips.
        """
        words = self.options.videos
        if self.name == "smoke" and not words:
            words = (str(smoke_clips(self.out / "made")),)
        videos = folders(words, self.budget.sets)
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

    @property
    def at_once(self) -> int:
        """How many training runs run side by side; on Slurm they are only submitted."""
        alone = self.budget.gpus == -1 and torch.cuda.is_available()  # A run that takes every GPU shares none.
        return 1 if alone else self.budget.workers

    @property
    def cores(self) -> int:
        """The share of one that runs beside others; more threads than cores would wait for each other."""
        return max(1, len(os.sched_getaffinity(0)) // self.budget.workers)

    def run(self, arm: Arm) -> TrainingRun:
        """The training run of an arm."""
        config, budget = self.budget.sets[arm.data], self.budget
        launcher = ["--cluster", budget.cluster, "--nodes", str(budget.nodes), "--gpus-per-node", str(budget.gpus)]
        if budget.cluster == "local":
            launcher += ["--cpus-per-task", str(max(1, self.cores // budget.nodes))]
        launcher += ["--config", str(ROOT / "configs" / "ffs_xl.yaml")]
        settings = arm.settings | {
            "data.path": self.out / "data" / arm.data / "latents-train",
            "data.frames": config.frames,
            "data.stride": config.stride,
            "tracking.experiment": self.experiment,
        }
        if config.validate_every:
            held_out = self.out / "data" / arm.data / "latents-test"  # It has one split.
            settings |= {"validation.every": config.validate_every, "validation.path": held_out}
            settings |= {"validation.split": "train"}
        settings |= config.train
        if settings.get("engine.precision") == "auto":
            settings["engine.precision"] = "bf16" if fast_bf16() else "fp32"
        return TrainingRun(arm.name, self.out / "runs", config.steps, launcher, settings)

    @cached_property
    def benches(self) -> dict[str, ClipBench]:
        """The sets that have clips."""
        found = {}
        for name, config in self.budget.sets.items():
            if (self.out / "data" / name / "latents-test" / "manifest.json").exists():
                found[name] = ClipBench(name, config, self.out, self.checkpoint, self.budget.batch)
        return found

    def open_trials(self, only: str = "*") -> list[tuple[Bench, Trial]]:
        """The measurements that are not done, and whose training run is; the first questions first."""
        return sorted(super().open_trials(only), key=lambda entry: rank(entry[1], self.budget.sets[entry[1].data]))

    def measure(self) -> None:
        """Do the measurements that are not done, in this process and some beside it.

        Raises:
            ValueError: if a process fails.
        """
        number = len(self.open_trials(self.options.only))
        print(f"measurements: {number} to do", flush=True)
        if not number:
            return
        program = str(Path(__file__).resolve().parents[1] / "evidence.py")
        command = [sys.executable, program, "--budget", self.name, "--out", str(self.out)]
        command += ["--only", self.options.only, "--stages", "worker"]
        shared = os.environ | {"OMP_NUM_THREADS": str(self.cores)}
        others = range(1, min(number, self.budget.workers))  # beside this process
        running = [subprocess.Popen(command, env=shared | {"LOCAL_RANK": str(k)}) for k in others]
        threads = torch.get_num_threads()
        torch.set_num_threads(self.cores)
        try:
            self.work(self.options.only)
        finally:
            torch.set_num_threads(threads)
            codes = [process.wait() for process in running]
        if any(codes):
            raise ValueError("a process that measures has failed: see above, and type the command again")

    def work(self, only: str = "*") -> None:
        """Measure, as one of the processes that do, on a GPU of its own where there are some."""
        if torch.cuda.is_available():
            torch.cuda.set_device(device())  # A model goes to the current GPU.
        super().work(only)

    @property
    def again(self) -> str:
        """The command that does all of this here."""
        words = [*made_of(self.out / "data", self.budget.sets), "--out", str(self.out)]
        return f"{self.shown} {shlex.join(words)}"

    @property
    def shown(self) -> str:
        """The command without what is this machine's alone."""
        return f"python benchmarks/evidence.py --budget {self.name}"

    def record(self, arm: Arm) -> dict[str, Any]:
        """What a training run was and cost: steps, seconds, FLOPs of a step, and its held-out losses by step."""
        config, run = self.budget.sets[arm.data], self.run(arm)
        journal = run.folder / "events.jsonl"
        events = [json.loads(line) for line in journal.read_text().splitlines()] if journal.exists() else []
        metrics = [(event["step"], event["metrics"]) for event in events if "metrics" in event]
        speed = [found[SPEED] for _, found in metrics if SPEED in found]
        losses = {step: [found.get(name) for name in HELD_OUT] for step, found in metrics if HELD_OUT[0] in found}
        return {
            "steps": config.steps if run.done else "not run yet",
            "seconds": sum(speed) / len(speed) * config.steps if speed and run.done else None,
            "flops": self._flops(arm) if run.done else None,
            "held_out": [[step, *values] for step, values in sorted(losses.items())],
        }

    def _flops(self, arm: Arm) -> float:
        """Floating-point operations of one step, of all clips, forward and backward."""
        config = self.budget.sets[arm.data]
        shards = LatentShards(str(self.out / "data" / arm.data / "latents-train"))
        channels, side, _ = shards.latent_shape
        batch = int(config.train.get("data.batch_size", DataConfig.batch_size))
        return batch * flops(network(arm.model, side, config.frames, channels))

    def arms(self) -> list[Arm]:
        """The training runs of the sets that have clips; the two that the paper's first claim is about come first."""
        found = [arm for name, bench in self.benches.items() for arm in arms(name, bench.config)]

        def order(arm: Arm) -> tuple[bool, int]:
            config = self.budget.sets[arm.data]
            return not is_deciding(arm, config), config.seeds.index(arm.seed)

        return sorted(found, key=order)
