"""Image-to-video, interpolation and long video against the truth, with scalar-timestep baselines in the same run.

    python benchmarks/zero_shot.py --checkpoint runs/ffs_p02 --baseline runs/ffs_p0 --real ffs --clips 256
    python benchmarks/zero_shot.py --smoke

Real clips are cut; the frames that a task gives are given, the others are drawn, by

- held: the model with a timestep per frame, given frames held at t = 0;
- replacement, repaint: a model of one timestep per clip (--baseline, trained with p = 0), which is given the given
  frames at the noise level of the others; repaint repeats each step;
- frozen: the nearest given frame before (or the first), standing still: what a score is worth that it does not beat;
- vae: the truth through the VAE: the best that latents allow.

and are compared with what really happened: PSNR, SSIM, distance of I3D features, FVD. Long videos drift, so PSNR is
also shown over the frames. Classes are hidden from class-conditional models.
"""

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

if __package__ in (None, ""):  # run as a file: the folder above holds the packages
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.sampler_config import SampledClipsConfig
from fvdm import config as settings

if TYPE_CHECKING:
    from torch import Tensor

    from fvdm.evaluation.completion import Completion
    from fvdm.evaluation.i3d import I3D
    from fvdm.evaluation.protocols import Clip
    from fvdm.evaluation.sources import ClipSource
    from fvdm.generation.pipeline import Trained

TASKS = ("image-to-video", "interpolate", "long")


@dataclass(frozen=True)
class ZeroShotConfig(SampledClipsConfig):
    """Tasks with given frames, against the truth.

    Attributes:
        checkpoint: run or checkpoint of the model with a timestep per frame.
        baseline: run or checkpoint that was trained with p = 0, on the same data.
        real: real videos that neither was trained on, or latent shards.
        tasks: image-to-video, interpolate and long.
        clips: real clips.
        length: frames of the task long.
        stride: take every n-th frame; 0 takes the stride that the model was trained with.
        steps: sampling steps.
        solver: solver of the model with a timestep per frame; the baseline takes ddim.
        resamples: how often repaint takes each step.
        batch: clips at once.
        precision: of sampling; empty takes bf16 on a GPU.
        i3d: measure the distances of I3D features, and FVD.
        smoke: tiny models of random weights on made-up clips; takes a minute.
        out: folder for results and figures.
    """

    checkpoint: str = ""
    baseline: str = ""
    real: str = ""
    tasks: tuple[str, ...] = TASKS
    clips: int = 256
    length: int = 128
    stride: int = 0
    steps: int = 50
    solver: str = "ddim"
    resamples: int = 5
    batch: int = 4
    precision: Literal["", "bf16", "fp32"] = ""
    i3d: bool = True
    smoke: bool = False
    out: str = "zero_shot"


SMOKE = ZeroShotConfig(
    checkpoint="random:T/2", baseline="random:XS/2", frames=9, clips=2, steps=2, length=14, resamples=2, smoke=True
)


def methods(config: ZeroShotConfig) -> "list[Completion]":
    """All that are compared.

    Raises:
        ValueError: if a checkpoint cannot be used, or the two are not of the same data.
    """
    from benchmarks.models import open_model
    from fvdm.evaluation.completion import Completion
    from fvdm.evaluation.sources import shape

    def completion(name: str, trained: "Trained") -> "Completion":
        return Completion(name, trained, config.solver, config.steps, config.resamples)

    trained = open_model(config.checkpoint, config.precision, frames=config.frames)
    found = [completion("held", trained)]
    if config.baseline:
        other = open_model(config.baseline, config.precision, frames=config.frames)
        if (other.frame_size, other.model.config.frames) != (trained.frame_size, trained.model.config.frames):
            raise ValueError(
                f"{config.baseline} makes clips of {other.model.config.frames} frames of {shape(other.frame_size)}, "
                f"{config.checkpoint} of {trained.model.config.frames} of {shape(trained.frame_size)}: train them on "
                "the same data"
            )
        found += [completion(name, other) for name in ("replacement", "repaint")]
    return [*found, completion("frozen", trained), completion("vae", trained)]


