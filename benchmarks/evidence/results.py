"""From the measured clips of benchmarks/evidence.py to numbers, each with its interval, and to verdicts."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from benchmarks.evidence.measure import ClipBench
from benchmarks.evidence.plan import BASELINES, LOWER, MEASURES, SCALAR, Claim, arms, base_p, claims, find, group
from benchmarks.experiment import PTSS, Arm, Trial
from fvdm.diffusion.tasks import given_frames
from fvdm.evaluation.intervals import Statistic, difference, everything, fvd_mean, interval, kvd_of, mean_of
from fvdm.evaluation.protocols import protocol
from fvdm.evaluation.scores import LEVELS, OWN, drawn

DRAWS = 200  # resamplings behind an interval
MANY = 2000  # of means, which are cheap
EIGHTHS = 8  # parts of a long video
DIGITS = ("residual", "named", "identity", "sure")  # what plain generation of digits has
AS_GOOD = 0.1  # two distances count as "about as good" where their difference is surely within this share
ONE_SEED = " (one seed)"
RECORDED = {"frozen": "still", "straight": "line"}  # names of the baselines in results.json
Numbers = dict[str, Any]


class Results:
    """The numbers of one set, of the measurements that are done."""

    def __init__(self, bench: ClipBench) -> None:
        self.bench, self.config = bench, bench.config
        self.trials = {trial.name: trial for trial in bench.trials}
        self.tables = {trial.name: bench.read(trial) for trial in self.trials.values() if bench.done(trial)}
        self.ddof = protocol(self.config.protocol).ddof

    def real(self, split: str) -> np.ndarray | None:
        """Features of real clips of a split, where they are measured."""
        return self.tables.get(f"{self.bench.name}/generate/{split}", {}).get("features")

    def reference(self, measured: Sequence[Trial], end: str = "") -> np.ndarray | None:
        """Features of the real clips that FVD compares these with, where they are measured."""
        first = measured[0]
        if first.task == "generate":
            return self.real(self.config.reference)
        if self.bench.own_truth(first):
            return self.tables.get(first.name, {}).get(f"truth_features{end}")
        return self.real("test")

    def apart(self, measured: Sequence[Trial]) -> int:
        """Real clips of a published protocol, all of which count however many are generated; else 0: one each."""
        reference = self.reference(measured)
        published = measured[0].task == "generate" and self.config.published
        return len(reference) if published and reference is not None else 0

    def statistic(self, measured: Sequence[Trial], measure: str) -> Statistic | None:
        """A measure, averaged over training runs, as a function of which clips; None where it is not measured."""
        tables = [self.tables[trial.name] for trial in measured if trial.name in self.tables]
        if not tables or len(tables) < len(measured):
            return None
        if measure not in ("fvd", "kvd", "distance", "fvd_last"):
            return mean_of([table[measure] for table in tables]) if measure in tables[0] else None
        end = "_last" if measure == "fvd_last" else ""
        reference = self.reference(measured, end)
        if reference is None or f"features{end}" not in tables[0]:
            return None
        fakes = [table[f"features{end}"] for table in tables]
        if not self.apart(measured):
            short = min(len(reference), *(len(fake) for fake in fakes))
            reference, fakes = reference[:short], [fake[:short] for fake in fakes]
        if measure == "distance":
            return mean_of([np.linalg.norm(fake - reference, axis=1) for fake in fakes])
        return kvd_of(reference, fakes) if measure == "kvd" else fvd_mean(reference, fakes, self.ddof)

    def clips(self, measured: Sequence[Trial]) -> int:
        """Clips behind a number: where each has a real one, no more than there are of these."""
        count = min(self.bench.count(trial) for trial in measured)
        reference = self.reference(measured)
        return count if reference is None or self.apart(measured) else min(count, len(reference))

    def interval(self, statistic: Statistic, measured: Sequence[Trial], draws: int = DRAWS) -> list[float]:
        """Value, and the ends of its interval, of a statistic of these clips."""
        return list(interval(statistic, self.clips(measured), draws, real=self.apart(measured)))

    def number(self, measured: Sequence[Trial], measure: str) -> list[float] | None:
        """Value, and the ends of its interval; None where it is not measured."""
        statistic = self.statistic(measured, measure)
        return None if statistic is None else self.interval(statistic, measured)

    def row(self, measured: Sequence[Trial], measures: Sequence[str]) -> Numbers:
        """A line of a table: what it is of, and its numbers."""
        first = measured[0]
        found: Numbers = {"method": first.method, "sampler": first.sampler, "clips": self.clips(measured)}
        found["jobs"] = [trial.name for trial in measured]
        if self.apart(measured) and "fvd" in measures:
            found["real"] = self.apart(measured)
        if first.arm:
            found |= {"rule": first.arm.rule} if first.arm.rule != PTSS else {}
            seeds = [trial.arm.seed for trial in measured if trial.arm]
            found |= {"model": first.arm.model, "p": first.arm.p, "seeds": seeds}
        for measure in measures:
            value = self.number(measured, measure)
            if value:
                found[measure] = value
        return found

    @property
    def measured(self) -> list[Trial]:
        """The measurements that are done."""
        return [trial for name, trial in self.trials.items() if name in self.tables]

    def group(self, p: float, task: str) -> list[Trial]:
        """The done measurements of an arm, one a seed."""
        return group(self.measured, Arm(self.bench.name, self.config.model, p), self.config.seeds, task)

    def generation(self) -> list[Numbers]:
        """Plain generation: real clips, then each training, then each arm over its seeds."""
        first = self.config.samplers[0]
        floor = "train" if self.config.reference == "test" else "test"
        found = [trial for trial in self.measured if trial.task == "generate" and trial.method == floor]
        for arm in arms(self.bench.name, self.config):
            trial = find(self.measured, arm, "generate", first)
            found += [trial] if trial else []
        return [self.row([trial], ["fvd", "kvd", *DIGITS]) for trial in found]

    def samplers(self) -> list[Numbers]:
        """The samplers on one training, with the seconds of a clip."""
        best = Arm(self.bench.name, self.config.model, base_p(self.config), self.config.seeds[0])
        samplers = self.config.samplers if len(self.config.samplers) > 1 else ()
        found = [find(self.measured, best, "generate", sampler) for sampler in samplers]
        return [self.row([trial], ["fvd", "residual"]) for trial in found if trial]

    def tasks(self) -> dict[str, list[Numbers]]:
        """Task -> a line for each method, over the seeds of its arm."""
        found: dict[str, list[Numbers]] = {}
        for task in self.config.tasks:
            measures = ["psnr", "distance", "fvd", *DIGITS, "residual_last", "fvd_last"]
            measures += [] if task == "image-to-video" else ["motion"]  # One frame does not tell where a digit flies.
            groups = [self.group(p, task) for p in self.config.p]
            groups += [[t] for t in self.measured if t.task == task and t.method in (*BASELINES, "vae")]
            found[task] = [self.row(group, measures) for group in groups if group]
        return found

    def drift(self) -> Numbers:
        """Scores of long videos over their frames: curves for the eye, and eighths with intervals."""
        found: Numbers = {}
        new = drawn(self.config.length, given_frames("long", self.config.frames))
        groups = {p: group for p in self.config.p if (group := self.group(p, "long"))}
        for measure in ("motion", "psnr"):
            shown = {p: group for p, group in groups.items() if measure in self.tables[group[0].name]}
            parts = np.array_split(np.arange(len(new)), EIGHTHS) if shown else []
            if shown:
                found[measure] = {
                    "curves": {_method(group): self._curve(group, measure) for group in shown.values()},
                    "eighths": [self._part(shown, measure, part) for part in parts],
                }
        jobs = [trial.name for group in groups.values() for trial in group]
        return {"frames": new, "jobs": jobs} | found if found else {}

    def _curve(self, group: Sequence[Trial], measure: str) -> list[float]:
        tables = [self.tables[trial.name][measure] for trial in group]
        return np.mean(tables, axis=(0, 1)).round(4).tolist()

    def _part(self, groups: dict[float, list[Trial]], measure: str, part: np.ndarray) -> Numbers:
        """One eighth of the frames: each method's mean, and how much the base p is ahead of the scalar arm."""

        def over(group: Sequence[Trial]) -> Statistic:
            return mean_of([self.tables[trial.name][measure][:, part] for trial in group])

        means = {_method(group): self.interval(over(group), group, MANY) for group in groups.values()}
        scalar, best = groups.get(SCALAR), groups.get(base_p(self.config))
        found: Numbers = {"part": [int(part[0]), int(part[-1])], "methods": means}
        if scalar and best:
            pair = (over(scalar), over(best)) if LOWER[measure] else (over(best), over(scalar))
            found["gain"] = self.interval(difference(*pair), best, MANY)
        return found

    def validation(self) -> Numbers:
        """What a cleaner neighbour is worth: p -> tables by own (rows) and smallest neighbour's timestep (columns)."""
        found: Numbers = {}
        names: list[str] = []
        for p in self.config.p:
            group = self.group(p, "validation")
            if group:
                found[f"{p:g}"] = self._neighbours(group)
                names += [trial.name for trial in group]
        return {"own": list(OWN), "neighbour": list(LEVELS), "p": found, "jobs": names} if found else {}

    def _neighbours(self, group: Sequence[Trial]) -> Numbers:
        """Tables of one arm, and how far its estimate of a frame of noise beside a clean one beats the copy of that."""
        tables = [self.tables[trial.name]["table"] for trial in group]  # (b own neighbour 3)

        def of(own: int, least: int, kind: int) -> Statistic:
            return mean_of([table[:, own, least, kind] for table in tables])

        def rows(kind: int) -> list[list[list[float]]]:
            return [[self.interval(of(i, j, kind), group, MANY) for j in range(len(LEVELS))] for i in range(len(OWN))]

        noise = len(OWN) - 1
        ahead = difference(of(noise, 0, 1), of(noise, 0, 0))
        found: Numbers = {"error": rows(0), "share": rows(2), "copied": self.interval(of(noise, 0, 1), group, MANY)}
        return found | {"ahead_of_copy": self.interval(ahead, group, MANY)}

    def measurements(self) -> dict[str, dict[str, list[float]]]:
        """The numbers of every single measurement, by its name: what its MLflow run shows."""
        found = {}
        for trial in self.measured:
            name = trial.name
            # Plain generation has no truth to be at a distance from, and the real clips none from themselves.
            without = {"distance"} if trial.task == "generate" else set()
            without |= {"fvd", "kvd"} if without and trial.method == self.config.reference else set()
            row = self.row([trial], [measure for measure in MEASURES if measure not in without])
            found[name] = {measure: row[measure] for measure in MEASURES if measure in row}
            if trial.method == "loss":
                table = self._neighbours([trial])
                found[name] = {kind: table[kind] for kind in ("copied", "ahead_of_copy")} | {
                    f"{kind} {own} beside {least}": table[kind][i][j]
                    for kind in ("error", "share")
                    for i, own in enumerate(OWN)
                    for j, least in enumerate(LEVELS)
                }
        return found

    def all(self) -> Numbers:
        """All tables, as JSON holds them."""
        return {
            "card": {} if self.real(self.config.reference) is None else self.bench.card(),
            "generation": self.generation(),
            "samplers": self.samplers(),
            "tasks": self.tasks(),
            "drift": self.drift(),
            "validation": self.validation(),
            "measurements": self.measurements(),
            "seconds": {name: float(table["seconds"].sum()) for name, table in self.tables.items()},
        }


