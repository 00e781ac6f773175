"""Fréchet video distance by a published protocol, with all it depends on, logged to MLflow.

    python benchmarks/fvd.py --real DIR --fake DIR
    python benchmarks/fvd.py --protocol latte --dataset taichi --real latents/taichi --fake runs/taichi_xl --steps 250
    torchrun --nproc-per-node 8 benchmarks/fvd.py --real ffs --fake runs/ffs_xl --frames 128

--real and --fake each take a folder of videos or of frame folders, latent shards, or (--fake) a run or checkpoint,
which is sampled on the fly. The same command gives the same digits on any number of ranks. docs/fvd.md explains the
protocols, the card that is printed, and the pitfalls.
"""

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

if __package__ in (None, ""):  # run as a file: the folder above holds the packages
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from fvdm import config as settings
from fvdm.evaluation.config import FVDConfig


def report(result: dict[str, Any], config: FVDConfig) -> None:
    """Write fvd.json and the card to `--out`, and report them to MLflow."""
    from benchmarks.reporting import BenchmarkReport, Data, send
    from fvdm.evaluation.comparison import lines, metrics
    from fvdm.files import write_text
    from fvdm.tracking.tracker import run_of

    out = Path(config.out)
    out.mkdir(parents=True, exist_ok=True)
    write_text(out / "fvd.json", json.dumps(result, indent=1))
    write_text(out / "card.txt", "\n".join(lines(result)) + "\n")
    card = result["card"]
    name = card["protocol"].split(":")[0]
    sides = (("real", config.real), ("fake", config.fake))
    found = BenchmarkReport(
        "fvd",
        f"fvd {name} {config.frames}f {Path(config.fake).name}",
        [(result["step"], metrics(result))],
        {key.replace(" ", "_"): value for key, value in card.items()},
        {"protocol": name, "config": card.get("fake checkpoint", config.fake)},
        [out / "fvd.json", out / "card.txt"],
        data=[Data(Path(path).name, path, side, result["taken"][side]) for side, path in sides],
    )
    send(found, out, run_id=run_of(Path(config.run or config.fake)))


def main(argv: Sequence[str] | None = None) -> None:
    """Command line."""
    try:
        config = settings.parse(FVDConfig, argv, __doc__)
        from fvdm.evaluation.comparison import lines, measure
        from fvdm.evaluation.measure import ranks

        with ranks() as group:
            result = measure(config, group)
    except ValueError as error:
        settings.fail(error)
    if result:  # This is the main rank.
        print("\n".join(lines(result)))
        report(result, config)


if __name__ == "__main__":
    main()
