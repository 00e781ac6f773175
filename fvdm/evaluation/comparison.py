"""A Fréchet video distance from two sources to a number with its card: which clips, by which protocol, how sure."""

import math
import sys
import time
import warnings
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np

from fvdm.config import sides_of
from fvdm.distributed import Ranks
from fvdm.evaluation import fvd
from fvdm.evaluation.config import FVDConfig
from fvdm.evaluation.distances import bootstrap, extrapolate, floor, kernel_distance, quiet
from fvdm.evaluation.i3d import I3D, MIN_FRAMES
from fvdm.evaluation.measure import clip_features
from fvdm.evaluation.protocols import Clip, departures, pixels, protocol, select_fake, select_real
from fvdm.evaluation.sources import ClipSource, Samples, Shards, device, is_run, open_source
from fvdm.generation.prompts import read_prompts
from fvdm.media.preprocess import one_spelling, sides

LOG_EVERY = 30.0  # seconds between two lines in a log
TOO_SHORT = (
    f"the I3D halves time three times and then averages two steps, so that it needs {MIN_FRAMES} frames or more "
    "(repeated frames would change the distance)"
)
RESIZES = {
    "direct": "whole image to 224 x 224, bilinear, align_corners=False, no antialias",
    "short-side": "shorter side to 224, then centre, bilinear, align_corners=False, no antialias",
}


