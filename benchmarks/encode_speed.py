"""How fast encode_latents.py encodes, against a plain loop over the same VAE and against the VAE alone.

    python benchmarks/encode_speed.py --videos DIR [--vae builtin] [--size 128]

Five numbers in frames/s, logged to MLflow. All take turns, round after round, so that whatever else the machine does
hits all alike; the figures are medians, the ratios medians of the rounds' ratios:

- plain: diffusers' AutoencoderKL as it loads, in float32; one video after the other, decoded, then encoded 16 frames at
  a time, as one writes it first;
- frame by frame: the same, one frame at a time;
- pure: the VAE alone, on frames that are decoded already, called as encode_latents.py calls it;
- decoding: the command's decoders alone, nothing encoded;
- encode_latents: the command's own loop, shards written and flushed, without the start of the program.

Where decoders and VAE share the cores of a CPU, the limit is the sum of their times on a frame; a percentage says how
near to it the command comes, another how near to the VAE alone.

And what 16 bits cost, in the shards and in the VAE's arithmetic, in dB: the power of the latents over that of the
error, and the PSNR of the decoded frames against those decoded from exact latents.
"""

import multiprocessing
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import dataclass, replace
from operator import itemgetter
from pathlib import Path
from typing import TYPE_CHECKING, Any

if __package__ in (None, ""):  # run as a file: the folder above holds the packages
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from fvdm import config as settings

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from data_prep.config import EncodeConfig
    from fvdm.media.vae import VAE


@dataclass(frozen=True)
class EncodeSpeedConfig:
    """The encoding that is timed.

    Attributes:
        videos: folder of video files.
        vae: VAE by name or path, as encode_latents.py takes it.
        size: side of the frames, in pixels.
        repeats: rounds.
        mlflow: MLflow server or database; none for no MLflow.
    """

    videos: str
    vae: str = "builtin"
    size: int = 128
    repeats: int = 3
    mlflow: str = ""


def main(argv: list[str] | None = None) -> None:
    """Measures, prints and logs."""
    try:
        options = settings.parse(EncodeSpeedConfig, argv, __doc__)
        from data_prep.config import EncodeConfig, resolve
        from data_prep.encoder import open_models

        config = resolve(
            EncodeConfig(videos=options.videos, vae=options.vae, size=options.size, flip=False, timeout=60)
        )
        vae = open_models(config).vae
        print(f"{config.vae} at {config.size} px on {vae.device}, {vae.dtype}")
        results = measure(config, vae, options.repeats)
    except ValueError as error:
        settings.fail(error)
    from benchmarks.reporting import log_rates

    log_rates(results, "encode_speed", options.mlflow, {"vae": options.vae, "size": options.size})


def measure(config: "EncodeConfig", vae: "VAE", repeats: int) -> dict[str, float]:
    """All numbers by name."""
    import torch

    from fvdm.media.layouts import PAPER, list_videos
    from fvdm.media.memory import keep_freed_memory
    from fvdm.media.vae import load_vae
    from fvdm.media.videos import read_video

    names = [source.name for source in list_videos(config.videos, "ffs").sources]
    chunks = [
        [torch.from_numpy(item) for item in read_video(Path(config.videos) / name, config.sizes[0][0], PAPER["ffs"], 4)
         if not hasattr(item, "fps")]
        for name in names
    ]  # fmt: skip
    # In a process of its own, which nothing was done to.
    other = ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), _open_plain, (config.vae, vae.device))
    keep_freed_memory()
    frames = sum(len(chunk) for video in chunks for chunk in video)

    subjects: dict[str, Callable[[], float | None]] = {
        "frame by frame": lambda: other.submit(_plain, config, names, 1).result(),
        "plain": lambda: other.submit(_plain, config, names, 16).result(),
        "pure": lambda: _pure(config, vae, [chunk for video in chunks for chunk in video]),
        "decoding": lambda: _decoding(config, names),
        "encode_latents": lambda: _command(config, vae),
    }
    rounds: list[dict[str, float]] = []
    for _ in range(repeats):
        rounds.append({})
        for name, function in subjects.items():
            begun = time.perf_counter()
            own = function()
            rounds[-1][name] = frames / (own or time.perf_counter() - begun)

    def median(value: Callable[[dict[str, float]], float]) -> float:
        return statistics.median(value(rates) for rates in rounds)

    other.shutdown()
    results = {f"{name}, frames/s": median(itemgetter(name)) for name in subjects}
    results["encode_latents / plain"] = median(lambda rates: rates["encode_latents"] / rates["plain"])
    results["encode_latents / pure, %"] = median(lambda rates: 100 * rates["encode_latents"] / rates["pure"])
    results["encode_latents / limit of shared cores, %"] = median(
        lambda rates: 100 * rates["encode_latents"] * (1 / rates["pure"] + 1 / rates["decoding"])
    )
    return results | rounding(load_vae(config.vae, vae.device), vae, torch.cat(chunks[0][:8]))


