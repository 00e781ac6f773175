"""Checks a folder of latent shards and shows what is in it.

    python data_prep/inspect_shards.py DIR [--images DIR] [--videos DIR]

Verifies every checksum, prints a table, and writes contact_sheet.png (frames decoded from the latents, one
row per video) and reconstruction.png (a video's frames above their reconstruction, with its PSNR). Of clips (format 2)
it prints buckets, captions and the order of a run, and writes contact_sheet.html: decoded clips of every bucket with
their captions. Exit status: 0 all is well, 3 something is corrupt, 2 wrong usage.
"""

import hashlib
import json
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if __package__ in (None, ""):  # run as a file: the folder above holds the packages
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    from data_prep.installed import require_packages

    require_packages()

from data_prep.config import InspectConfig
from data_prep.job import exit_status
from fvdm import config as settings
from fvdm.data.format import ClipManifest

if TYPE_CHECKING:
    import numpy as np

    from fvdm.data.former import Manifest
    from fvdm.data.shards import LatentShards
    from fvdm.media.vae import VAE

PROG = "python data_prep/inspect_shards.py"
ROWS, COLUMNS = 8, 8  # of the contact sheet


def main(config: InspectConfig) -> int:
    """Runs the command; returns the exit status."""
    folder = Path(config.shards)
    problems = verify(folder)
    for problem in problems:
        print(f"CORRUPT {problem}", file=sys.stderr)
    if problems:
        return 3
    manifest = _manifest(folder)
    if isinstance(manifest, ClipManifest):
        from data_prep.inspect_clips import describe

        print(describe(folder, manifest, config.batch_size))
    else:
        print(table(folder, manifest))
    if not config.no_images:
        images = write_images(folder, manifest, config)
        if config.mlflow != "none":
            _log(folder, images, config)
    return 0


def _log(folder: Path, images: list[Path], config: InspectConfig) -> None:
    """Adds the images to the MLflow run of the encoding."""
    from data_prep.reporting import JOURNAL
    from fvdm.tracking.config import TrackingConfig
    from fvdm.tracking.tracker import Tracker

    tracking = TrackingConfig(config.mlflow, config.experiment)
    tracker = Tracker(folder / JOURNAL, tracking, f"encode {folder.resolve().name}", {}, {"kind": "encode"})
    for path in images:
        tracker.artifact(path)
    tracker.close()


def run(words: Sequence[str] | None = None) -> int:
    """The command with its words; prints user errors as one sentence, and returns the exit status."""
    return exit_status(lambda: main(settings.parse(InspectConfig, words, __doc__, ("shards",), PROG)))


def verify(folder: Path) -> list[str]:
    """Reads every byte of every shard; returns one line per problem.

    Raises:
        ValueError: the folder holds no shards, or shards of another format.
    """
    path = folder / "manifest.json"
    if not path.exists():
        raise ValueError(f"{str(folder)!r} has no manifest.json: is it a folder that encode_latents.py finished?")
    manifest = _manifest(folder)
    if isinstance(manifest, ClipManifest):
        from data_prep.inspect_clips import verify_clips

        return list(verify_clips(folder, manifest))
    problems = [line for shard in manifest.shards for line in _verify_shard(folder, manifest, shard.name)]
    if not problems:
        keys = Counter(key for split in _splits(manifest) for key in _open(folder, split).keys)
        problems = [f"the sample {key} is there {times} times" for key, times in keys.items() if times > 1]
    return problems


def _verify_shard(folder: Path, manifest: "Manifest", name: str) -> Iterator[str]:
    """Problems of one shard: its checksum, its index, and the numbers of every sample."""
    import numpy as np

    from data_prep.samples import file_sha256, index_tar
    from fvdm.data.former import index_name
    from fvdm.data.shards import to_float32

    info = next(shard for shard in manifest.shards if shard.name == name)
    path, index = folder / name, folder / index_name(name)
    for file, expected in ((path, info.sha256), (index, info.index_sha256)):
        if not file.exists():
            yield f"{file.name} is missing"
            return
        if file_sha256(file) != expected:
            yield f"{file.name} is not the file that was written (sha256 differs)"
            return
    rows = json.loads(index.read_bytes())["samples"]
    if rows != list(index_tar(path)) or len(rows) != info.samples:
        yield f"{name} and its index disagree"
        return
    c, h, w = manifest.latent_shape
    data = np.memmap(path, np.uint8, mode="r")
    for row in rows:
        starts = [row["moments"], row["flip"]] if manifest.flip else [row["moments"]]
        size = row["frames"] * 2 * c * h * w * 2
        arrays = [data[start : start + size].tobytes() for start in starts]
        if hashlib.sha256(b"".join(arrays)).hexdigest() != row["sha256"]:
            yield f"{name}: {row['source']!a} ({row['key']}) does not have its checksum"
        elif not all(np.isfinite(to_float32(array, manifest.dtype)).all() for array in arrays):
            yield f"{name}: {row['source']!a} ({row['key']}) has numbers that are not finite"