class TaskScores:
    """One task: its real clips, and the scores of every method on them."""

    def __init__(self, task: str, trained: "Trained", source: "ClipSource", config: ZeroShotConfig) -> None:
        from fvdm.diffusion.tasks import given_frames
        from fvdm.evaluation.protocols import protocol, select_real
        from fvdm.evaluation.scores import drawn

        self.task, self.source, self.config = task, source, config
        window = trained.model.config.frames
        self.given = given_frames(task, window)
        self.frames = max(config.length, window) if task == "long" else window
        stride = config.stride or trained.stride
        self.clips = select_real(protocol("even"), source.lengths, self.frames, stride, config.clips)
        self.drawn = drawn(self.frames, self.given)

    def batches(self) -> "list[list[Clip]]":
        """The clips, a few at a time."""
        return [self.clips[k : k + self.config.batch] for k in range(0, len(self.clips), self.config.batch)]

    def score(self, method: "Completion", net: "I3D | None") -> "tuple[dict[str, Any], Tensor]":
        """Scores by name, each a number or a list over frames; and the first clips for the eye."""
        import torch

        from fvdm.evaluation import fvd
        from fvdm.evaluation.distances import quiet
        from fvdm.evaluation.scores import feature_distance, psnr, ssim

        by_frame: dict[str, list[Tensor]] = {"psnr": [], "ssim": []}
        pairs: list[tuple[Tensor, Tensor]] = []
        for number, clips in enumerate(self.batches()):
            truth = self.source.read(clips)
            first = self.config.seed + number * self.config.batch
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


def run_all(config: ZeroShotConfig) -> dict[str, dict[str, dict[str, Any]]]:
    """Task -> method -> scores; prints each, and writes an image of truth and outcomes for each task.

    Raises:
        ValueError: for a task, checkpoint or source that cannot be used.
    """
    import torch

    from fvdm.evaluation import fvd
    from fvdm.evaluation.i3d import MIN_FRAMES
    from fvdm.evaluation.sources import device, open_source, shape
    from fvdm.media.preprocess import one_spelling, sides
    from fvdm.media.writing import write_strips

    unknown = set(config.tasks) - set(TASKS)
    if unknown:
        raise ValueError(f"task {', '.join(sorted(unknown))} has no ground truth here; choose of {', '.join(TASKS)}")
    compared = methods(config)
    trained = compared[0].trained
    source = open_source(config.real, one_spelling(trained.frame_size))
    if sides(source.size) != trained.frame_size:
        raise ValueError(
            f"{config.real} holds clips of {shape(source.size)} pixels, the model makes {shape(trained.frame_size)}: "
            "encode at that size"
        )
    net = fvd.load_i3d(device=device()) if trained.model.config.frames >= MIN_FRAMES and config.i3d else None
    results: dict[str, dict[str, dict[str, Any]]] = {}
    out = Path(config.out)
    out.mkdir(parents=True, exist_ok=True)
    for task in config.tasks:
        scored = TaskScores(task, trained, source, config)
        results[task] = {}
        rows: list[Tensor] = []
        for method in compared:
            results[task][method.name], shown = scored.score(method, net)
            rows += [*([shown[0]] if not rows else []), shown[1]]
            numbers = {k: v for k, v in results[task][method.name].items() if not isinstance(v, list)}
            summary = "  ".join(f"{name} {value:8.3f}" for name, value in numbers.items())
            print(f"{task:<15} {method.name:<12} {summary}   ({len(scored.clips)} clips)", flush=True)
        results[task]["given"] = {"frames": list(scored.given), "drawn": scored.drawn, "clips": scored.clips}
        write_strips(torch.stack(rows), out / f"{task}.png", columns=12)
    return results


def figures(results: Mapping[str, Mapping[str, Mapping[str, Any]]], out: Path) -> dict[str, Path]:
    """Images of the outcomes, PSNR over the frames, and bars of every score."""
    from benchmarks.plots import bars, curves

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


def report(results: Mapping[str, Mapping[str, Mapping[str, Any]]], config: ZeroShotConfig) -> None:
    """Write results.json and the figures to `--out`, and report them to MLflow."""
    from benchmarks.reporting import BenchmarkReport, Data, send
    from fvdm.files import write_text
    from fvdm.tracking.tracker import run_of

    out = Path(config.out)
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
    found = BenchmarkReport(
        "zero_shot",
        f"zero-shot {Path(config.checkpoint).name}",
        metrics,
        {key: value for key, value in settings.flatten(config).items() if key != "out"},
        {
            "config": config.checkpoint,
            "baseline": config.baseline or "none",
            "model_run": run_of(Path(config.checkpoint)),
        },
        [out / "results.json"],
        figures(results, out),
        [Data(Path(config.real).name, config.real, "truth", taken)],
    )
    send(found, out)


def small(config: ZeroShotConfig) -> ZeroShotConfig:
    """The settings of `--smoke`, on clips that are made in the folder of the results."""
    from benchmarks.clips import smoke_clips

    return replace(SMOKE, real=str(smoke_clips(Path(config.out) / "data")))


def main(argv: Sequence[str] | None = None) -> None:
    """Command line."""
    try:
        config = settings.parse_small(ZeroShotConfig, argv, __doc__, small)
        if not (config.checkpoint and config.real):
            raise ValueError("give --checkpoint and --real: a trained model, and videos that it was not trained on")
        results = run_all(config)
    except ValueError as error:
        settings.fail(error)
    report(results, config)


if __name__ == "__main__":
    main()
