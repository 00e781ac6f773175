"""Image-to-video, interpolation and long video against the truth, with scalar-timestep baselines in the same run.

    python benchmarks/zero_shot.py --checkpoint runs/ffs_p02 --baseline runs/ffs_p0 --real ffs --clips 256
    python benchmarks/zero_shot.py --smoke

Real clips are cut; the frames that a task gives are given, the others are drawn, by

- held: the model with a timestep per frame, given frames held at t = 0;
- replacement, repaint: a model of one timestep per clip (--baseline, trained with p = 0), which is shown the given
  frames at the others' noise level; repaint repeats each step;
- frozen: the nearest given frame before (or the first), standing still: what a score is worth that it does not beat;
- vae: the truth through the VAE: the best that latents allow.

and are compared with what really happened: PSNR, SSIM, distance of I3D features, FVD. Long videos drift, so PSNR is
also shown over the frames. Classes are hidden from class-conditional models.
"""

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

if __package__ in (None, ""):  # run as a file: the folder above holds the packages
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from torch import Tensor

from benchmarks.models import open_model
from benchmarks.plots import bars, curves
from benchmarks.reporting import Data, Report, send
from benchmarks.smoke import smoke_clips
from fvdm.config import fail
from fvdm.diffusion.sampling import SamplerConfig
from fvdm.diffusion.solvers import solver
from fvdm.diffusion.tasks import given_frames, on_window
from fvdm.diffusion.timesteps import spaced
from fvdm.diffusion.video import place, sample_video
from fvdm.evaluation import fvd
from fvdm.evaluation.distances import quiet
from fvdm.evaluation.i3d import I3D, MIN_FRAMES
from fvdm.evaluation.protocols import Clip, protocol, select_real
from fvdm.evaluation.replacement import replacement
from fvdm.evaluation.scores import drawn, feature_distance, psnr, ssim
from fvdm.evaluation.sources import Source, device, open_source
from fvdm.files import write_text
from fvdm.generation.pipeline import Trained
from fvdm.media.writing import write_strips
from fvdm.tracking.tracker import run_of

TASKS = ("image-to-video", "interpolate", "long")


class Method:
    """Draws the frames of a task that are not given."""

    def __init__(self, name: str, trained: Trained, options: argparse.Namespace) -> None:
        self.name, self.trained, self.options = name, trained, options

    def __call__(self, task: str, truth: Tensor, given: Sequence[int], seeds: Sequence[int]) -> Tensor:
        """Videos, uint8 `(b f 3 h w)`, of the truth's shape; the task's given frames of it, in the first window."""
        if self.name == "frozen":
            return truth[:, [max((g for g in given if g <= k), default=given[0]) for k in range(truth.shape[1])]]
        trained, network = self.trained, self.trained.model.config
        vae = trained.vae
        if self.name == "vae":
            return vae.decode(vae.encode_mean(truth)).cpu()
        latents = place(vae.encode_mean(truth[:, list(given)]), given, network.frames)
        y = trained.model.null(len(truth))
        length, options = truth.shape[1], self.options
        if self.name == "held":
            sampler = SamplerConfig(solver(options.solver))
            levels = spaced(sampler.solver.spacing, options.steps, trained.diffusion.noise_levels())
            schedule = on_window(task, levels, network.frames, length).schedule
            made = sample_video(trained.model, trained.diffusion, latents, schedule, seeds, sampler, y)
        else:
            repeats = options.resamples if self.name == "repaint" else 1
            made = replacement(
                trained.model, trained.diffusion, latents, given, seeds, options.steps, repeats, length, y
            )
        return vae.decode(made).cpu()


def methods(options: argparse.Namespace) -> list[Method]:
    """All that are compared.

    Raises:
        ValueError: if a checkpoint cannot be used, or the two are not of the same data.
    """
    trained = open_model(options.checkpoint, options.precision, frames=options.frames)
    found = [Method("held", trained, options)]
    if options.baseline:
        other = open_model(options.baseline, options.precision, frames=options.frames)
        if (other.size, other.model.config.frames) != (trained.size, trained.model.config.frames):
            raise ValueError(
                f"{options.baseline} makes clips of {other.model.config.frames} frames of {other.size} pixels, "
                f"{options.checkpoint} of {trained.model.config.frames} of {trained.size}: train them on the same data"
            )
        found += [Method(name, other, options) for name in ("replacement", "repaint")]
    return [*found, Method("frozen", trained, options), Method("vae", trained, options)]


