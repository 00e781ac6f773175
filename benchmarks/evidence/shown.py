"""The arms of benchmarks/evidence.py side by side, as images and as videos."""

from pathlib import Path

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from benchmarks.evidence.measure import Bench
from benchmarks.evidence.plan import Trial, trials
from fvdm.media.writing import write_mp4, write_strips

ZOOM = 64  # pixels of a frame in the images, at least
COLUMNS = 8


def side_by_side(bench: Bench, out: Path) -> dict[str, Path]:
    """For each task an image (a row for each arm, the truth on top) and a video (the same clips in a row each).

    Args:
        bench: the set.
        out: folder for the files.

    Returns:
        Files by name.
    """
    images: dict[str, Path] = {}
    for task in ("generate", *bench.config.tasks):
        found = [trial for trial in trials(bench.name, bench.config) if trial.task == task and _is_shown(bench, trial)]
        if not found:
            continue
        rows = [torch.from_numpy(bench.read(trial)["shown"]) for trial in found]
        if task != "generate":
            rows = [torch.from_numpy(bench.read(found[0])["shown_truth"]), *rows]
        count = min(2, *(len(row) for row in rows)) if len(rows) > 1 else 1
        frames = min(row.shape[1] for row in rows)
        zoomed = [_zoom(row[:count, :frames]) for row in rows]
        name = f"{bench.name}_{task}"
        images[name] = out / f"{name}.png"
        write_strips(torch.cat([row[k, None] for k in range(count) for row in zoomed]), images[name], COLUMNS)
        images[f"{name}_video"] = out / f"{name}.mp4"
        grid = rearrange(torch.stack(zoomed), "r b f c h w -> f c (b h) (r w)")
        write_mp4(grid, images[f"{name}_video"])
    return images


def _is_shown(bench: Bench, trial: Trial) -> bool:
    """One row for each arm: those of the first seed, with the sampler that all share; and real clips."""
    first = trial.arm is None or trial.arm.seed == bench.config.seeds[0]
    shared = trial.sampler in ("", bench.config.samplers[0])
    return first and shared and trial.method not in ("train", "vae", "frozen") and bench.done(trial)


def _zoom(video: Tensor) -> Tensor:
    """Clips `(b f c h w)`, each pixel a square, wide enough for the eye."""
    factor = -(-ZOOM // video.shape[-1])
    flat = F.interpolate(video.flatten(0, 1), scale_factor=factor, mode="nearest")
    return flat.unflatten(0, video.shape[:2])
