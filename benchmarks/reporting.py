"""What a benchmark leaves in MLflow: a run with grouped metrics, tags that say what ran where, its data and files."""

import hashlib
import json
import os
import platform
import re
import tempfile
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch

from fvdm.config import flatten
from fvdm.tracking.config import TrackingConfig
from fvdm.tracking.pages import where_to_look
from fvdm.tracking.tracker import Tracker

EXPERIMENT = "benchmarks"


@dataclass(frozen=True)
class Data:
    """A set of clips that went into a number, as MLflow lists it.

    Attributes:
        name: what it is called.
        path: where it lies.
        role: what it was used as, such as real or fake.
        clips: which clips of it were taken; hashed into its digest.
    """

    name: str
    path: str
    role: str
    clips: Sequence[Any] = ()


@dataclass(frozen=True)
class BenchmarkReport:
    """All that a benchmark has found.

    Attributes:
        kind: which benchmark, such as fvd; the tag `kind`, and the folder of its artifacts.
        name: the run's name in MLflow.
        metrics: `(step, {group/name: value})`; a name with one step is a number in the description, unless the run is a
            child or that of the measured model.
        params: its settings.
        tags: more tags than `machine` gives.
        files: artifacts.
        images: images by name, shown as images of the run.
        data: what it was measured on.
    """

    kind: str
    name: str
    metrics: Sequence[tuple[int, Mapping[str, float]]] = ()
    params: Mapping[str, Any] = field(default_factory=dict)
    tags: Mapping[str, str] = field(default_factory=dict)
    files: Sequence[Path] = ()
    images: Mapping[str, Path] = field(default_factory=dict)
    data: Sequence[Data] = ()


def machine() -> dict[str, str]:
    """Tags that say where a number was made; the commit is the Tracker's own."""
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "none"
    return {"host": platform.node(), "gpu": gpu, "torch": torch.__version__}


def send(
    report: BenchmarkReport,
    out: Path,
    *,
    run_id: str = "",
    parent: str = "",
    renew: str = "",
    tracking: TrackingConfig | None = None,
    show: bool = True,
) -> str:
    """Report a benchmark as an MLflow run of its own, or into the run of the model that was measured.

    Args:
        report: what was found.
        out: folder of the benchmark, where the journal of this report is kept.
        run_id: id of a training run that gets it all instead.
        parent: id of the run that this one is a child of.
        renew: id of this report's own run of an earlier time, which is brought up to date with its tags.
        tracking: where to; the database of this folder when not given.
        show: print the address of the run's page.

    Returns:
        The run's id; empty while the server does not answer (the journal keeps what was not sent).
    """
    tracking = tracking or TrackingConfig(experiment=EXPERIMENT, system_metrics=False)
    tags = {"kind": report.kind} | machine() | dict(report.tags)
    tags |= {"mlflow.parentRunId": parent} if parent else {}
    folder = out / ".tracking" / f"{report.kind}-{time.time_ns()}"
    tracker = Tracker(folder, tracking, report.name, dict(report.params), tags, run_id=run_id or renew)
    if renew:
        tracker.set_tags(dict(report.tags))
    points = Counter(name for _, values in report.metrics for name in values)
    # MLflow draws a number alone as a chart of one bar: in a run of its own it stands in the description. A child run
    # keeps it as a metric, whose chart compares the children.
    alone = {name for name, count in points.items() if count == 1} if not (run_id or renew or parent) else set()
    figures = {name: value for _, values in report.metrics for name, value in values.items() if name in alone}
    if figures:
        tracker.figures(figures)
    for step, values in report.metrics:
        if curves := {name: value for name, value in values.items() if name not in alone}:
            tracker.metrics(curves, step)
    for path in report.files:
        tracker.artifact(path, report.kind)
    for name, path in report.images.items():
        tracker.artifact(path, report.kind)
        tracker.image(path, f"{report.kind}/{name}", max((step for step, _ in report.metrics), default=0))
    for entry in report.data:
        digest = hashlib.sha256(json.dumps([entry.path, entry.clips]).encode()).hexdigest()[:16]
        tracker.dataset(entry.name, entry.path, digest, entry.role, len(entry.clips))
    tracker.close()
    if show:
        print(f"MLflow: {where_to_look(tracker.folder)}")
    return tracker.run_id or ""


class Benchmark(Protocol):
    """Settings of a benchmark that knows no more than numbers."""

    @property
    def out(self) -> str:
        """Folder of the journal."""


def conclude(figures: Mapping[str, float], config: Benchmark, name: str, kind: str) -> None:
    """Print figures, and report them as an MLflow run.

    Args:
        figures: by name.
        config: settings of the benchmark, a dataclass; its `out` is the folder of the journal.
        name: the run's name in MLflow.
        kind: of the figures; the tag `kind`.
    """
    for label, value in figures.items():
        print(f"{label:24s} {value:.3f}")
    tracking = TrackingConfig(experiment=EXPERIMENT)
    tracker = Tracker(Path(config.out), tracking, name, flatten(config), {"kind": kind})
    tracker.figures(dict(figures))
    tracker.close()
    print(f"MLflow: {where_to_look(tracker.folder)}")


def log_rates(rates: Mapping[str, float], name: str, uri: str, params: Mapping[str, Any]) -> None:
    """Print figures of a program that keeps no folder, and report them as an MLflow run.

    Args:
        rates: by name, such as `loader, clips/s`.
        name: of the program.
        uri: MLflow server or database; none for no MLflow.
        params: settings; the number of cores is added.
    """
    width = max(map(len, rates))
    for label, value in rates.items():
        print(f"{label:<{width}}  {value:9.2f}")
    if uri == "none":
        return
    tracking = TrackingConfig(uri, EXPERIMENT, system_metrics=False)
    params = dict(params) | {"cores": len(os.sched_getaffinity(0))}
    tracker = Tracker(Path(tempfile.mkdtemp(prefix=f"{name}-")), tracking, name, params, {"kind": "benchmark"})
    tracker.figures({re.sub(r",? ", "_", label).replace("/", "_per_"): value for label, value in rates.items()})
    tracker.close()
