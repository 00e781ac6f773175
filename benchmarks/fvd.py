"""Fréchet video distance by a published protocol, with all it depends on, logged to MLflow.

    python benchmarks/fvd.py --real DIR --fake DIR
    python benchmarks/fvd.py --protocol latte --dataset taichi --real latents/taichi --fake runs/taichi_xl --steps 250
    torchrun --nproc-per-node 8 benchmarks/fvd.py --real ffs --fake runs/ffs_xl --frames 128

--real and --fake each take a folder of videos or of frame folders, latent shards, or (--fake) a run or checkpoint,
which is sampled on the fly. The same command gives the same digits on any number of ranks. docs/fvd.md explains the
protocols, the card that is printed, and the pitfalls.
"""

import argparse
import json
import sys
import warnings
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

if __package__ in (None, ""):  # run as a file: the folder above holds the packages
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np

from benchmarks.reporting import Data, Report, send
from fvdm.config import fail
from fvdm.distributed import Ranks
from fvdm.evaluation import fvd
from fvdm.evaluation.distances import bootstrap, extrapolate, floor, kernel_distance, quiet
from fvdm.evaluation.i3d import I3D
from fvdm.evaluation.measure import clip_features, ranks
from fvdm.evaluation.protocols import PROTOCOLS, Clip, departures, protocol, select_fake, select_real
from fvdm.evaluation.sources import Sampled, Samples, Shards, Source, device, open_source
from fvdm.files import write_text
from fvdm.tracking.tracker import run_of

RESIZES = {
    "direct": "whole picture to 224 x 224, bilinear, align_corners=False, no antialias",
    "short-side": "shorter side to 224, then centre, bilinear, align_corners=False, no antialias",
}


