"""How fast the loader delivers clips, against decoding videos in the training loop and against the disk.

    python benchmarks/loader_speed.py --videos DIR --shards DIR

Numbers, logged to MLflow, for clips of 16 frames at stride 3:

- decode: clips/s of a DataLoader that opens a video file, decodes it up to the clip's last frame, crops and scales,
  as Latte's training loop does (its VAE then has to encode them; that is not counted here);
- loader: clips/s of fvdm.data.loader.batches over the shards of the same videos in one permutation, with the same
  number of workers, and with none; in lanes; in lanes from an HTTP server on this machine into an empty cache; and,
  with --clips, over clips of several buckets, with their captions' embeddings;
- disk: MB/s of reading the shards from end to end (cold: after the kernel has been told to forget them), and of the
  loader's own reads.
"""

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

if __package__ in (None, ""):  # run as a file: the folder above holds the packages
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from fvdm import config as settings

if TYPE_CHECKING:
    from torch import Tensor

    from fvdm.data.shards import LatentShards

FRAMES, STRIDE, BATCH = 16, 3, 8


@dataclass(frozen=True)
class LoaderSpeedConfig:
    """What is read, and for how long.

    Attributes:
        videos: folder of the videos.
        shards: what encode_latents.py made of them.
        clips: folder of format 2, which has buckets; empty leaves them out.
        workers: loader processes.
        seconds: length of each measurement.
        mlflow: MLflow server or database; none for no MLflow.
    """

    videos: str
    shards: str
    clips: str = ""
    workers: int = 2
    seconds: float = 10.0
    mlflow: str = field(default="", metadata={"metavar": "URI"})

    def __post_init__(self) -> None:
        """Raises ValueError for a setting out of its range."""
        settings.in_range(self, workers=(0, 1024), seconds=(0, 86400))


def main(argv: Sequence[str] | None = None) -> None:
    """Measures, prints and logs."""
    try:
        config = settings.parse(LoaderSpeedConfig, argv, __doc__)
        from fvdm.data.shards import LatentShards

        shards = LatentShards(config.shards)
        results = measure(config.videos, shards, config.shards, config.workers, config.seconds)
        if config.clips:
            clips = LatentShards(config.clips)
            frames = min(bucket.frames for bucket in clips.manifest.buckets if bucket.frames != 1) or FRAMES
            rate = _loader_rate(clips, config.clips, config.workers, config.seconds, frames=frames)
            results["loader with buckets, clips/s"] = rate
    except ValueError as error:
        settings.fail(error)
    from benchmarks.reporting import log_rates

    log_rates(results, "loader_speed", config.mlflow, {"size": shards.manifest.size, "workers": config.workers})


def measure(videos: str, shards: "LatentShards", path: str, workers: int, seconds: float) -> dict[str, float]:
    """All numbers by name."""
    c, h, w = shards.latent_shape
    clip_bytes = FRAMES * 2 * c * h * w * 2
    decode = _decode_rate(videos, shards, workers, seconds)
    results = {
        "decode, clips/s": decode,
        "loader, clips/s": _loader_rate(shards, path, workers, seconds, lanes=0),
        "loader without workers, clips/s": _loader_rate(shards, path, 0, seconds, lanes=0),
        "loader in lanes, clips/s": _loader_rate(shards, path, workers, seconds, lanes=BATCH),
        "loader in lanes over HTTP, clips/s": _remote_rate(path, workers, seconds),
        "disk cold, MB/s": _disk_rate(shards, path, cold=True),
        "disk warm, MB/s": _disk_rate(shards, path, cold=False),
    }
    results["loader / decode"] = results["loader, clips/s"] / decode
    results["loader, MB/s"] = results["loader, clips/s"] * clip_bytes / 1e6
    return results


def _loader_rate(shards: "LatentShards", path: str, workers: int, seconds: float, **more: Any) -> float:
    from fvdm.data.config import DataConfig
    from fvdm.data.loader import batches

    values = {"frames": FRAMES, "stride": STRIDE, "batch_size": BATCH, "workers": workers}
    return _rate((batch.x_0 for batch in batches(shards, DataConfig(path, **values | more))), seconds)


def _remote_rate(path: str, workers: int, seconds: float) -> float:
    """From a server on this machine, with a cache that is empty at first."""
    from fvdm.data.location import UnreachableError
    from fvdm.data.shards import LatentShards
    from fvdm.distributed import free_port

    port = free_port()
    command = [sys.executable, "-m", "http.server", str(port), "--bind", "127.0.0.1", "--directory", path]
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        with tempfile.TemporaryDirectory() as cache:
            url = f"http://127.0.0.1:{port}"
            for _ in range(20):
                try:
                    shards = LatentShards(url, cache=cache)
                    break
                except UnreachableError:
                    time.sleep(0.5)
            return _loader_rate(shards, url, workers, seconds, lanes=BATCH, cache=cache)
    finally:
        server.terminate()
        server.wait()


def _decode_rate(videos: str, shards: "LatentShards", workers: int, seconds: float) -> float:
    import torch

    files = [Path(videos) / name for name in shards.sources]
    clips: Any = _Decoded(files, shards.frames.tolist(), shards.manifest.size)
    loader: Any = torch.utils.data.DataLoader(clips, batch_size=BATCH, num_workers=workers)
    return _rate(iter(loader), seconds)


def _rate(stream: Any, seconds: float) -> float:
    """Clips per second of a stream of batches, after a warm-up."""
    list(islice(stream, 2))
    begun, clips = time.perf_counter(), 0
    while time.perf_counter() - begun < seconds:
        clips += len(next(stream))
    return clips / (time.perf_counter() - begun)


class _Decoded:
    """Clips decoded from the video files when they are asked for; endless, in a random order."""

    def __init__(self, files: list[Path], frames: list[int], size: int) -> None:
        """Of files with their numbers of frames, as squares of `size` pixels."""
        self.files, self.frames, self.size = files, frames, size

    def __len__(self) -> int:
        """As good as without end."""
        return 1_000_000

    def __getitem__(self, index: int) -> "Tensor":
        """uint8 (f 3 s s)."""
        import av
        import numpy as np
        import torch

        from fvdm.data.loader import draw_frames
        from fvdm.media.layouts import PAPER
        from fvdm.media.videos import to_square

        video = index % len(self.files)
        chosen = draw_frames(self.frames[video], FRAMES, STRIDE, np.random.default_rng(index)).tolist()
        pictures = []
        with av.open(str(self.files[video])) as container:
            for number, frame in enumerate(container.decode(video=0)):
                if number in chosen:
                    pictures.append(to_square(frame.to_ndarray(format="rgb24"), self.size, PAPER["ffs"]))
                if number == chosen[-1]:
                    break
        return torch.from_numpy(np.stack(pictures))


def _disk_rate(shards: "LatentShards", path: str, *, cold: bool) -> float:
    """MB/s of reading the shards from end to end."""
    begun, size = time.perf_counter(), 0
    for info in shards.shards:
        file = os.open(Path(path) / info.name, os.O_RDONLY)
        if cold:
            os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
        while block := os.read(file, 1 << 22):
            size += len(block)
        os.close(file)
    return size / 1e6 / (time.perf_counter() - begun)


if __name__ == "__main__":
    main()
