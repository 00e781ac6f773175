"""The paper's claims, as benchmarks/evidence.py can measure them, and what it says of each."""

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

from benchmarks.evidence.measure import Bench
from benchmarks.evidence.plan import SCALAR, Arm, Trial, base_p
from benchmarks.evidence.results import LOWER, Numbers, Results
from fvdm.evaluation.intervals import difference, everything

AS_GOOD = 0.1  # two distances count as "about as good" where their difference is surely within this share
ONE_SEED = " (one seed)"
BASELINES = {"frozen": "a frozen frame", "straight": "a straight line"}
RECORDED = {"frozen": "still", "straight": "line"}  # their names in results.json


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
    better: list[Trial]
    worse: list[Trial]
    measures: tuple[str, ...]
    same: bool = False


def claims(results: Results) -> Iterator[Claim]:
    """The paper's claims that this set can speak of."""
    c, best = results.config, base_p(results.config)
    plain = ("fvd",) if c.i3d else ("residual",)
    first = c.samplers[0]

    def of(p: float, task: str = "generate", model: str = "") -> list[Trial]:
        return results.group(model or c.model, p, task, first)

    yield Claim(f"p = {best:g} beats p = 0, plain generation", "FVD 74.31 against 82.28", of(best), of(SCALAR), plain)
    for p in c.p:
        if p not in (SCALAR, best):
            yield Claim(f"p = {best:g} beats p = {p:g}, plain generation", "0.2 is the best p", of(best), of(p), plain)
    for model in c.models:
        name = f"bigger is better: {c.model} beats {model}"
        yield Claim(name, "S to XL: FVD falls with size", of(best), of(best, model=model), plain)
    base = Arm(results.bench.name, c.model, best, c.seeds[0])
    one = {sampler: trial for sampler in c.samplers if (trial := results.find(base, "generate", sampler))}

    def by(sampler: str) -> list[Trial]:
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
        for method, title in BASELINES.items() if c.kind == "digits" else ():
            trial = results.trials.get(f"{results.bench.name}/{task}/{method}")
            if trial and trial.name in results.tables:
                name = f"{task}: a timestep per frame (p = {best:g}) beats {title}"
                yield Claim(name, "none: a baseline that a model must beat", of(best, task), [trial], measures)


def comparisons(results: Results) -> list[Numbers]:
    """Each claim with its numbers and its verdict."""
    return [compare(results, claim) for claim in claims(results)]


def compare(results: Results, claim: Claim) -> Numbers:
    """Numbers of a claim; differences are positive where the paper is right."""
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
        others = claim.worse * len(claim.better) if single else claim.worse
        numbers["by_seed"] = [
            sign * (b(one) - a(one))
            for k, j in zip(claim.better, others, strict=False)
            if (a := results.statistic([k], measure)) and (b := results.statistic([j], measure))
        ]
        values = {key: baseline(results, claim, measure, key) for key in BASELINES}
        found["measures"][measure] = numbers | {
            RECORDED[key]: value for key, value in values.items() if value is not None
        }
    found["jobs"] = [trial.name for trial in (*claim.better, *claim.worse)]
    found["verdict"] = verdict(claim, found["measures"], _missing(results, claim), len(results.config.seeds))
    return found


def baseline(results: Results, claim: Claim, measure: str, method: str) -> float | None:
    """What a measure says of a baseline: of this task, or of the path of a frozen frame, which needs no truth."""
    task = claim.better[0].task
    task = "image-to-video" if task == "generate" and measure == "residual" else task
    trial = results.trials.get(f"{results.bench.name}/{task}/{method}")
    statistic = results.statistic([trial], measure) if trial else None
    return statistic(everything(results.clips([trial]), results.apart([trial]))) if trial and statistic else None


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


def collect(benches: Sequence[Bench], say: Callable[[str], None]) -> dict[str, Numbers]:
    """The numbers and verdicts of every set."""
    found = {}
    for bench in benches:
        say(f"{bench.name}: numbers and intervals")
        results = Results(bench)
        found[bench.name] = results.all() | {"comparisons": comparisons(results)}
    return found