class Measurement:
    """One comparison of a real and a generated set: which clips, by which rules."""

    def __init__(self, options: argparse.Namespace, known: dict[str, np.ndarray] | None = None) -> None:
        """Open both sources; `known` keeps features of real clips from one measurement to the next.

        Raises:
            ValueError: if one cannot be opened, or a number is out of range.
        """
        for name, least in (("frames", 9), ("repeats", 0), ("clips", 0), ("real_stride", 0), ("chunk", 1), ("size", 8)):
            if getattr(options, name) < least:
                raise ValueError(f"--{name.replace('_', '-')} is {getattr(options, name)}: give {least} or more")
        self.options, self.how = options, protocol(options.protocol)
        self.known = {} if known is None else known
        self.repeats = options.repeats or self.how.repeats
        self.seed = self.how.seed if options.seed is None else options.seed
        self.usual = self.how.stride_on(options.dataset)
        self.stride = options.real_stride or self.usual
        self.wanted = options.clips or self.how.fake
        sampling = Sampled(
            options.frames,
            self.wanted * self.repeats,
            self.seed,
            options.steps,
            options.solver,
            options.guidance,
            options.weights,
            options.vae,
            options.precision,
        )
        self.fake = open_source(options.fake, options.size, options.fake_pattern, options.fake_split, sampling)
        # Both sides at one size, or sharpness alone would tell them apart.
        size = self.fake.size if self.fake.generated else options.size
        self.real = open_source(options.real, size, options.real_pattern, options.real_split or self.how.split)
        if self.real.size != self.fake.size:
            raise ValueError(
                f"real clips have {self.real.size} pixels, generated ones {self.fake.size}: sharpness would tell them "
                f"apart; give --size {min(self.real.size, self.fake.size)}, or encode at one size"
            )

    @property
    def usable(self) -> int:
        """Real videos that are long enough."""
        return sum(length >= (self.options.frames - 1) * self.stride + 1 for length in self.real.lengths)

    def clips(self, draw: int) -> tuple[list[Clip], list[Clip]]:
        """Real and generated clips of the draw-th repetition; a checkpoint makes new ones for each.

        Raises:
            ValueError: if there are too few.
        """
        frames = self.options.frames
        fake = select_fake(self.how, self.fake.lengths, frames, self.wanted)
        most = self.options.clips
        if self.how.equal:
            most = min(len(fake), self.usable)
            fake = select_fake(self.how, self.fake.lengths, frames, most)
        if self.fake.generated:
            fake = [Clip(draw * self.wanted + clip.video, clip.frames) for clip in fake]
        return select_real(self.how, self.real.lengths, frames, self.stride, most, self.seed + draw), fake

    def features(
        self, net: I3D, pair: tuple[list[Clip], list[Clip]], group: Ranks, still: bool = False
    ) -> tuple[np.ndarray, np.ndarray]:
        """Features of real `(n 400)` and generated `(m 400)` clips. Collective."""
        key = repr((self.options.real, self.real.size, self.how.resize, self.options.chunk, still, pair[0]))
        if key not in self.known:
            self.known[key] = self._side("real", net, self.real, pair[0], group, still)
        return self.known[key], self._side("fake", net, self.fake, pair[1], group, still)

    def _side(self, name: str, net: I3D, source: Source, clips: list[Clip], group: Ranks, still: bool) -> np.ndarray:
        chunk = self.options.chunk
        shown = _progress(name, len(clips), chunk, group)
        return clip_features(
            net, source, clips, group, resize=self.how.resize, chunk=chunk, still=still, progress=shown
        )

    def card(self, real: Sequence[Clip], fake: Sequence[Clip], detector: str) -> dict[str, str]:
        """All that the number depends on."""
        options, how = self.options, self.how
        sides = {"real": self.real.describe(), "fake": self.fake.describe()}
        size, shards = self.fake.size, self.real if isinstance(self.real, Shards) else None
        departed = departures(
            how,
            clips=(len(real), len(fake)),
            frames=options.frames,
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
            "protocol": f"{how.name}: {how.source}",
            "departs from it": "; ".join(departed) or f"nowhere, if the real videos are the split {how.split}",
            **{f"{side} {key}": value for side, entries in sides.items() for key, value in entries.items()},
            "data set": options.dataset or "not named",
            "real clips": f"{len(real)}, one a video, {how.order} order, offset {how.offset}",
            "fake clips": f"{len(fake)}, the first frames of each",
            "frames": str(options.frames),
            "stride": f"real {self.stride}, fake 1",
            "seed": f"{self.seed}, {self.repeats} draw(s), the k-th with seed + k",
            "resolution": f"real {self.real.size}, fake {size} pixels",
            "second resize": RESIZES[how.resize],
            "detector": f"I3D Kinetics-400 RGB, sha256 {detector}",
            "feature": "400 logits, averaged over time, before softmax; float32 network, float64 statistics",
            "covariance": f"divided by n - {how.ddof}; trace of the root by singular values",
            "together": f"{options.chunk} clips go through the networks at once",
        }


def _progress(side: str, clips: int, chunk: int, group: Ranks) -> Callable[[int], None]:
    """Says on a terminal how far the main rank's share has come."""
    shown = group.is_main and sys.stderr.isatty()

    def done(piece: int) -> None:
        if shown:
            print(f"\r{side}: {min((piece + 1) * chunk, clips)} of {clips} clips", end="", file=sys.stderr, flush=True)

    return done


def measure(options: argparse.Namespace, group: Ranks, known: dict[str, np.ndarray] | None = None) -> dict[str, Any]:
    """The distance and what stands beside it, on the main rank; nothing on the others. Collective.

    Args:
        options: as `arguments` gives them.
        group: the ranks.
        known: features of real clips, kept from one measurement to the next.

    Raises:
        ValueError: for sources or settings that cannot be used.
    """
    task = Measurement(options, known)
    net = fvd.load_i3d(device=device())
    pairs = [task.clips(draw) for draw in range(task.repeats)]
    tables = [task.features(net, pair, group) for pair in pairs]
    still = task.features(net, pairs[0], group, still=True) if options.still else None
    if not group.is_main:
        return {}
    result = numbers(tables, task.how.ddof, options.bootstrap, task.seed)
    if still:
        with quiet():
            result["still"] = fvd.frechet_distance(still[0], still[1], ddof=task.how.ddof)
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
    their mean is surer than one of them, but nobody knows by how much.

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


