"""From the measured clips of benchmarks/evidence.py to numbers with intervals, comparisons and verdicts."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from benchmarks.evidence_measure import Bench
from benchmarks.evidence_plan import SCALAR, Arm, Job, arms, base_p, jobs
from benchmarks.evidence_scores import LEVELS, OWN, Statistic, difference, fvd_mean, interval, mean_of
from benchmarks.scores import drawn
from fvdm.distances import kernel_distance
from fvdm.matrices import given_frames
from fvdm.protocols import protocol

DRAWS = 200  # resamplings behind an interval
AS_GOOD = 0.1  # two distances within this share of each other count as "about as good"
LOWER = {"fvd": True, "distance": True, "motion": True, "residual": True, "psnr": False}
Numbers = dict[str, Any]


class Claim(NamedTuple):
    """What the paper says of two arms, as it can be measured here.

    Attributes:
        name: for people.
        paper: what the paper reports.
        better: the measurements, one a training seed, that it says win.
        worse: those that it says lose, of the same seeds.
        measures: the deciding one first; chosen before anything was measured.
        same: the claim is that both are about as good.
    """

    name: str
    paper: str
    better: list[Job]
    worse: list[Job]
    measures: tuple[str, ...]
    same: bool = False


class Results:
    """The numbers of one set, of the measurements that are done."""

    def __init__(self, bench: Bench) -> None:
        self.bench, self.config = bench, bench.config
        self.jobs = {job.name: job for job in jobs(bench.name, bench.config)}
        self.tables = {job.name: bench.read(job) for job in self.jobs.values() if bench.done(job)}
        self.ddof = protocol(self.config.protocol).ddof

    def real(self, split: str) -> np.ndarray | None:
        """Features of real clips of a split, where they are measured."""
        return self.tables.get(f"{self.bench.name}/generate/{split}", {}).get("features")

    def statistic(self, measured: Sequence[Job], measure: str) -> Statistic | None:
        """A measure, averaged over trainings, as a function of which clips; None where it is not measured."""
        tables = [self.tables[job.name] for job in measured if job.name in self.tables]
        if not tables or len(tables) < len(measured):
            return None
        if measure in ("fvd", "distance", "fvd_last"):
            reference = self.real("test" if measured[0].task != "generate" else self.config.reference)
            column = "features_last" if measure == "fvd_last" else "features"
            if reference is None or column not in tables[0]:
                return None
            fakes = [table[column] for table in tables]
            if measure == "distance":
                short = min(len(reference), len(fakes[0]))
                return mean_of([np.linalg.norm(fake[:short] - reference[:short], axis=1) for fake in fakes])
            short = min(len(reference), *(len(fake) for fake in fakes))
            return fvd_mean(reference[:short], [fake[:short] for fake in fakes], self.ddof)
        return mean_of([table[measure] for table in tables]) if measure in tables[0] else None

    def clips(self, measured: Sequence[Job]) -> int:
        """Clips behind a number."""
        count = min(self.bench.count(job) for job in measured)
        reference = self.real("test")
        return count if reference is None or measured[0].task == "long" else min(count, len(reference))

    def number(self, measured: Sequence[Job], measure: str) -> list[float] | None:
        """Value, and the ends of its interval; None where it is not measured."""
        statistic = self.statistic(measured, measure)
        return None if statistic is None else list(interval(statistic, self.clips(measured), DRAWS))

    def row(self, measured: Sequence[Job], measures: Sequence[str]) -> Numbers:
        """A line of a table: what it is of, and its numbers."""
        first = measured[0]
        found: Numbers = {"method": first.method, "sampler": first.sampler, "clips": self.clips(measured)}
        found["jobs"] = [job.name for job in measured]
        if first.arm:
            found |= {
                "model": first.arm.model,
                "p": first.arm.p,
                "seeds": [job.arm.seed for job in measured if job.arm],
            }
        for measure in measures:
            value = self.number(measured, measure)
            if value:
                found[measure] = value
        return found

    def find(self, arm: Arm | None, task: str, sampler: str = "") -> Job | None:
        """The done measurement of an arm."""
        for job in self.jobs.values():
            same = (job.arm, job.task) == (arm, task) and job.method != "vae" and sampler in ("", job.sampler)
            if same and job.name in self.tables:
                return job
        return None

    def group(self, model: str, p: float, task: str, sampler: str = "") -> list[Job]:
        """The done measurements of an arm, one a seed."""
        found = [self.find(Arm(self.bench.name, model, p, seed), task, sampler) for seed in self.config.seeds]
        return [job for job in found if job]

    def generation(self) -> list[Numbers]:
        """Plain generation: real clips, then each training, then each arm over its seeds."""
        first = self.config.samplers[0]
        rows = []
        floor = self.find_real("train" if self.config.reference == "test" else "test")
        if floor:
            rows.append(self.row([floor], ["fvd", "residual"]))
        for arm in arms(self.bench.name, self.config):
            job = self.find(arm, "generate", first)
            if job:
                rows.append(self.row([job], ["fvd", "residual"]) | self._kernel(job))
        return rows

    def find_real(self, split: str) -> Job | None:
        """The measurement of real clips of a split."""
        name = f"{self.bench.name}/generate/{split}"
        return self.jobs[name] if name in self.tables else None

    def _kernel(self, job: Job) -> Numbers:
        reference, fake = self.real(self.config.reference), self.tables[job.name].get("features")
        return {} if reference is None or fake is None else {"kvd": kernel_distance(reference, fake)}

    def samplers(self) -> list[Numbers]:
        """The samplers on one training, with the seconds of a clip."""
        best = Arm(self.bench.name, self.config.model, base_p(self.config), self.config.seeds[0])
        rows = []
        for sampler in self.config.samplers:
            job = self.find(best, "generate", sampler)
            if job and len(self.config.samplers) > 1:
                rows.append(self.row([job], ["fvd", "residual"]))
        return rows

    def tasks(self) -> dict[str, list[Numbers]]:
        """Task -> a line for each method, over the seeds of its arm."""
        found: dict[str, list[Numbers]] = {}
        for task in self.config.tasks:
            measures = ["psnr", "distance", "fvd", "residual", "residual_last", "fvd_last"]
            measures += [] if task == "image-to-video" else ["motion"]  # One frame does not tell where a digit flies.
            groups = [self.group(self.config.model, p, task) for p in self.config.p]
            extra = [job for job in self.jobs.values() if job.task == task and job.method in ("frozen", "vae")]
            groups += [[job] for job in extra if job.name in self.tables]
            found[task] = [self.row(group, measures) for group in groups if group]
        return found

    def drift(self) -> Numbers:
        """Scores of long videos over their frames: measure -> method -> means of every frame."""
        found: Numbers = {}
        new = drawn(self.config.length, given_frames("long", self.config.frames))
        for p in self.config.p:
            group = self.group(self.config.model, p, "long")
            for measure in ("motion", "psnr"):
                tables = [self.tables[job.name][measure] for job in group if measure in self.tables[job.name]]
                if tables:
                    curve = np.mean(tables, axis=(0, 1)).round(4).tolist()
                    found.setdefault(measure, {})[f"p = {p:g}, {group[0].method}"] = curve
        return {"frames": new} | found if found else {}

    def validation(self) -> Numbers:
        """What a cleaner neighbour is worth: p -> tables by own (rows) and smallest neighbour's timestep (columns)."""
        found: Numbers = {}
        for p in self.config.p:
            group = self.group(self.config.model, p, "validation")
            if group:
                mean = np.mean([self.tables[job.name]["table"] for job in group], axis=(0, 1))
                names = ("error", "copied", "share")
                found[f"{p:g}"] = {name: mean[:, :, k].round(5).tolist() for k, name in enumerate(names)}
        return {"own": list(OWN), "neighbour": list(LEVELS), "p": found} if found else {}

    def claims(self) -> Iterator[Claim]:
        """The paper's claims that this set can speak of."""
        c, best = self.config, base_p(self.config)
        plain = ("fvd",) if c.i3d else ("residual",)
        first = c.samplers[0]

        def of(p: float, task: str = "generate", model: str = "") -> list[Job]:
            return self.group(model or c.model, p, task, first)

        yield Claim(
            f"p = {best:g} beats p = 0, plain generation", "FVD 74.31 against 82.28", of(best), of(SCALAR), plain
        )
        for p in c.p:
            if p not in (SCALAR, best):
                yield Claim(
                    f"p = {best:g} beats p = {p:g}, plain generation", "0.2 is the best p", of(best), of(p), plain
                )
        for model in c.models:
            name = f"bigger is better: {c.model} beats {model}"
            yield Claim(name, "S to XL: FVD falls with size", of(best), of(best, model=model), plain)
        base = Arm(self.bench.name, c.model, best, c.seeds[0])
        one = {sampler: job for sampler in c.samplers if (job := self.find(base, "generate", sampler))}

        def by(sampler: str) -> list[Job]:
            return [one[sampler]] if sampler in one else []

        if {"ddim:50", "ddpm:250"} <= set(c.samplers):
            words = ("DDIM-50 is about as good as DDPM-250", "nearly equal FVD")
            yield Claim(*words, by("ddim:50"), by("ddpm:250"), plain, same=True)
        if {"ddim:50", "ddim:10"} <= set(c.samplers):
            yield Claim("DDIM-10 is clearly worse than DDIM-50", "clearly worse", by("ddim:50"), by("ddim:10"), plain)
        for task in c.tasks:
            deciding = ("motion" if task != "image-to-video" else "residual", "psnr") if c.kind == "digits" else ()
            name = f"{task}: a timestep per frame (p = {best:g}) beats the scalar arm with replacement"
            measures = deciding or ("fvd", "distance", "psnr")
            yield Claim(name, "zero-shot, no number against a baseline", of(best, task), of(SCALAR, task), measures)

    def comparisons(self) -> list[Numbers]:
        """Each claim with its numbers and its verdict."""
        return [self.compare(claim) for claim in self.claims()]

    def compare(self, claim: Claim) -> Numbers:
        """Numbers of a claim; differences are positive where the paper is right."""
        found: Numbers = {"claim": claim.name, "paper": claim.paper, "set": self.bench.name, "measures": {}}
        for measure in claim.measures:
            better, worse = (self.statistic(side, measure) for side in (claim.better, claim.worse))
            if better is None or worse is None:
                continue
            pair = (worse, better) if LOWER[measure] else (better, worse)
            clips = self.clips(claim.better)
            value, low, high = interval(difference(*pair), clips, DRAWS)
            everything = np.arange(clips)
            numbers: Numbers = {"difference": [value, low, high], "clips": clips}
            numbers |= {"better": better(everything), "worse": worse(everything)}
            numbers["by_seed"] = [
                self._one(a, b, measure, clips) for a, b in zip(claim.better, claim.worse, strict=False)
            ]
            found["measures"][measure] = numbers
        found["jobs"] = [job.name for job in (*claim.better, *claim.worse)]
        found["verdict"] = verdict(claim, found["measures"], missing=self._missing(claim))
        return found

    def _missing(self, claim: Claim) -> bool:
        """Whether trainings of the other seeds are still to come."""
        seeds = {job.arm.seed for job in claim.better if job.arm}
        one_training = {job.arm for job in (*claim.better, *claim.worse)}
        return len(one_training) > 1 and seeds != set(self.config.seeds)

    def _one(self, better: Job, worse: Job, measure: str, clips: int) -> float:
        a, b = self.statistic([better], measure), self.statistic([worse], measure)
        assert a is not None
        assert b is not None
        value = difference(b, a)(np.arange(clips))
        return value if LOWER[measure] else -value

    def all(self) -> Numbers:
        """Everything, as JSON holds it."""
        return {
            "generation": self.generation(),
            "samplers": self.samplers(),
            "tasks": self.tasks(),
            "drift": self.drift(),
            "validation": self.validation(),
            "comparisons": self.comparisons(),
            "seconds": {name: float(table["seconds"].sum()) for name, table in self.tables.items()},
        }


