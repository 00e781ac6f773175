"""Fréchet video distance between two folders of videos, logged to MLflow.

    python benchmarks/fvd.py --real demo/clips --fake runs/demo/samples

Every video gives one clip: its first `--frames` frames, at `--size` pixels. The first `--clips` videos in sorted order
are taken on either side.
"""

import argparse
import json
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fvdm import fvd
from fvdm.config import fail
from fvdm.generate import read_frames
from fvdm.tracking import Tracker, TrackingConfig

SUFFIXES = {".mp4", ".avi", ".gif", ".mkv", ".webm"}


def videos(folder: Path, pattern: str, count: int) -> list[Path]:
    """The first `count` videos of a folder, sorted by name.

    Raises:
        ValueError: if there are fewer than two.
    """
    found = [path for path in sorted(folder.glob(pattern)) if path.suffix.lower() in SUFFIXES]
    if len(found) < 2:
        raise ValueError(f"{folder} holds {len(found)} videos named {pattern}; FVD compares two sets of videos")
    return found[:count]


def clips(paths: list[Path], frames: int, size: int, stride: int) -> Tensor:
    """uint8 `(b frames 3 size size)`: every stride-th frame of each video from its first.

    Raises:
        ValueError: if a video is too short or cannot be read.
    """
    out = []
    for path in paths:
        video = read_frames(str(path), size)[: frames * stride : stride]
        if len(video) < frames:
            raise ValueError(f"{path} has too few frames for a clip of {frames} at stride {stride}; lower --frames")
        out.append(video)
    return torch.stack(out)


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """The distance, and everything that it depends on.

    Raises:
        ValueError: for folders or videos that cannot be used.
    """
    real = videos(Path(options.real), options.real_pattern, options.clips)
    fake = videos(Path(options.fake), options.fake_pattern, options.clips)
    count = min(len(real), len(fake))
    # Evenly over the sorted names, so that a smaller set still covers every source.
    real, fake = ([paths[k * len(paths) // count] for k in range(count)] for paths in (real, fake))
    device = "cuda" if torch.cuda.is_available() else "cpu"
    net = fvd.load_i3d(device=device)
    real_features, fake_features = (
        fvd.features(net, clips(paths, options.frames, options.size, stride))
        for paths, stride in ((real, options.real_stride), (fake, 1))
    )
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        distance = fvd.frechet_distance(real_features, fake_features)
    return {
        "fvd": distance,
        "warning": str(caught[0].message) if caught else "",
        "real": options.real,
        "fake": options.fake,
        "clips": count,
        "frames": options.frames,
        "stride_real": options.real_stride,
        "size": options.size,
        "resize": "bilinear to 224, whole picture",
        "detector": f"I3D Kinetics-400 RGB, sha256 {net.sha256[:16]}",
        "feature": "400 logits, averaged over time",
        "covariance": "divided by n",
    }


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--real", required=True, help="folder of real videos")
    parser.add_argument("--fake", required=True, help="folder of generated videos")
    parser.add_argument("--real-pattern", default="*", help="which of the real videos")
    parser.add_argument("--fake-pattern", default="*", help="which of the generated videos")
    parser.add_argument("--clips", type=int, default=fvd.COMPARABLE, help="most clips of either side")
    parser.add_argument("--frames", type=int, default=16, help="frames of a clip")
    parser.add_argument("--real-stride", type=int, default=1, help="take every so-many-th frame of the real videos")
    parser.add_argument("--size", type=int, default=128, help="pixels at which the videos are compared")
    parser.add_argument("--run", default="", help="folder of the training run whose MLflow run gets the result")
    parser.add_argument("--out", default="fvd", help="folder for the result")
    options = parser.parse_args()
    try:
        result = measure(options)
    except ValueError as error:
        fail(error)
    out = Path(options.out)
    out.mkdir(parents=True, exist_ok=True)
    (out / "fvd.json").write_text(json.dumps(result, indent=1))
    known = Path(options.run) / "tracking.json"
    run_id = json.loads(known.read_text()).get("run_id", "") if options.run and known.is_file() else ""
    tracker = Tracker(
        out / ".tracking",
        TrackingConfig(system_metrics=False),
        "fvd",
        {k: v for k, v in result.items() if k != "fvd"},
        {"kind": "fvd"},
        into=run_id,
    )
    tracker.metrics({"fvd": result["fvd"]}, 0)
    tracker.artifact(out / "fvd.json", "fvd")
    tracker.close()
    print(f"FVD {result['fvd']:.1f} of {result['clips']} against {result['clips']} clips of {options.frames} frames")
    if result["warning"]:
        print(f"note: {result['warning']}")


if __name__ == "__main__":
    main()
