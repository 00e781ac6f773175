"""From the measured clips of benchmarks/evidence.py to numbers, each with its interval."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from benchmarks.evidence.measure import Bench
from benchmarks.evidence.plan import PTSS, SCALAR, Arm, Trial, arms, base_p, trials
from fvdm.diffusion.tasks import given_frames
from fvdm.evaluation.intervals import Statistic, difference, fvd_mean, interval, kvd_of, mean_of
from fvdm.evaluation.protocols import departures, protocol
from fvdm.evaluation.scores import LEVELS, OWN, drawn

DRAWS = 200  # resamplings behind an interval
MANY = 2000  # of means, which are cheap
EIGHTHS = 8  # parts of a long video
LOWER = {"fvd": True, "distance": True, "motion": True, "residual": True, "psnr": False, "named": False}
DIGITS = ("residual", "named", "identity", "sure")  # what plain generation of digits has
MEASURES = ("fvd", "kvd", *DIGITS, "motion", "psnr", "distance", "residual_last", "fvd_last")
Numbers = dict[str, Any]


class Results:
    """The numbers of one set, of the measurements that are done."""

    def __init__(self, bench: Bench) -> None:
        self.bench, self.config = bench, bench.config
        self.trials = {trial.name: trial for trial in trials(bench.name, bench.config)}
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
            found |= {
                "model": first.arm.model,
                "p": first.arm.p,
                "seeds": [trial.arm.seed for trial in measured if trial.arm],
            }
        for measure in measures:
            value = self.number(measured, measure)
            if value:
                found[measure] = value
        return found

    def find(self, arm: Arm | None, task: str, sampler: str = "") -> Trial | None:
        """The done measurement of an arm."""
        for trial in self.trials.values():
            same = (trial.arm, trial.task) == (arm, task) and trial.method != "vae" and sampler in ("", trial.sampler)
            if same and trial.name in self.tables:
                return trial
        return None

    def group(self, model: str, p: float, task: str, sampler: str = "") -> list[Trial]:
        """The done measurements of an arm, one a seed."""
        found = [self.find(Arm(self.bench.name, model, p, seed), task, sampler) for seed in self.config.seeds]
        return [trial for trial in found if trial]

    def generation(self) -> list[Numbers]:
        """Plain generation: real clips, then each training, then each arm over its seeds."""
        first = self.config.samplers[0]
        rows = []
        floor = self.find_real("train" if self.config.reference == "test" else "test")
        if floor:
            rows.append(self.row([floor], ["fvd", "kvd", *DIGITS]))
        for arm in arms(self.bench.name, self.config):
            trial = self.find(arm, "generate", first)
            if trial:
                rows.append(self.row([trial], ["fvd", "kvd", *DIGITS]))
        return rows

    def find_real(self, split: str) -> Trial | None:
        """The measurement of real clips of a split."""
        name = f"{self.bench.name}/generate/{split}"
        return self.trials[name] if name in self.tables else None

    def samplers(self) -> list[Numbers]:
        """The samplers on one training, with the seconds of a clip."""
        best = Arm(self.bench.name, self.config.model, base_p(self.config), self.config.seeds[0])
        rows = []
        for sampler in self.config.samplers:
            trial = self.find(best, "generate", sampler)
            if trial and len(self.config.samplers) > 1:
                rows.append(self.row([trial], ["fvd", "residual"]))
        return rows

    def tasks(self) -> dict[str, list[Numbers]]:
        """Task -> a line for each method, over the seeds of its arm."""
        found: dict[str, list[Numbers]] = {}
        for task in self.config.tasks:
            measures = ["psnr", "distance", "fvd", *DIGITS, "residual_last", "fvd_last"]
            measures += [] if task == "image-to-video" else ["motion"]  # One frame does not tell where a digit flies.
            groups = [self.group(self.config.model, p, task) for p in self.config.p]
            extra = [
                trial
                for trial in self.trials.values()
                if trial.task == task and trial.method in ("frozen", "straight", "vae")
            ]
            groups += [[trial] for trial in extra if trial.name in self.tables]
            found[task] = [self.row(group, measures) for group in groups if group]
        return found

    def drift(self) -> Numbers:
        """Scores of long videos over their frames: curves for the eye, and eighths with intervals."""
        found: Numbers = {}
        new = drawn(self.config.length, given_frames("long", self.config.frames))
        groups = {p: group for p in self.config.p if (group := self.group(self.config.model, p, "long"))}
        for measure in ("motion", "psnr"):
            shown = {p: group for p, group in groups.items() if measure in self.tables[group[0].name]}
            if shown:
                found[measure] = {
                    "curves": {_method(group): self._curve(group, measure) for group in shown.values()},
                    "eighths": [
                        self._part(shown, measure, part) for part in np.array_split(np.arange(len(new)), EIGHTHS)
                    ],
                }
        return (
            {"frames": new, "jobs": [trial.name for group in groups.values() for trial in group]} | found
            if found
            else {}
        )

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
            group = self.group(self.config.model, p, "validation")
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

    def card(self) -> Numbers:
        """How FVD is measured, and where that departs from its protocol; empty where it is not measured."""
        config, rules = self.config, protocol(self.config.protocol)
        real = self.real(config.reference)
        if real is None:
            return {}
        source = self.bench.sources[config.reference]
        span = (config.frames - 1) * self.bench.stride + 1
        departed = departures(
            rules,
            clips=(len(real), config.clips),
            frames=config.frames,
            size=config.size,
            stride=self.bench.stride,
            usual=rules.stride_on(self.bench.name),
            videos=sum(length >= span for length in source.lengths),
            repeats=1,
            seed=rules.seed,
            split=config.reference,
        )
        return {
            "protocol": f"{rules.name}: {rules.source}",
            "departs from it": departed + ([] if config.published else [f"{config.windows} windows of each video"]),
            "real clips": f"{len(real)} of the split {config.reference}, which has {len(source.names)} videos",
            "generated clips": config.clips,
            "frames": config.frames,
            "stride": f"real {self.bench.stride}, generated 1",
            "resolution": f"{config.size} pixels",
            "covariance": f"divided by n - {rules.ddof}",
            "codec": source.describe()["codec"],
        }

    def measurements(self) -> dict[str, dict[str, list[float]]]:
        """The numbers of every single measurement, by its name: what its MLflow run shows."""
        found = {}
        for name in self.tables:
            trial = self.trials[name]
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
            "card": self.card(),
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
