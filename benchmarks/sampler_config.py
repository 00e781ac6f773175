"""Settings of benchmarks/sampler_speed.py, and what zero_shot.py shares with them; imports no torch."""

from dataclasses import dataclass

from fvdm.models.config import Backend

TASKS = ("generate", "image-to-video", "interpolate", "long")  # the paper's


@dataclass(frozen=True, kw_only=True)
class SampledClipsConfig:
    """The clips that are sampled.

    Attributes:
        frames: frames of a model of random weights.
        seed: of the first clip.
    """

    frames: int = 16
    seed: int = 0


@dataclass(frozen=True)
class SamplerSpeedConfig(SampledClipsConfig):
    """Solvers, and what they are measured on.

    Attributes:
        checkpoint: run or checkpoint; or random:SIZE for random weights.
        tasks: tasks that need no file of the user's.
        batch_sizes: clips at once.
        precisions: fp32 and bf16.
        attention: attention backends.
        solvers: words such as ddim:50; the whole table when not given.
        clips: clips of a measurement.
        repeats: how often they are sampled; the median counts.
        reference_steps: steps of DDIM that count as exact.
        guidance: of a class-conditional model; 1 is none.
        compile: compile the blocks, as the setting compile of a training run does.
        real: real videos or latent shards; FVD of as many clips is measured then.
        smoke: a tiny model and few steps; takes a minute on two CPU cores.
        out: folder for results and figures.
    """

    checkpoint: str = "random:XS/2"
    tasks: tuple[str, ...] = TASKS
    batch_sizes: tuple[int, ...] = (1, 4)
    precisions: tuple[str, ...] = ("fp32", "bf16")
    attention: tuple[Backend, ...] = ("auto",)
    solvers: tuple[str, ...] = ()
    clips: int = 4
    repeats: int = 3
    reference_steps: int = 1000
    guidance: float = 1.0
    compile: bool = False
    real: str = ""
    smoke: bool = False
    out: str = "sampler_speed"


SMOKE = SamplerSpeedConfig(
    checkpoint="random:T/2",
    frames=9,
    tasks=("generate", "image-to-video"),
    batch_sizes=(2,),
    precisions=("fp32",),
    clips=2,
    repeats=1,
    reference_steps=50,
    smoke=True,
)