def _method(group: Sequence[Trial]) -> str:
    assert group[0].arm
    return f"p = {group[0].arm.p:g}, {group[0].method}"


def compare(results: Results, claim: Claim) -> Numbers:
    """Numbers of a claim and its verdict; differences are positive where the paper is right."""
    done = results.tables.keys()
    claim = claim._replace(
        better=[trial for trial in claim.better if trial.name in done],
        worse=[trial for trial in claim.worse if trial.name in done],
    )
    found: Numbers = {"claim": claim.name, "paper": claim.paper, "set": results.bench.name, "measures": {}}
    for measure in claim.measures:
        better, worse = (results.statistic(side, measure) for side in (claim.better, claim.worse))
        if better is None or worse is None:
            continue
        clips, real = results.clips(claim.better), results.apart(claim.better)
        sign = 1 if LOWER[measure] else -1
        pair = (worse, better) if LOWER[measure] else (better, worse)
        one = everything(clips, real)
        numbers: Numbers = {"difference": results.interval(difference(*pair), claim.better), "clips": clips}
        numbers |= {"better": better(one), "worse": worse(one)}
        single = len(claim.worse) == 1 and claim.worse[0].arm is None  # One baseline for all seeds.
        others = list(claim.worse) * len(claim.better) if single else claim.worse
        numbers["by_seed"] = [
            sign * (b(one) - a(one))
            for k, j in zip(claim.better, others, strict=False)
            if (a := results.statistic([k], measure)) and (b := results.statistic([j], measure))
        ]
        values = {key: baseline(results, claim.better[0], measure, key) for key in BASELINES}
        found["measures"][measure] = numbers | {
            RECORDED[key]: value for key, value in values.items() if value is not None
        }
    found["jobs"] = [trial.name for trial in (*claim.better, *claim.worse)]
    found["verdict"] = verdict(claim, found["measures"], _missing(results, claim), len(results.config.seeds))
    return found


