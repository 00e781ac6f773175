"""How fast the network trains, beside other networks of the same size, in one run on one machine.

    python benchmarks/train_speed.py --models S/2 B/2
    python benchmarks/train_speed.py --models S/2 --peer path/to/file.py:Class --memory
    python benchmarks/train_speed.py --models wan:1.3B --depth 2 --clip 5x16x30x52 --memory

Times forward, forward + backward, and a whole step (with AdamW and the EMA) on random latents. All subjects take turns,
round after round, so that whatever else the machine does hits all alike; the figures are medians, the ratios medians of
the rounds' ratios. Model-FLOPs utilisation is against the matrix rate measured in the same run.

Subjects: `fvdm` in each precision (weights in that precision, as the engine trains), with `--compile` also `compiled`,
the same network with the setting compile, `diffusers` (its LatteTransformer3DModel of the same width and depth; or its
WanTransformer3DModel with a timestep per token and weights in the same precision), and `--peer FILE.py:CLASS`, built as
`Class(width=, depth=, heads=, patch=, channels=, size=, frames=)` and called with `x (b f c h w), t (b f)`. Latte's
peers run in float32, and in bfloat16 under autocast.
"""

import statistics
import sys
from collections.abc import Sequence
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

if __package__ in (None, ""):  # run as a file: the folder above holds the packages
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from fvdm import config as settings
from fvdm.models.config import Backend

if TYPE_CHECKING:
    import torch

    from fvdm.models.config import BackboneConfig

Kind = Literal["forward", "forward+backward", "step"]


@dataclass(frozen=True)
class TrainSpeedConfig:
    """What is timed, and on which clips.

    Attributes:
        models: sizes and patches.
        depth: blocks, in place of the model's own number; 0 keeps that.
        clip: frames x channels x height x width of the latents.
        batch: clips at once.
        precisions: fp32 and bf16.
        kinds: what is timed.
        rounds: turns that every subject takes.
        attention: attention backend of ours.
        compile: time ours with compiled blocks, too.
        parity: compare the attention backends' results, too.
        diffusers: time the network of diffusers, too.
        peer: other networks.
        memory: measure the memory of a step, too.
        out: folder for the journal of the MLflow runs.
    """

    models: tuple[str, ...] = ("S/2",)
    depth: int = 0
    clip: str = "16x4x32x32"
    batch: int = 1
    precisions: tuple[Literal["fp32", "bf16"], ...] = ("fp32", "bf16")
    kinds: tuple[Kind, ...] = ("forward", "forward+backward", "step")
    rounds: int = 5
    attention: Backend = "auto"
    compile: bool = False
    parity: bool = False
    diffusers: bool = True
    peer: tuple[str, ...] = field(default=(), metadata={"metavar": "FILE.py:CLASS"})
    memory: bool = False
    out: str = "runs/benchmarks/train_speed"

    def __post_init__(self) -> None:
        """Raises ValueError for a setting out of its range."""
        settings.in_range(self, depth=(0, 10**4), batch=(1, 10**6), rounds=(1, 10**6))
        _ = self.shape

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """(f, c, h, w) of the latents.

        Raises:
            ValueError: `clip` is not of that form.
        """
        numbers = self.clip.split("x")
        if len(numbers) != 4 or not all(number.isdecimal() and int(number) for number in numbers):
            raise ValueError(f"--clip {self.clip}: give frames x channels x height x width, such as 16x4x32x32")
        f, c, h, w = map(int, numbers)
        return f, c, h, w


def measure(config: "BackboneConfig", options: TrainSpeedConfig, device: "torch.device") -> dict[str, float]:
    """Seconds, ratios to ours and utilisation, by name."""
    from benchmarks.train_subjects import OURS, Subject, matrix_rate, parity, peak_memory
    from fvdm.training.plan import flops

    ours = OURS if options.compile else OURS[:1]
    names = [*ours, *(["diffusers"] if options.diffusers else []), *options.peer]
    pairs: list[tuple[str, str]] = [(name, precision) for name in names for precision in options.precisions]
    subjects = {pair: Subject(pair[0], config, pair[1], options.batch, device) for pair in pairs}
    rates = {str(precision): matrix_rate(precision, device) for precision in options.precisions}
    times: dict[tuple[str, str, str], list[float]] = {}
    for round_ in range(options.rounds + 1):
        for (name, precision), subject in subjects.items():
            for timed in options.kinds:
                seconds = subject.seconds(timed)
                if round_:  # The first warms up.
                    times.setdefault((name, precision, timed), []).append(seconds)
    results: dict[str, float] = {f"matrix rate {p}, TFLOP/s": rate / 1e12 for p, rate in rates.items()}
    for (name, precision, kind), values in times.items():
        label = f"{Path(name).name} {precision} {kind}"
        results[f"{label}, s"] = statistics.median(values)
        if name in OURS:
            done = options.batch * flops(config, training=kind != "forward")
            results[f"{label}, MFU"] = done / statistics.median(values) / rates[precision]
        for own in ours[: ours.index(name)] if name in ours else ours:
            rounds = zip(values, times[own, precision, kind], strict=True)
            results[f"{label} / {own}"] = statistics.median(value / other for value, other in rounds)
    del subjects
    if options.parity:
        results |= parity(config, device)
    if options.memory:
        for name, precision in pairs:
            results[f"{Path(name).name} {precision}, GB of a step"] = (
                peak_memory(name, config, precision, options.batch, device) / 1e9
            )
    return results


def network(name: str, options: TrainSpeedConfig) -> "BackboneConfig":
    """The network of a size, for the clips and with the depth and attention of the settings.

    Raises:
        ValueError: there is no such network, or it does not take such clips.
    """
    from fvdm.models.loading import preset

    f, c, h, w = options.shape
    config = preset(name)
    config = config.fit((c, h, w), f, 0, learned_variance=not config.text_width)
    if h != w and not config.text_width:
        raise ValueError(f"--clip {options.clip}: frames are square")
    if config.text_width and (options.peer or options.parity):
        raise ValueError(f"{name} takes texts: leave out --peer and --parity, which give none")
    return replace(config, attention=options.attention, depth=options.depth or config.depth)


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, print, and log to MLflow."""
    try:
        words = settings.join_repeated(sys.argv[1:] if argv is None else argv, "peer")
        options = settings.parse(TrainSpeedConfig, words, __doc__)
        import torch

        from fvdm.tracking.config import TrackingConfig
        from fvdm.tracking.tracker import Tracker

        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        for name in options.models:
            figures = measure(network(name, options), options, device)
            print(f"{name}, {options.batch} x {options.clip}, {device}, {torch.get_num_threads()} threads")
            for label, value in figures.items():
                print(f"  {label:48s} {value:9.3f}")
            params = settings.flatten(options) | {"model": name, "device": str(device)}
            folder, tracking = Path(options.out) / name.replace("/", "-"), TrackingConfig(experiment="benchmarks")
            tracker = Tracker(folder, tracking, f"train_speed {name}", params, {})
            tracker.figures(figures)
            tracker.close()
    except ValueError as error:
        settings.fail(error)
    except BrokenProcessPool:
        settings.fail("a process that measures memory was killed: there is too little of it; take a smaller --batch")


if __name__ == "__main__":
    main()
