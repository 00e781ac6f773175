"""What every solver costs and how near it comes: seconds, network evaluations, memory, and quality; a Pareto front.

    python benchmarks/sampler_speed.py --checkpoint runs/ffs_xl --real ffs --clips 2048
    python benchmarks/sampler_speed.py --smoke

For each task, batch size, precision and attention backend, DDPM with 250 and 1000 steps, DDIM with 100, 50, 25 and 10,
and every other solver with 10, 15 and 20. Quality is the root mean square distance to what DDIM with
1000 steps makes of the same noise, over the root mean square of that (a stochastic solver draws noise of its own, so
that its distance says nothing); with --real it is the Fréchet video distance of as many clips. On a terminal, in
results.json, and as figures in MLflow.
"""

import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

if __package__ in (None, ""):  # run as a file: the folder above holds the packages
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.sampler_config import SMOKE, SamplerSpeedConfig
from fvdm import config as settings

if TYPE_CHECKING:
    from benchmarks.solver_costs import Row


def figures(rows: "Sequence[Row]", out: Path, exact: int) -> dict[str, Path]:
    """A figure of quality against time for every setting; `exact` are the steps of the reference."""
    from benchmarks.plots import pareto

    images = {}
    for setting in dict.fromkeys(row.setting for row in rows):
        groups: dict[str, dict[str, tuple[float, float]]] = {}
        for row in rows:
            if row.setting == setting and row.quality:
                groups.setdefault(row.solver, {})[str(row.steps)] = (row.seconds, row.quality)
        if not groups:
            continue  # Only stochastic solvers, and no real clips.
        y = "FVD" if rows[0].fvd is not None else f"distance to {exact} steps of DDIM, relative"
        images[setting] = pareto(groups, out / f"{setting}.png", setting, "seconds per clip", y)
    return images


def report(rows: "Sequence[Row]", config: SamplerSpeedConfig) -> None:
    """Write results.json and the figures to `--out`, and report them to MLflow."""
    from benchmarks.reporting import BenchmarkReport, Data, send
    from fvdm.files import write_text

    out = Path(config.out)
    out.mkdir(parents=True, exist_ok=True)
    write_text(out / "results.json", json.dumps([asdict(row) for row in rows], indent=1))
    names = {"seconds": "seconds_per_clip", "evaluations": "evaluations", "memory": "peak_mib", "error": "error"}
    names["fvd"] = "fvd"
    metrics = [
        (row.steps, {f"{row.setting}/{shown}_{row.solver}": value})
        for row in rows
        for key, shown in names.items()
        if (value := getattr(row, key)) is not None
    ]
    data = [Data(Path(config.real).name, config.real, "real")] if config.real else []
    found = BenchmarkReport(
        "sampler_speed",
        f"sampler speed {Path(config.checkpoint).name}",
        metrics,
        {key: value for key, value in settings.flatten(config).items() if key != "out"},
        {"config": config.checkpoint},
        [out / "results.json"],
        figures(rows, out, config.reference_steps),
        data,
    )
    send(found, out)


def main(argv: Sequence[str] | None = None) -> None:
    """Command line."""
    try:
        config = settings.parse_small(SamplerSpeedConfig, argv, __doc__, lambda _: SMOKE)
        from benchmarks.solver_costs import run_all

        rows = run_all(config)
    except ValueError as error:
        settings.fail(error)
    report(rows, config)


if __name__ == "__main__":
    main()