def baseline(results: Results, trial: Trial, measure: str, method: str) -> float | None:
    """What a measure says of a baseline: of this task, or of the path of a frozen frame, which needs no truth."""
    task = trial.task
    task = "image-to-video" if task == "generate" and measure == "residual" else task
    found = results.trials.get(f"{results.bench.name}/{task}/{method}")
    statistic = results.statistic([found], measure) if found else None
    return statistic(everything(results.clips([found]), results.apart([found]))) if found and statistic else None


def _missing(results: Results, claim: Claim) -> bool:
    """Whether training runs of the other seeds are still to come."""
    seeds = {trial.arm.seed for trial in claim.better if trial.arm}
    one_training = {trial.arm for trial in (*claim.better, *claim.worse)}
    return len(one_training) > 1 and seeds != set(results.config.seeds)


def verdict(claim: Claim, measures: Numbers, missing: bool = False, seeds: int = 1) -> str:
    """Reproduced, not reproduced, or not measured yet; by the deciding measure alone.

    A difference counts if its interval leaves out 0 and every training seed agrees on its sign. Two are about as good
    if the whole interval, and every seed, stay within `AS_GOOD` of the second.

    Args:
        claim: what is claimed.
        measures: its numbers.
        missing: some training seeds have not run yet.
        seeds: training runs of an arm; a verdict that rests on one of several says so.
    """
    deciding = next((measures[name] for name in claim.measures[:1] if name in measures), None)
    if deciding is None:
        return "not run yet"
    if missing:
        return f"open: {len(deciding['by_seed'])} training seed has run, and one does not settle it"
    text = _equal(deciding) if claim.same else _ahead(deciding)
    sides = (deciding["better"], deciding["worse"])
    for method, words in BASELINES.items():
        value = deciding.get(RECORDED[method])
        if value is not None and (value < min(sides) if LOWER[claim.measures[0]] else value > max(sides)):
            text += f", and limited: {words} beats both"
    return text + (ONE_SEED if len(deciding["by_seed"]) < seeds else "")