def verdict(claim: Claim, measures: Numbers, missing: bool = False) -> str:
    """Reproduced, not reproduced, or not measured yet; by the deciding measure alone.

    A difference counts if its interval leaves out 0 and every training seed agrees on its sign.

    Args:
        claim: what is claimed.
        measures: its numbers.
        missing: some training seeds have not run yet.
    """
    deciding = next((measures[name] for name in claim.measures[:1] if name in measures), None)
    if deciding is None:
        return "not run yet"
    if missing:
        return f"open: {len(deciding['by_seed'])} training seed has run, and one does not settle it"
    value, low, high = deciding["difference"]
    if claim.same:
        near = abs(value) <= AS_GOOD * max(deciding["better"], deciding["worse"])
        return "reproduced" if near or low <= 0 <= high else "not reproduced"
    if low > 0 and all(one > 0 for one in deciding["by_seed"]):
        return "reproduced"
    if high < 0 and all(one < 0 for one in deciding["by_seed"]):
        return "not reproduced: the other way round"
    return "not reproduced: no difference that these clips and seeds can show"


def collect(benches: Sequence[Bench], say: Callable[[str], None]) -> dict[str, Numbers]:
    """The numbers of every set."""
    found = {}
    for bench in benches:
        say(f"{bench.name}: numbers and intervals")
        found[bench.name] = Results(bench).all()
    return found