def table(folder: Path, manifest: "Manifest") -> str:
    """A table of the splits, and one of the classes, as text."""
    from fvdm.data.former import index_name

    lines = [
        f"{folder}: {manifest.size} px, latents {' x '.join(map(str, manifest.latent_shape))} as {manifest.dtype}"
        f"{', with flipped copies' if manifest.flip else ''}; VAE {manifest.vae} ({manifest.vae_identity}); "
        f"layout {manifest.layout}; {manifest.rejected} videos rejected",
        f"{'split':<8}{'shards':>8}{'videos':>10}{'frames':>12}{'hours':>9}{'classes':>9}{'MB':>10}",
    ]
    per_class: Counter[int] = Counter()
    for split in _splits(manifest):
        shards = [shard for shard in manifest.shards if shard.split == split]
        rows = [
            row for shard in shards for row in json.loads((folder / index_name(shard.name)).read_bytes())["samples"]
        ]
        labels = Counter(row["label"] for row in rows if row["label"] is not None)
        per_class += labels
        hours = sum(row["frames"] / row["fps"] for row in rows if row["fps"]) / 3600
        frames, size = sum(shard.frames for shard in shards), sum(shard.bytes for shard in shards)
        lines.append(
            f"{split:<8}{len(shards):>8}{len(rows):>10}{frames:>12}{hours:>9.2f}{len(labels):>9}{size / 1e6:>10.1f}"
        )
    lines += [f"  class {label:>4} {manifest.classes[label]!a}: {n} videos" for label, n in sorted(per_class.items())]
    return "\n".join(lines)


def write_images(folder: Path, manifest: "Manifest | ClipManifest", config: InspectConfig) -> list[Path]:
    """Writes the contact sheet and, if the videos are at hand, reconstruction.png; prints where, and the PSNR.

    Returns:
        what was written.

    Raises:
        ValueError: the VAE is not the one that made the shards.
    """
    import torch

    from fvdm.media.vae import load_vae

    to = Path(config.images or folder)
    shards = _open(folder, _splits(manifest)[0])
    vae = load_vae(config.vae or manifest.vae, device="cuda" if torch.cuda.is_available() else "cpu")
    shards.require(vae_identity=vae.identity)
    to.mkdir(parents=True, exist_ok=True)
    if isinstance(manifest, ClipManifest):
        from data_prep.inspect_clips import write_page

        path = write_page(folder, manifest, to, vae)
        print(f"{path}: clips of every bucket, decoded, with their captions")
        return [path]
    _contact_sheet(shards, vae, to / "contact_sheet.png")
    _reconstruction(config.videos or _videos(folder), shards, vae, to / "reconstruction.png")
    return [path for path in (to / "contact_sheet.png", to / "reconstruction.png") if path.exists()]


def _contact_sheet(shards: "LatentShards", vae: "VAE", path: Path) -> None:
    import numpy as np

    chosen = np.unique(np.linspace(0, len(shards) - 1, ROWS).round().astype(int))
    rows = [
        _decode(shards, vae, int(video), np.linspace(0, shards.frames[video] - 1, COLUMNS).astype(int))
        for video in chosen
    ]
    _save(rows, path)
    print(f"{path}: {len(chosen)} videos, from top to bottom " + ", ".join(ascii(shards.sources[v]) for v in chosen))


def _videos(folder: Path) -> str | None:
    """Where the videos were when they were encoded; None if the shards came without their plan."""
    from data_prep.planning import read_plan

    return read_plan(folder / "plan.json").videos if (folder / "plan.json").exists() else None


def _reconstruction(videos: str | None, shards: "LatentShards", vae: "VAE", path: Path) -> None:
    import numpy as np

    from fvdm.media.videos import Preprocess, VideoError, read_video

    if videos is None:
        print("no reconstruction.png: there is no plan.json (--videos says where the videos are)")
        return
    source = Path(videos) / shards.sources[0]
    try:
        preprocess = Preprocess.from_dict(shards.manifest.preprocess)
        chunks = [
            item for item in read_video(source, shards.manifest.size, preprocess, 16) if isinstance(item, np.ndarray)
        ]
    except VideoError as error:
        print(f"no reconstruction.png: {str(source)!a}: {error} (--videos says where the videos are)")
        return
    frames = np.linspace(0, shards.frames[0] - 1, COLUMNS).astype(int)
    real = np.concatenate(chunks)[frames]
    made = _decode(shards, vae, 0, frames)
    squared = np.square(real.astype(np.float64) - made).mean()
    _save([real, made], path)
    psnr = 10 * np.log10(255**2 / max(squared, 1e-12))
    print(f"{path}: {shards.sources[0]!a} above its reconstruction, PSNR {psnr:.2f} dB over {len(frames)} frames")


def _decode(shards: "LatentShards", vae: "VAE", video: int, frames: "np.ndarray") -> "np.ndarray":
    """Frames of a video decoded from the mean of its latents: uint8 (n 3 s s)."""
    import torch

    from fvdm.media.vae import sample_latents

    moments = torch.from_numpy(shards.read(video, frames))
    latents = sample_latents(moments, shards.normalisation, None)
    return vae.decode(latents).cpu().numpy()


def _save(rows: "list[np.ndarray]", path: Path) -> None:
    """Writes rows of uint8 (n 3 s s) frames as one image."""
    import numpy as np
    from PIL import Image

    from data_prep.shards import atomic

    grid = np.concatenate([np.concatenate(list(row), axis=2) for row in rows], axis=1)
    with atomic(path) as file:
        Image.fromarray(grid.transpose(1, 2, 0)).save(file, format="png")


def _manifest(folder: Path) -> "Manifest | ClipManifest":
    from fvdm.data.opening import read_manifest

    path = folder / "manifest.json"
    return read_manifest(path.read_bytes(), str(path))


def _splits(manifest: "Manifest | ClipManifest") -> list[str]:
    return sorted({shard.split for shard in manifest.shards})


def _open(folder: Path, split: str) -> "LatentShards":
    from fvdm.data.shards import LatentShards

    return LatentShards(folder, split)


if __name__ == "__main__":
    sys.exit(run())