class Bench:
    """One task: its real clips, and the scores of every method on them."""

    def __init__(self, task: str, trained: Trained, source: Source, options: argparse.Namespace) -> None:
        self.task, self.source, self.options = task, source, options
        window = trained.model.config.frames
        self.given = given_frames(task, window)
        self.frames = max(options.length, window) if task == "long" else window
        stride = options.stride or trained.stride
        self.clips = select_real(protocol("even"), source.lengths, self.frames, stride, options.clips)
        self.drawn = drawn(self.frames, self.given)

    def batches(self) -> list[list[Clip]]:
        """The clips, a few at a time."""
        return [self.clips[k : k + self.options.batch] for k in range(0, len(self.clips), self.options.batch)]

    def score(self, method: Method, net: I3D | None) -> tuple[dict[str, Any], Tensor]:
        """Scores by name, each a number or a list over frames; and the first clips for the eye."""
        by_frame: dict[str, list[Tensor]] = {"psnr": [], "ssim": []}
        pairs: list[tuple[Tensor, Tensor]] = []
        for number, clips in enumerate(self.batches()):
            truth = self.source.read(clips)
            first = self.options.seed + number * self.options.batch
            made = method(self.task, truth, self.given, range(first, first + len(clips)))
            for name, function in (("psnr", psnr), ("ssim", ssim)):
                by_frame[name].append(function(made[:, self.drawn], truth[:, self.drawn]))
            if net is not None:
                pairs.append((fvd.features(net, made), fvd.features(net, truth)))
            if number == 0:
                shown = torch.stack([truth[0], made[0]])
        result: dict[str, Any] = {}
        for name, values in by_frame.items():
            mean = torch.cat(values).mean(0)  # (f)
            result |= {name: float(mean.mean()), f"{name}_by_frame": mean.tolist()}
        if pairs:
            a, b = (torch.cat(side) for side in zip(*pairs, strict=True))
            result["i3d_distance"] = float(feature_distance(a, b).mean())
            with quiet():
                result["fvd"] = fvd.frechet_distance(b, a)
        return result, shown


def run_all(options: argparse.Namespace) -> dict[str, dict[str, dict[str, Any]]]:
    """Task -> method -> scores; prints each, and writes a picture of truth and outcomes for each task.

    Raises:
        ValueError: for a task, checkpoint or source that cannot be used.
    """
    unknown = set(options.tasks) - set(TASKS)
    if unknown:
        raise ValueError(f"task {', '.join(sorted(unknown))} has no ground truth here; choose of {', '.join(TASKS)}")
    compared = methods(options)
    trained = compared[0].trained
    source = open_source(options.real, trained.size)
    if source.size != trained.size:
        raise ValueError(
            f"{options.real} holds {source.size} pixels, the model makes {trained.size}: encode at that size"
        )
    net = fvd.load_i3d(device=device()) if trained.model.config.frames >= MIN_FRAMES and not options.no_i3d else None
    results: dict[str, dict[str, dict[str, Any]]] = {}
    out = Path(options.out)
    out.mkdir(parents=True, exist_ok=True)
    for task in options.tasks:
        bench = Bench(task, trained, source, options)
        results[task] = {}
        rows: list[Tensor] = []
        for method in compared:
            results[task][method.name], shown = bench.score(method, net)
            rows += [*([shown[0]] if not rows else []), shown[1]]
            numbers = {k: v for k, v in results[task][method.name].items() if not isinstance(v, list)}
            told = "  ".join(f"{name} {value:8.3f}" for name, value in numbers.items())
            print(f"{task:<15} {method.name:<12} {told}   ({len(bench.clips)} clips)", flush=True)
        results[task]["given"] = {"frames": list(bench.given), "drawn": bench.drawn, "clips": bench.clips}
        write_strips(torch.stack(rows), out / f"{task}.png", columns=12)
    return results