_plain_model: Any = None


def _open_plain(name: str, device: "torch.device") -> None:
    global _plain_model
    from diffusers import AutoencoderKL

    from fvdm.media.vae import BUILTIN

    source = BUILTIN if name == "builtin" else name
    _plain_model = (
        AutoencoderKL.from_pretrained(source, use_safetensors=True, low_cpu_mem_usage=False).to(device).eval()
    )


def _plain(config: "EncodeConfig", names: list[str], batch: int) -> float:
    """The loop that one writes first: decode a video, encode it, save it; then the next. Returns seconds."""
    import av
    import numpy as np
    import torch

    from fvdm.media.layouts import PAPER
    from fvdm.media.videos import to_square

    begun = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        for number, name in enumerate(names):
            moments = []
            with av.open(str(Path(config.videos) / name)) as container:
                frames = [
                    torch.from_numpy(to_square(frame.to_ndarray(format="rgb24"), config.sizes[0][0], PAPER["ffs"]))
                    for frame in container.decode(video=0)
                ]
            for first in range(0, len(frames), batch):
                pixels = torch.stack(frames[first : first + batch]).to(_plain_model.device).float() / 127.5 - 1
                moments.append(_plain_model.encode(pixels).latent_dist.parameters.half().cpu())
            np.save(Path(folder) / f"{number}.npy", torch.cat(moments).numpy())
    return time.perf_counter() - begun


def _pure(config: "EncodeConfig", vae: "VAE", chunks: "list[Tensor]") -> None:
    """The VAE alone, on as many threads as encode_latents.py uses."""
    import torch

    from data_prep.encoding import processes

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    with ThreadPoolExecutor(processes(config)[1], initializer=torch.set_num_threads, initargs=(1,)) as pool:
        list(pool.map(vae.encode, chunks))
    torch.set_num_threads(before)


def _decoding(config: "EncodeConfig", names: list[str]) -> None:
    """The decoders of encode_latents.py, with nobody to wait for."""

    from data_prep.decoding import Task, decode
    from data_prep.encoding import processes
    from fvdm.media.clips import ClipSpec
    from fvdm.media.layouts import PAPER

    spec = ClipSpec(config.sizes, PAPER["ffs"], 4)
    tasks = (Task(k, str(Path(config.videos) / name), spec) for k, name in enumerate(names))
    for _ in decode(tasks, workers=processes(config)[0]):
        pass


def _command(config: "EncodeConfig", vae: "VAE") -> float:
    """What encode_latents.py does from its plan to its last shard; seconds."""
    from data_prep.encoder import Models
    from data_prep.encoding import encode_shards
    from data_prep.planning import make_plan
    from data_prep.shards import Work

    with tempfile.TemporaryDirectory() as folder:
        config = replace(config, out=folder, shard_mb=4)
        plan = make_plan(config, vae)
        begun = time.perf_counter()
        encode_shards(config, Work(Path(folder), plan), plan.shards, Models(vae))
        return time.perf_counter() - begun


def rounding(exact_vae: "VAE", vae: "VAE", frames: "Tensor") -> dict[str, float]:
    """What 16 bits cost, in dB, for uint8 frames (n 3 s s): in storage, and in the VAE's own arithmetic."""
    import torch

    from fvdm.media.vae import sample_latents

    moments = exact_vae.encode(frames).cpu()
    exact = sample_latents(moments, vae.normalisation, None)
    pictures = exact_vae.decode(exact).float()
    changed = {
        "stored as float16": moments.half().float(),
        "stored as bfloat16": moments.bfloat16().float(),
        f"encoded in {str(vae.dtype).removeprefix('torch.')}": vae.encode(frames).cpu(),
    }
    results = {}
    for name, values in changed.items():
        latents = sample_latents(values, vae.normalisation, None)
        error = (latents - exact).square().mean().clamp_min(1e-12)
        results[f"{name}, dB of latents"] = float(10 * torch.log10(exact.var() / error))
        error = (exact_vae.decode(latents).float() - pictures).square().mean().clamp_min(1e-9)
        results[f"{name}, dB of frames"] = float(10 * torch.log10(255**2 / error))
    return results


if __name__ == "__main__":
    main()