class Comparison:
    """One comparison of a real and a generated set: which clips, by which rules."""

    def __init__(self, config: FVDConfig, cache: dict[str, np.ndarray] | None = None) -> None:
        """Open both sources; `cache` keeps features of real clips from one measurement to the next.

        Raises:
            ValueError: if one cannot be opened, or a number is out of range.
        """
        for name, least in (("repeats", 0), ("clips", 0), ("real_stride", 0), ("chunk", 1)):
            if getattr(config, name) < least:
                raise ValueError(f"--{name.replace('_', '-')} is {getattr(config, name)}: give {least} or more")
        asked = one_spelling(sides_of(config.size))
        if min(sides(asked)) < 8:
            raise ValueError(f"--size is {config.size}: give 8 or more pixels")
        if config.frames < MIN_FRAMES:
            raise ValueError(f"--frames is {config.frames}: {TOO_SHORT}")
        self.config, self.rules = config, protocol(config.protocol)
        self.cache = {} if cache is None else cache
        self.repeats = config.repeats or self.rules.repeats
        self.seed = self.rules.seed if config.seed is None else config.seed
        self.usual = self.rules.stride_on(config.dataset)
        self.stride = config.real_stride or self.usual
        self.count = config.clips or self.rules.fake
        videos = self.count * self.repeats
        self.fake: ClipSource = (
            Samples(config.fake, config, frames=config.frames, num=videos, seed=self.seed)
            if is_run(config.fake)
            else open_source(config.fake, asked, config.fake_pattern, config.fake_split)
        )
        # Both sides at one size, or sharpness alone would tell them apart.
        size = self.fake.size if self.fake.generated else asked
        self.real = open_source(config.real, size, config.real_pattern, config.real_split or self.rules.split)
        if self.real.size != self.fake.size:
            smaller = min(self.real.size, self.fake.size, key=lambda side: math.prod(sides(side)))
            raise ValueError(
                f"real clips have {pixels(self.real.size)}, generated ones {pixels(self.fake.size)}: that alone would "
                f"tell them apart; give --size {'x'.join(map(str, sides(smaller)))}, or encode at one size"
            )
        if isinstance(self.fake, Samples) and self.fake.trained.text:
            self.fake.prompts, self.fake.origin = self._prompts()
        elif config.prompts:
            raise ValueError(f"--prompts {config.prompts}: {config.fake} takes no texts; leave the prompts out")

    def _prompts(self) -> tuple[list[str], str]:
        """The prompt of every sample, and where they are from: the real clips that it is compared with, or a file.

        Raises:
            ValueError: if there is none.
        """
        if self.config.prompts:
            given = read_prompts(self.config.prompts)
            return [given[k % len(given)] for k in range(self.count * self.repeats)], self.config.prompts
        found = [""] * (self.count * self.repeats)
        for draw in range(self.repeats):
            real, fake = self.clips(draw)
            for k, clip in enumerate(fake):
                captions = self.real.captions(real[k % len(real)].video)
                if not captions:
                    raise ValueError(
                        f"{self.config.fake} takes texts, and not every video of {self.config.real} has a caption: "
                        "write it into a text file beside the video, or name a file of prompts with --prompts"
                    )
                found[clip.video] = captions[0]
        return found, "the first caption of each real clip"

    @property
    def usable(self) -> int:
        """Real videos that are long enough."""
        return sum(length >= (self.config.frames - 1) * self.stride + 1 for length in self.real.lengths)

    def clips(self, draw: int) -> tuple[list[Clip], list[Clip]]:
        """Real and generated clips of the draw-th repetition; a checkpoint makes new ones for each.

        Raises:
            ValueError: if there are too few.
        """
        frames = self.config.frames
        fake = select_fake(self.rules, self.fake.lengths, frames, self.count)
        most = self.config.clips
        if self.rules.equal:
            most = min(len(fake), self.usable)
            fake = select_fake(self.rules, self.fake.lengths, frames, most)
        if self.fake.generated:
            fake = [Clip(draw * self.count + clip.video, clip.frames) for clip in fake]
        return select_real(self.rules, self.real.lengths, frames, self.stride, most, self.seed + draw), fake

    def features(
        self, net: I3D, pair: tuple[list[Clip], list[Clip]], group: Ranks, still: bool = False
    ) -> tuple[np.ndarray, np.ndarray]:
        """Features of real `(n 400)` and generated `(m 400)` clips. Collective."""
        key = repr((self.config.real, self.real.size, self.rules.resize, self.config.chunk, still, pair[0]))
        if key not in self.cache:
            self.cache[key] = self._side("real", net, self.real, pair[0], group, still)
        return self.cache[key], self._side("fake", net, self.fake, pair[1], group, still)

    def _side(
        self, name: str, net: I3D, source: ClipSource, clips: list[Clip], group: Ranks, still: bool
    ) -> np.ndarray:
        chunk = self.config.chunk
        shown = _progress(name, len(clips), chunk, group)
        return clip_features(
            net, source, clips, group, resize=self.rules.resize, chunk=chunk, still=still, progress=shown
        )

    def card(self, real: Sequence[Clip], fake: Sequence[Clip], detector: str) -> dict[str, str]:
        """All that the number depends on."""
        config, rules = self.config, self.rules
        sides = {"real": self.real.describe(), "fake": self.fake.describe()}
        size, shards = self.fake.size, self.real if isinstance(self.real, Shards) else None
        departed = departures(
            rules,
            clips=(len(real), len(fake)),
            frames=config.frames,
            size=size,
            stride=self.stride,
            usual=self.usual,
            videos=self.usable,
            repeats=self.repeats,
            seed=self.seed,
            split=shards.split if shards else "",
            decoded=shards is not None,
        )
        return {
            "protocol": f"{rules.name}: {rules.source}",
            "departs from it": "; ".join(departed) or f"nowhere, if the real videos are the split {rules.split}",
            **{f"{side} {key}": value for side, entries in sides.items() for key, value in entries.items()},
            "data set": config.dataset or "not named",
            "real clips": f"{len(real)}, one a video, {rules.order} order, offset {rules.offset}",
            "fake clips": f"{len(fake)}, the first frames of each",
            "frames": str(config.frames),
            "stride": f"real {self.stride}, fake 1",
            "frames/s": f"real {self.real.frame_rate(self.stride)}; fake {self.fake.frame_rate(1)}",
            "seed": f"{self.seed}, {self.repeats} draw(s), the k-th with seed + k",
            "resolution": f"real {pixels(self.real.size)}, fake {pixels(size)}",
            "second resize": RESIZES[rules.resize],
            "detector": f"I3D Kinetics-400 RGB, sha256 {detector}",
            "feature": "400 logits, averaged over time, before softmax; float32 network, float64 statistics",
            "covariance": f"divided by n - {rules.ddof}; trace of the root by singular values",
            "together": f"{config.chunk} clips go through the networks at once",
        }


def _progress(side: str, clips: int, chunk: int, group: Ranks) -> Callable[[int], None]:
    """Says how far the main rank's share has come: on a terminal after each piece, in a log now and then."""
    terminal, last = sys.stderr.isatty(), time.monotonic()

    def done(piece: int) -> None:
        nonlocal last
        count = min((piece + 1) * chunk, clips)
        if not group.is_main or not (terminal or time.monotonic() - last > LOG_EVERY):
            return
        last = time.monotonic()
        start, end = ("\r", "\n" if count == clips else "") if terminal else ("", "\n")
        print(f"{start}{side}: {count} of {clips} clips", end=end, file=sys.stderr, flush=True)

    return done


