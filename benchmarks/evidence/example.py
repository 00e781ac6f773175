"""A checkpoint small enough to ship: the averaged weights of a run, as float16, and what one must know to sample.

python benchmarks/evidence/example.py --run runs/demo --out fvdm/weights/example
"""

import argparse
import sys
from dataclasses import replace
from pathlib import Path

if __package__ in (None, ""):  # run as a file: the folder above holds the packages
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch

from fvdm.config import fail
from fvdm.generation.pipeline import load
from fvdm.models.inference import InferenceConfig, write_inference_config


def export(run: Path, out: Path) -> None:
    """Write the averaged weights of a run, as float16, and what one must know to sample from them.

    Args:
        run: a training's folder, or a checkpoint.
        out: folder that `fvdm.load` takes.

    Raises:
        ValueError: if there is no checkpoint, or the folder cannot be written.
    """
    trained = load(run)
    # What attends is a matter of the machine, not of the weights.
    trained.model.config = replace(trained.model.config, attention="auto")
    trained.model.save_pretrained(out, torch.float16)
    write_inference_config(
        out, InferenceConfig(trained.diffusion.config, trained.vae.name, trained.classes, trained.stride)
    )


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", required=True, help="run or checkpoint")
    parser.add_argument("--out", default="fvdm/weights/example", help="folder for it [fvdm/weights/example]")
    options = parser.parse_args()
    try:
        export(Path(options.run), Path(options.out))
    except ValueError as error:
        fail(error)
    print(f"{options.run} as an example in {options.out}")


if __name__ == "__main__":
    main()
