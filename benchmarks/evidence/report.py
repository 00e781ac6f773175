"""What benchmarks/evidence.py leaves: tables, figures and videos, and an MLflow run for every number."""

import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from benchmarks.evidence import pages
from benchmarks.evidence.measure import ClipBench
from benchmarks.evidence.plan import BASELINES, MEASURES
from benchmarks.evidence.results import collect
from benchmarks.evidence.run import Evidence
from benchmarks.experiment import Trial
from benchmarks.plots import curves, spans
from benchmarks.reporting import BenchmarkReport, Data, machine, send
from fvdm.files import write_text
from fvdm.media.writing import write_mp4, write_strips
from fvdm.tracking.config import TrackingConfig
from fvdm.tracking.provenance import git_commit

ZOOM = 64  # pixels of a frame in the images, at least
COLUMNS = 8


def report(evidence: Evidence) -> Path:
    """Numbers, tables, figures and videos; to files and to MLflow. Returns the file of the tables."""
    sets = collect(list(evidence.benches.values()), print)
    title = f"evidence {evidence.name}"
    params = {"budget": evidence.name, "sets": " ".join(evidence.budget.sets)}
    tags = {"kind": "evidence", "command": evidence.again}
    parent = evidence.report(title, params, tags, {}, {}, {})
    runs = evidence.run_ids() | _send_trials(evidence, sets, parent)
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
    images, videos = draw(results, figures), []
    own = set(
        images
    )  # What the page shows; frames of somebody's videos are not ours to publish, and go to MLflow only.
    for bench in evidence.benches.values():
        shown = side_by_side(bench, figures)
        images |= {name: path for name, path in shown.items() if path.suffix == ".png"}
        own |= set(shown) if bench.config.kind == "digits" else set()
        videos += [path for path in shown.values() if path.suffix == ".mp4"]
    tables = evidence.out / "evidence.md"
    beside = pages.FOLDER if evidence.options.docs else "figures"
    links = {name: f"{beside}/{path.name}" for name, path in images.items() if name in own}
    write_text(tables, pages.render(results, links))
    files = {tables: "", evidence.out / "results.json": ""} | dict.fromkeys(videos, "videos")
    evidence.report(title, params, tags, _overview(results), files, images)
    return tables


def _send_trials(evidence: Evidence, sets: Mapping[str, Any], parent: str) -> dict[str, str]:
    """A run for every measurement that is done, brought up to date where its numbers are others; their ids by name."""
    runs = {}
    for name, bench in evidence.benches.items():
        for trial in bench.trials:
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
    evidence: Evidence, bench: ClipBench, trial: Trial, found: BenchmarkReport, parent: str, before: str
) -> dict[str, str]:
    tracking = TrackingConfig(experiment=evidence.experiment, system_metrics=False)
    files = [] if before else bench.parts(trial)
    found = replace(found, files=files)
    return {"run_id": send(found, evidence.out, parent=parent, renew=before, tracking=tracking, show=False)}


def _report_of(
    evidence: Evidence, bench: ClipBench, trial: Trial, numbers: Mapping[str, Sequence[float]]
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


def _data(bench: ClipBench, trial: Trial) -> Iterator[Data]:
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
                found |= {f"tables/{name} {task} {pages.who(row)} {m}": row[m] for m in MEASURES if m in row}
        for measure in (m for m in ("motion", "psnr") if m in entry["drift"]):
            for part in entry["drift"][measure]["eighths"]:
                first, last = (entry["drift"]["frames"][end] for end in part["part"])
                found |= {f"drift/{name} {measure} gain, {first} to {last}": part["gain"]} if "gain" in part else {}
    return spread({name[:230]: value for name, value in found.items()})


def draw(results: Mapping[str, Any], out: Path) -> dict[str, Path]:
    """The plots: generation, samplers, tasks, drift and validation of each set."""
    images: dict[str, Path] = {}

    def save(name: str, rows: Sequence[tuple[str, Sequence[float]]], title: str, measure: str) -> None:
        if len(rows) > 1:
            images[name] = spans(dict(rows), out / f"{name}.png", title, MEASURES[measure][0])

    for name, entry in results["sets"].items():
        plain = next((m for m in ("fvd", "residual") if any(m in row for row in entry["generation"])), "fvd")
        rows = [
            (f"{pages.who(row)}" + (f", seed {row['seeds'][0]}" if "seeds" in row else ""), row[plain])
            for row in entry["generation"]
            if plain in row
        ]
        save(f"{name}_generation", rows, f"{name}: plain generation", plain)
        rows = [(row["sampler"].replace(":", " "), row[plain]) for row in entry["samplers"] if plain in row]
        save(f"{name}_samplers", rows, f"{name}: samplers, one training", plain)
        for task, found in entry["tasks"].items():
            best = next((m for m in ("motion", "residual", "fvd") if any(m in row for row in found)), "psnr")
            save(
                f"{name}_{task}_numbers", [(pages.who(r), r[best]) for r in found if best in r], f"{name}: {task}", best
            )
        images |= _lines(name, entry, out)
    series = {name: list(zip(*pages.points(found), strict=True)) for name, found in results["training_runs"].items()}
    if any(series.values()):
        title = "held-out loss against compute"
        images["compute"] = curves(series, out / "compute.png", title, "PFLOP", "loss", logarithmic=True)
    return images


def _lines(name: str, entry: Mapping[str, Any], out: Path) -> dict[str, Path]:
    images = {}
    drift = entry["drift"]
    measure = next((m for m in ("motion", "psnr") if m in drift), "")
    if measure:
        series = {
            method: list(zip(map(float, drift["frames"]), curve, strict=True))
            for method, curve in drift[measure]["curves"].items()
        }
        path = out / f"{name}_drift.png"
        images[f"{name}_drift"] = curves(series, path, f"{name}: long video", "frame", MEASURES[measure][0])
    found = entry["validation"]
    if found:
        series = {
            f"p = {p}, own t = {own}": [
                (float(at), value) for at, (value, *_) in zip(found["neighbour"], row, strict=True)
            ]
            for p, tables in found["p"].items()
            for own, row in zip(found["own"], tables["error"], strict=True)
            if own in (500, 1000)
        }
        path = out / f"{name}_validation.png"
        title = f"{name}: error of a frame beside a cleaner one"
        images[f"{name}_validation"] = curves(series, path, title, "timestep of the neighbour", "mean squared error")
    return images


def side_by_side(bench: ClipBench, out: Path) -> dict[str, Path]:
    """For each task an image (a row for each arm, the truth on top) and a video (the same clips in a row each).

    Args:
        bench: the set.
        out: folder for the files.

    Returns:
        Files by name.
    """
    images: dict[str, Path] = {}
    for task in ("generate", *bench.config.tasks):
        found = [trial for trial in bench.trials if trial.task == task and _is_shown(bench, trial)]
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


def _is_shown(bench: ClipBench, trial: Trial) -> bool:
    """One row for each arm: those of the first seed, with the sampler that all share; and real clips."""
    first = trial.arm is None or trial.arm.seed == bench.config.seeds[0]
    shared = trial.sampler in ("", bench.config.samplers[0])
    return first and shared and trial.method not in ("train", "vae", *BASELINES) and bench.done(trial)


def _zoom(video: Tensor) -> Tensor:
    """Clips `(b f c h w)`, each pixel a square, wide enough for the eye."""
    factor = -(-ZOOM // video.shape[-1])
    flat = F.interpolate(video.flatten(0, 1), scale_factor=factor, mode="nearest")
    return flat.unflatten(0, video.shape[:2])