def report(result: dict[str, Any], options: argparse.Namespace) -> None:
    """Write fvd.json and the card to `--out`, and report them to MLflow."""
    out = Path(options.out)
    out.mkdir(parents=True, exist_ok=True)
    write_text(out / "fvd.json", json.dumps(result, indent=1))
    write_text(out / "card.txt", "\n".join(lines(result)) + "\n")
    card = result["card"]
    name = card["protocol"].split(":")[0]
    sides = (("real", options.real), ("fake", options.fake))
    found = Report(
        "fvd",
        f"fvd {name} {options.frames}f {Path(options.fake).name}",
        [(result["step"], metrics(result))],
        {key.replace(" ", "_"): value for key, value in card.items()},
        {"protocol": name, "config": card.get("fake checkpoint", options.fake)},
        [out / "fvd.json", out / "card.txt"],
        data=[Data(Path(path).name, path, side, result["taken"][side]) for side, path in sides],
    )
    send(found, out, run_id=run_of(Path(options.run or options.fake)))


def arguments() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--real", required=True, help="real videos, frame folders or latent shards")
    add("--fake", required=True, help="generated videos, frame folders or latent shards; or a run or checkpoint")
    add("--protocol", default="styleganv", help=f"{', '.join(PROTOCOLS)} [styleganv]")
    add("--dataset", default="", help="name of the data set, where a protocol treats it in its own way: taichi")
    add("--frames", type=int, default=16, help="frames of a clip; published are 16 and 128 [16]")
    add("--clips", type=int, default=0, help="most clips of either side [the protocol's]")
    add("--real-stride", type=int, default=0, help="take every so-many-th frame of real videos [the protocol's]")
    add("--repeats", type=int, default=0, help="draws of the clips, whose mean is taken [the protocol's]")
    add("--seed", type=int, help="of the choice of clips, and of the first sample [the protocol's]")
    add("--size", type=int, default=256, help="pixels at which videos are read [256; a checkpoint has its own]")
    add("--real-pattern", default="*", help="which of the real videos, by name [*]")
    add("--fake-pattern", default="*", help="which of the generated videos, by name [*]")
    add("--real-split", default="", help="split of real latent shards [the protocol's]")
    add("--fake-split", default="train", help="split of generated latent shards [train]")
    add("--steps", type=int, default=50, help="sampling steps of a checkpoint [50]")
    add("--solver", default="ddim", help="solver of a checkpoint [ddim]")
    add("--guidance", type=float, default=1.0, help="guidance of a class-conditional checkpoint [1, none]")
    add("--weights", default="ema", choices=["ema", "model"], help="weights of a checkpoint [ema]")
    add("--vae", default="", help="VAE of a checkpoint [the one it was trained with]")
    add("--precision", default="", choices=["", "bf16", "fp32"], help="of sampling [bf16 on a GPU]")
    add("--still", action="store_true", help="also compare the middle frames alone, as still clips")
    add("--bootstrap", type=int, default=100, help="resamplings behind the interval; 0 is none [100]")
    add("--chunk", type=int, default=4, help="clips that go through the networks at once [4]")
    add("--run", default="", help="folder of the training run whose MLflow run gets the result [that of --fake]")
    add("--out", default="fvd", help="folder for the result [fvd]")
    return parser


def main(words: Sequence[str] | None = None) -> None:
    """Command line."""
    options = arguments().parse_args(words)
    try:
        with ranks() as group:
            result = measure(options, group)
            main_rank = group.is_main
    except ValueError as error:
        fail(error)
    if main_rank:
        print("\n".join(lines(result)))
        report(result, options)


if __name__ == "__main__":
    main()
