"""Train the small image VAE that ships with the package: `fvdm/weights/builtin_vae`.

    python data_prep/train_vae.py --sources DIR_OR_FILE ... --holdout WORD ... --out fvdm/weights/builtin_vae
    python data_prep/train_vae.py --sources DIR_OR_FILE ... --evaluate fvdm/weights/builtin_vae

Sources are photographs and videos; those whose path holds a word of `--holdout` are only evaluated. docs/vae.md names
the packages that the shipped weights saw. Runs on two CPU cores in about an hour.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

if __package__ in (None, ""):  # run as a file: the folder above holds the packages
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    from data_prep.installed import require_packages

    require_packages()

from data_prep.config import TrainVAEConfig
from data_prep.job import exit_status
from fvdm import config as settings

PROG = "python data_prep/train_vae.py"


def main(config: TrainVAEConfig) -> int:
    """Trains, or evaluates; returns the exit status.

    Raises:
        ValueError: if there is nothing to train on.
    """
    from data_prep.vae_training import collect, report, train

    images, held = collect(config.sources, config.holdout, config.every)
    if config.evaluate:
        from diffusers import AutoencoderKL

        report(AutoencoderKL.from_pretrained(config.evaluate), held | {"(all others)": images})
    else:
        train(images, held, config)
    return 0


def run(words: Sequence[str] | None = None) -> int:
    """The command with its words; prints user errors as one sentence, and returns the exit status."""
    return exit_status(lambda: main(settings.parse(TrainVAEConfig, words, __doc__, prog=PROG)))


if __name__ == "__main__":
    sys.exit(run())