def measure(config: FVDConfig, group: Ranks, cache: dict[str, np.ndarray] | None = None) -> dict[str, Any]:
    """The distance and what stands beside it, on the main rank; nothing on the others. Collective.

    Args:
        config: what is compared, and by which rules.
        group: the ranks.
        cache: features of real clips, kept from one measurement to the next.

    Raises:
        ValueError: for sources or settings that cannot be used.
    """
    task = Comparison(config, cache)
    net = fvd.load_i3d(device=device())
    pairs = [task.clips(draw) for draw in range(task.repeats)]
    tables = [task.features(net, pair, group) for pair in pairs]
    still = task.features(net, pairs[0], group, still=True) if config.still else None
    if not group.is_main:
        return {}
    result = numbers(tables, task.rules.ddof, config.bootstrap, task.seed)
    if still:
        with quiet():
            result["still"] = fvd.frechet_distance(still[0], still[1], ddof=task.rules.ddof)
    real, fake = pairs[0]
    taken = {side: [(c.video, c.frames[0]) for c in clips] for side, clips in (("real", real), ("fake", fake))}
    step = task.fake.trained.step if isinstance(task.fake, Samples) else 0
    card = task.card(real, fake, net.sha256)
    return result | {"clips": len(fake), "clips_real": len(real), "step": step, "card": card, "taken": taken}


def numbers(
    tables: Sequence[tuple[np.ndarray, np.ndarray]], ddof: int, draws: int = 100, seed: int = 0
) -> dict[str, Any]:
    """All distances of real and generated features, each the mean over the repetitions.

    The interval lies around that mean and is as wide as one repetition's: the repetitions share their videos, so that
    their mean is surer than one of them, but nobody knows by rules much.

    Args:
        tables: real `(n 400)` and generated `(m 400)` of each repetition.
        ddof: see `frechet_distance`.
        draws: resamplings of the bootstrap; 0 is none.
        seed: of subsets.
    """
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        values = [fvd.frechet_distance(real, fake, ddof=ddof) for real, fake in tables]
    result: dict[str, Any] = {
        "fvd": float(np.mean(values)),
        "std": float(np.std(values, ddof=1)) if len(values) > 1 else 0.0,
        "values": values,
        "warning": str(caught[0].message) if caught else "",
        "kvd": float(np.mean([kernel_distance(real, fake) for real, fake in tables])),
    }
    if draws:
        result["low"], result["high"] = mean(bootstrap(*pair, ddof=ddof, draws=draws, seed=seed) for pair in tables)
    if min(map(len, tables[0])) >= 16:
        ends = mean(extrapolate(*pair, ddof=ddof, seed=seed) for pair in tables)
        result["infinity"], result["infinity_error"] = ends
    if len(tables[0][0]) >= 4:
        floors = [floor(*pair, ddof=ddof) for pair in tables]
        result["floor"] = dict(zip(floors[0], mean(found.values() for found in floors), strict=True))
    return result


def mean(rows: Iterable[Iterable[float]]) -> list[float]:
    """The means of columns."""
    return [float(value) for value in np.mean([list(row) for row in rows], axis=0)]


def lines(result: dict[str, Any]) -> list[str]:
    """The card and the numbers, for people."""
    width = max(map(len, result["card"]))
    text = [f"{key:<{width}}  {value}" for key, value in result["card"].items()]
    frames = result["card"]["frames"]
    text.append(
        f"\nFVD {result['fvd']:.2f} of {result['clips_real']} real and {result['clips']} generated clips of {frames}"
    )
    if len(result["values"]) > 1:
        text.append(f"  mean of {len(result['values'])} draws, standard deviation {result['std']:.2f}")
    if "low" in result:
        text.append(
            f"  with other clips of the same sources: {result['low']:.2f} to {result['high']:.2f} (95 %, bootstrap)"
        )
    if "infinity" in result:
        text.append(
            f"  extrapolated to infinitely many clips: {result['infinity']:.2f} +- {result['infinity_error']:.2f}"
        )
    if "floor" in result:
        at = result["floor"]
        text.append(
            f"  at {at['n']:.0f} clips a side: real against real {at['real_against_real']:.2f}, "
            f"generated against real {at['fake_against_real']:.2f}"
        )
    if "still" in result:
        text.append(f"  of still clips, their middle frames: {result['still']:.2f}")
    text.append(f"KVD {result['kvd']:.4g}")
    return [*text, f"note: {result['warning']}"] if result["warning"] else text


def metrics(result: dict[str, Any]) -> dict[str, float]:
    """The numbers as MLflow groups them."""
    card = result["card"]
    name = f"{card['protocol'].split(':')[0]}_{card['frames']}f"
    found = {f"fvd/{name}": result["fvd"], f"kvd/{name}": result["kvd"]}
    names = {"std": "std", "low": "low_95", "high": "high_95", "infinity": "infinity", "still": "still"}
    found |= {f"fvd/{name}_{shown}": result[key] for key, shown in names.items() if key in result}
    return found | {f"fvd_floor/{name}_{key}": value for key, value in result.get("floor", {}).items()}