def figures(results: Mapping[str, Mapping[str, Mapping[str, Any]]], out: Path) -> dict[str, Path]:
    """Pictures of the outcomes, PSNR over the frames, and bars of every score."""
    images: dict[str, Path] = {}
    for task, entry in results.items():
        images[f"{task}_frames"] = out / f"{task}.png"
        series = {
            name: list(zip(map(float, entry["given"]["drawn"]), scores["psnr_by_frame"], strict=True))
            for name, scores in entry.items()
            if name != "given"
        }
        title = f"{task}: frames that were drawn"
        images[f"{task}_psnr"] = curves(series, out / f"{task}_psnr.png", title, "frame", "PSNR, dB")
    for score in ("psnr", "ssim", "i3d_distance", "fvd"):
        values = {
            task: {name: scores[score] for name, scores in entry.items() if score in scores}
            for task, entry in results.items()
        }
        if all(values.values()):
            images[score] = bars(values, out / f"{score}.png", f"{score} against the truth", score)
    return images


def report(results: Mapping[str, Mapping[str, Mapping[str, Any]]], options: argparse.Namespace) -> None:
    """Write results.json and the figures to `--out`, and report them to MLflow."""
    out = Path(options.out)
    write_text(out / "results.json", json.dumps(results, indent=1))
    metrics: list[tuple[int, dict[str, float]]] = []
    for task, entry in results.items():
        for name, scores in entry.items():
            if name != "given":
                numbers = {f"{task}/{k}_{name}": v for k, v in scores.items() if not isinstance(v, list)}
                metrics.append((0, numbers))
                for frame, value in zip(entry["given"]["drawn"], scores["psnr_by_frame"], strict=True):
                    metrics.append((frame, {f"{task}/psnr_by_frame_{name}": value}))
    taken = [(task, clip) for task, entry in results.items() for clip in entry["given"]["clips"]]
    found = Report(
        "zero_shot",
        f"zero-shot {Path(options.checkpoint).name}",
        metrics,
        {key: value for key, value in vars(options).items() if key != "out"},
        {
            "config": options.checkpoint,
            "baseline": options.baseline or "none",
            "model_run": run_of(Path(options.checkpoint)),
        },
        [out / "results.json"],
        figures(results, out),
        [Data(Path(options.real).name, options.real, "truth", taken)],
    )
    send(found, out)


def arguments() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--checkpoint", default="", help="run or checkpoint of the model with a timestep per frame")
    add("--baseline", default="", help="run or checkpoint that was trained with p = 0, on the same data")
    add("--real", default="", help="real videos that neither was trained on, or latent shards")
    add("--tasks", nargs="+", default=list(TASKS), help=f"{', '.join(TASKS)} [all]")
    add("--clips", type=int, default=256, help="real clips [256]")
    add("--length", type=int, default=128, help="frames of the task long [128]")
    add("--stride", type=int, default=0, help="take every so-many-th frame [as the model was trained]")
    add("--frames", type=int, default=16, help="frames of a model of random weights [16]")
    add("--steps", type=int, default=50, help="sampling steps [50]")
    add("--solver", default="ddim", help="of the model with a timestep per frame; the baseline takes ddim [ddim]")
    add("--resamples", type=int, default=5, help="times that repaint takes each step [5]")
    add("--batch", type=int, default=4, help="clips at once [4]")
    add("--precision", default="", choices=["", "bf16", "fp32"], help="[bf16 on a GPU]")
    add("--seed", type=int, default=0, help="of the first clip [0]")
    add("--no-i3d", action="store_true", help="leave out the distances of I3D features, and FVD")
    add("--smoke", action="store_true", help="tiny models of random weights on clips that are made: a minute")
    add("--out", default="zero_shot", help="folder for results and figures [zero_shot]")
    return parser


def main(words: Sequence[str] | None = None) -> None:
    """Command line."""
    parser = arguments()
    options = parser.parse_args(words)
    try:
        if options.smoke:
            small = {"checkpoint": "random:T/2", "baseline": "random:XS/2", "frames": 9, "clips": 2, "steps": 2}
            small |= {"length": 14, "resamples": 2, "real": str(smoke_clips(Path(options.out) / "data"))}
            parser.set_defaults(**small)
            options = parser.parse_args(words)
        if not (options.checkpoint and options.real):
            raise ValueError("--checkpoint and --real are wanted: a trained model, and videos it was not trained on")
        results = run_all(options)
    except ValueError as error:
        fail(error)
    report(results, options)


if __name__ == "__main__":
    main()
