"""What benchmarks/evidence.py leaves: tables, figures and videos, and an MLflow run for every number."""

import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from benchmarks.evidence import tables as text
from benchmarks.evidence.claims import collect
from benchmarks.evidence.measure import Bench
from benchmarks.evidence.plan import Trial, trials
from benchmarks.evidence.results import MEASURES
from benchmarks.evidence.run import EXPERIMENT, Evidence
from benchmarks.reporting import BenchmarkReport, Data, machine, send
from fvdm.files import write_text
from fvdm.media.writing import write_mp4, write_strips
from fvdm.tracking.config import TrackingConfig
from fvdm.tracking.provenance import git_commit
from fvdm.tracking.tracker import Tracker, run_of

ZOOM = 64  # pixels of a frame in the images, at least
COLUMNS = 8
FOLDER = "evidence"  # of images and numbers, beside the documents


def _parent(evidence: Evidence, figures: dict[str, float], files: Sequence[Path], images: dict[str, Path]) -> str:
    """Report to the run that all others are below; its id, empty while the server is away."""
    tracker = Tracker(
        evidence.out / ".tracking" / "parent",
        TrackingConfig(experiment=EXPERIMENT, system_metrics=False),
        f"evidence {evidence.name}",
        {"budget": evidence.name, "sets": " ".join(evidence.budget.sets)},
        {"kind": "evidence", "command": evidence.again} | machine(),
    )
    tracker.set_tags({"command": evidence.again})
    if figures:
        tracker.figures(figures, final=False)
    for name, path in images.items():
        tracker.artifact(path, "figures")
        tracker.image(path, f"figures/{name}", 0)
    for path in files:
        tracker.artifact(path, "videos" if path.suffix == ".mp4" else "")
    for arm in evidence.arms():
        run = run_of(evidence.out / "runs" / arm.name)
        if run:
            tracker.set_parent(run)
    tracker.close()
    return tracker.run_id or ""


def report(evidence: Evidence) -> Path:
    """Numbers, tables, figures and videos; to files and to MLflow. Returns the file of the tables."""
    sets = collect(list(evidence.benches.values()), print)
    parent = _parent(evidence, {}, [], {})
    runs = {arm.name: run_of(evidence.out / "runs" / arm.name) for arm in evidence.arms()}
    runs |= _send_trials(evidence, sets, parent)
    results: dict[str, Any] = {
        "budget": evidence.name,
        "command": evidence.shown,
        "commit": git_commit(),
        "machine": f"{len(os.sched_getaffinity(0))} CPU cores, GPU: {machine()['gpu']}",
        "workers": evidence.budget.workers,
        "parent": parent,
        "runs": runs,
        "sets": sets,
        "training_runs": {arm.name: evidence.record(arm) for arm in evidence.arms()},
    }
    write_text(evidence.out / "results.json", json.dumps(results, indent=1))
    figures = evidence.out / "figures"
    figures.mkdir(exist_ok=True)
    images, videos = text.figures(results, figures), []
    own = set(
        images
    )  # What the page shows; frames of somebody's videos are not ours to publish, and go to MLflow only.
    for bench in evidence.benches.values():
        shown = side_by_side(bench, figures)
        images |= {name: path for name, path in shown.items() if path.suffix == ".png"}
        own |= set(shown) if bench.config.kind == "digits" else set()
        videos += [path for path in shown.values() if path.suffix == ".mp4"]
    tables = evidence.out / "evidence.md"
    beside = FOLDER if evidence.options.docs else "figures"
    links = {name: f"{beside}/{path.name}" for name, path in images.items() if name in own}
    write_text(tables, text.render(results, links))
    _parent(evidence, _overview(results), [tables, evidence.out / "results.json", *videos], images)
    return tables


def _send_trials(evidence: Evidence, sets: Mapping[str, Any], parent: str) -> dict[str, str]:
    """A run for every measurement that is done, brought up to date where its numbers are others; their ids by name."""
    runs = {}
    for name, bench in evidence.benches.items():
        for trial in trials(name, bench.config):
            record = bench.folder(trial) / "run.json"
            sent = json.loads(record.read_text()) if record.exists() else {}
            if bench.done(trial):
                found = _report_of(evidence, bench, trial, sets[name]["measurements"][trial.name])
                digest = hashlib.sha256(repr((found.metrics, found.tags, found.data)).encode()).hexdigest()
                if sent.get("sent") != digest:
                    sent = _send(evidence, bench, trial, found, parent, sent.get("run_id", "")) | {"sent": digest}
                    if sent["run_id"]:
                        write_text(record, json.dumps(sent))
            runs[trial.name] = sent.get("run_id", "")
    return runs


def _send(
    evidence: Evidence, bench: Bench, trial: Trial, found: BenchmarkReport, parent: str, before: str
) -> dict[str, str]:
    tracking = TrackingConfig(experiment=EXPERIMENT, system_metrics=False)
    files = [] if before else bench.parts(trial)
    found = replace(found, files=files)
    return {"run_id": send(found, evidence.out, parent=parent, renew=before, tracking=tracking, show=False)}


