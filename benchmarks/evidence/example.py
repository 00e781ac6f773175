"""A checkpoint small enough to ship: the averaged weights of a run, as float16, and what one must know to sample.

python benchmarks/evidence/example.py --run runs/demo --out fvdm/weights/example
"""

import argparse
import sys
from pathlib import Path

if __package__ in (None, ""):  # run as a file: the folder above holds the packages
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch

from fvdm.checkpoints.find import resolve
from fvdm.config import fail
from fvdm.models.export import export_model


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", required=True, help="run or checkpoint")
    parser.add_argument("--out", default="fvdm/weights/example", help="folder for it [fvdm/weights/example]")
    options = parser.parse_args()
    try:
        export_model(resolve(Path(options.run)), Path(options.out), dtype=torch.float16, overwrite=True)
    except ValueError as error:
        fail(error)
    print(f"{options.run} as an example in {options.out}")


if __name__ == "__main__":
    main()