def _equal(deciding: Numbers) -> str:
    _, low, high = deciding["difference"]
    margin = AS_GOOD * deciding["worse"]
    if -margin <= low and high <= margin and all(abs(one) <= margin for one in deciding["by_seed"]):
        return "reproduced"
    if low > margin or high < -margin:
        return "not reproduced: they differ by more than a tenth"
    return "not reproduced: these clips cannot tell whether they are within a tenth"


def _ahead(deciding: Numbers) -> str:
    _, low, high = deciding["difference"]
    if low > 0 and all(one > 0 for one in deciding["by_seed"]):
        return "reproduced"
    if high < 0 and all(one < 0 for one in deciding["by_seed"]):
        return "not reproduced: the other way round"
    return "not reproduced: no difference that these clips and seeds can show"


def comparisons(results: Results) -> list[Numbers]:
    """Each claim with its numbers and its verdict; without baselines that are not measured."""
    planned = claims(results.bench.name, results.config)
    shown = [c for c in planned if not (c.worse and c.worse[0].arm is None and c.worse[0].name not in results.tables)]
    return [compare(results, claim) for claim in shown]


def collect(benches: Sequence[ClipBench], say: Callable[[str], None]) -> dict[str, Numbers]:
    """The numbers and verdicts of every set."""
    found = {}
    for bench in benches:
        say(f"{bench.name}: numbers and intervals")
        results = Results(bench)
        found[bench.name] = results.all() | {"comparisons": comparisons(results)}
    return found