def _report_of(
    evidence: Evidence, bench: Bench, trial: Trial, numbers: Mapping[str, Sequence[float]]
) -> BenchmarkReport:
    """What the run of a measurement shows: its numbers with their intervals, its data, and its command."""
    metrics = {f"{trial.task}/{name}": value for name, value in spread(numbers).items()}
    metrics[f"{trial.task}/seconds"] = float(bench.read(trial)["seconds"].sum())
    return BenchmarkReport(
        "evidence",
        trial.name,
        [(0, metrics)],
        {"clips": bench.count(trial), "sampler": trial.sampler, "method": trial.method, "task": trial.task},
        {"command": f"{evidence.again} --only '{trial.name}'", "checkpoint": trial.arm.name if trial.arm else "none"},
        data=list(_data(bench, trial)),
    )


def spread(numbers: Mapping[str, Sequence[float]]) -> dict[str, float]:
    """Values and the ends of their intervals, each under a name of its own."""
    return {
        f"{name}{end}": float(value[k])
        for name, value in numbers.items()
        for k, end in enumerate(("", "_low_95", "_high_95"))
    }


def _data(bench: Bench, trial: Trial) -> Iterator[Data]:
    """The clips behind a measurement, and those that its model was trained on."""
    role = {"sampled": "reference", "test": "measured", "train": "measured"}.get(trial.method, "truth")
    if role != "reference" or bench.config.i3d:
        split = bench.split(trial)
        taken = [(bench.sources[split].names[clip.video], clip.frames[0]) for clip in bench.clips(trial)]
        yield Data(f"{bench.name} {split}", bench.sources[split].path, role, taken)
    if trial.arm:
        yield Data(f"{bench.name} trained on", str(bench.out / "data" / bench.name / "latents-train"), "training")


def _overview(results: Mapping[str, Any]) -> dict[str, float]:
    """What the parent shows: the differences behind the claims, lines over several seeds, and gains in long videos."""
    found: dict[str, Sequence[float]] = {}
    for name, entry in results["sets"].items():
        for row in entry["comparisons"]:
            found |= {f"claims/{name} {row['claim']} {m}": one["difference"] for m, one in row["measures"].items()}
        for task, rows in entry["tasks"].items():
            for row in (row for row in rows if len(row["jobs"]) > 1):
                found |= {f"tables/{name} {task} {text.who(row)} {m}": row[m] for m in MEASURES if m in row}
        for measure in (m for m in ("motion", "psnr") if m in entry["drift"]):
            for part in entry["drift"][measure]["eighths"]:
                first, last = (entry["drift"]["frames"][end] for end in part["part"])
                found |= {f"drift/{name} {measure} gain, {first} to {last}": part["gain"]} if "gain" in part else {}
    return spread({name[:230]: value for name, value in found.items()})


def publish(out: Path, documents: Sequence[Path]) -> None:
    """Put the tables, and the summary, into documents, and images and numbers into the folder `evidence` beside them.

    Raises:
        ValueError: if one cannot be read, or has no place for tables.
    """
    results = json.loads((out / "results.json").read_text())
    parts = {text.TABLES: (out / "evidence.md").read_text(), text.SUMMARY: text.summary(results)}
    for document in documents:
        try:
            page = text.replace_parts(document.read_text(), parts)
        except OSError as error:
            raise ValueError(f"--docs {document} cannot be read: {error.strerror}") from None
        folder = document.parent / FOLDER
        folder.mkdir(exist_ok=True)
        images = [path for path in (out / "figures").glob("*.png") if f"({FOLDER}/{path.name})" in page]
        for path in (*images, out / "results.json"):
            shutil.copyfile(path, folder / path.name)
        write_text(document, page)


def side_by_side(bench: Bench, out: Path) -> dict[str, Path]:
    """For each task an image (a row for each arm, the truth on top) and a video (the same clips in a row each).

    Args:
        bench: the set.
        out: folder for the files.

    Returns:
        Files by name.
    """
    images: dict[str, Path] = {}
    for task in ("generate", *bench.config.tasks):
        found = [trial for trial in trials(bench.name, bench.config) if trial.task == task and _is_shown(bench, trial)]
        if not found:
            continue
        rows = [torch.from_numpy(bench.read(trial)["shown"]) for trial in found]
        if task != "generate":
            rows = [torch.from_numpy(bench.read(found[0])["shown_truth"]), *rows]
        count = min(2, *(len(row) for row in rows)) if len(rows) > 1 else 1
        frames = min(row.shape[1] for row in rows)
        zoomed = [_zoom(row[:count, :frames]) for row in rows]
        name = f"{bench.name}_{task}"
        images[name] = out / f"{name}.png"
        write_strips(torch.cat([row[k, None] for k in range(count) for row in zoomed]), images[name], COLUMNS)
        images[f"{name}_video"] = out / f"{name}.mp4"
        grid = rearrange(torch.stack(zoomed), "r b f c h w -> f c (b h) (r w)")
        write_mp4(grid, images[f"{name}_video"])
    return images


def _is_shown(bench: Bench, trial: Trial) -> bool:
    """One row for each arm: those of the first seed, with the sampler that all share; and real clips."""
    first = trial.arm is None or trial.arm.seed == bench.config.seeds[0]
    shared = trial.sampler in ("", bench.config.samplers[0])
    return first and shared and trial.method not in ("train", "vae", "frozen", "straight") and bench.done(trial)


def _zoom(video: Tensor) -> Tensor:
    """Clips `(b f c h w)`, each pixel a square, wide enough for the eye."""
    factor = -(-ZOOM // video.shape[-1])
    flat = F.interpolate(video.flatten(0, 1), scale_factor=factor, mode="nearest")
    return flat.unflatten(0, video.shape[:2])
