"""The tables of benchmarks/evidence.py as Markdown, from its results.json; and the documents that they stand in."""

import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.evidence.plan import MEASURES
from fvdm.evaluation.scaling import fit_power_law
from fvdm.files import write_text

Numbers = Mapping[str, Any]
PFLOP = 1e15
HELD_OUT_WORDS = (
    "Mean squared error of the estimated noise on held-out clips, at fixed noise and a fixed grid of t, of the "
    "averaged weights. The fit is floor + scale * compute ^ -exponent, to the losses from a tenth of the steps on.\n"
)
TABLES, SUMMARY = "tables", "summary"  # parts of documents
FOLDER = "evidence"  # of images and numbers, beside the documents


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table in Markdown; empty without rows."""
    if not rows:
        return ""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def number(value: Any, measure: str) -> str:
    """A value, with its interval where it has one."""
    digits = MEASURES[measure][1]
    if value is None:
        return "-"
    if isinstance(value, (int, float)):
        return f"{value:.{digits}f}"
    return f"{value[0]:.{digits}f} [{value[1]:.{digits}f}, {value[2]:.{digits}f}]"


def who(row: Numbers) -> str:
    """What a line is of."""
    if "p" not in row:
        return {"test": "real, held out", "train": "real, trained on", "frozen": "frozen", "straight": "straight line"}[
            row["method"]
        ]
    if row["method"] == "vae":
        return "the truth through the VAE"
    method = "" if row["method"] == "sampled" else f", {row['method']}"
    rule = f", {row['rule']}" if "rule" in row else ""
    return f"{row['model']}, p = {row['p']:g}{rule}{method}"


def lines(rows: Sequence[Numbers], runs: Numbers, first: str = "") -> str:
    """A table of measurements: what, which seeds, how many clips, the numbers, the MLflow runs."""
    shown = [name for name in MEASURES if any(name in row for row in rows)]
    head = ["what", "seeds", "clips", *(MEASURES[name][0] for name in shown), "MLflow runs"]
    body = []
    for row in rows:
        seeds = ", ".join(map(str, row.get("seeds", []))) or "-"
        what = f"{row['sampler'].replace(':', ', ')} steps" if first == "sampler" else who(row)
        clips = f"{row['clips']}" + (f" against {row['real']} real" if "real" in row else "")
        ids = run_ids(row["jobs"], runs)
        body.append([what, seeds, clips, *(number(row.get(name), name) for name in shown), ids or "-"])
    return table(head, body)


def run_ids(trials: Sequence[str], runs: Numbers) -> str:
    """The short ids of the MLflow runs of some measurements."""
    return ", ".join(f"`{runs[name][:8]}`" for name in trials if runs.get(name))


def card(found: Numbers) -> str:
    """How FVD is measured, as a list."""
    text = {key: "; ".join(value) or "nowhere" if isinstance(value, list) else value for key, value in found.items()}
    return "FVD here:\n\n" + "\n".join(f"- {key}: {value}" for key, value in text.items()) + "\n"


def claims(results: Numbers) -> str:
    """One line a claim: the paper's words, our difference with its interval, each seed's, and the verdict."""
    body = []
    for name, entry in results["sets"].items():
        for row in entry["comparisons"]:
            measured, seeds = [], []
            for measure, found in row["measures"].items():
                label, digits = MEASURES[measure]
                still = f" (frozen {found['still']:.{digits}f})" if "still" in found else ""
                still += f" (straight line {found['line']:.{digits}f})" if "line" in found else ""
                measured.append(
                    f"{label} {found['better']:.{digits}f} against {found['worse']:.{digits}f}{still}: "
                    f"{number(found['difference'], measure)}"
                )
                seeds.append(", ".join(f"{one:.{digits}f}" for one in found["by_seed"]))
            first: Numbers = next(iter(row["measures"].values()), {})
            cells = [row["claim"], name, row["paper"], "<br>".join(measured) or "-", "<br>".join(seeds) or "-"]
            body.append([*cells, str(first.get("clips", "-")), f"**{row['verdict']}**"])
    for claim, why in NOT_HERE:
        body.append([claim, "-", "-", "-", "-", "-", f"**not testable here**: {why}"])
    head = ["claim", "set", "paper", "here: first against second, difference [95 %]", "by seed", "clips", "verdict"]
    return table(head, body)


NOT_HERE = (
    (
        "FVD of Table 1 on FaceForensics, SkyTimelapse, UCF101 and Taichi-HD",
        "wants the data, GPUs and `--budget paper`",
    ),
    ("S, B, L and XL, FVD over 200k iterations", "wants GPUs and `--budget paper`; two small sizes are compared above"),
)


def validation(found: Numbers, runs: Numbers) -> str:
    """Error of a frame's estimate by its own timestep and the smallest neighbour's, and how much of it is a copy."""
    parts = []
    for key, title in (("error", "mean squared error of the estimated frame"), ("share", "share of a copy")):
        head = ["p", "own t", *(f"neighbour at {level}" for level in found["neighbour"])]
        body = []
        for p, tables in found["p"].items():
            for own, row in zip(found["own"], tables[key], strict=True):
                body.append([p, str(own), *(_three(value) for value in row)])
        parts.append(f"{title.capitalize()}:\n\n{table(head, body)}")
    copied = _three(next(iter(found["p"].values()))["copied"])
    head = [
        "p",
        "error of a frame of noise beside a clean one",
        "share of a copy",
        "smaller than the error of a copy by",
    ]
    body = [
        [p, *map(_three, (t["error"][-1][0], t["share"][-1][0], t["ahead_of_copy"]))] for p, t in found["p"].items()
    ]
    parts.append(f"Copying the clean neighbour as it is would err by {copied}. Against that:\n\n{table(head, body)}")
    return "\n".join(parts) + f"\nMLflow runs: {run_ids(found['jobs'], runs) or '-'}\n"


def _three(value: Sequence[float]) -> str:
    return f"{value[0]:.3f} [{value[1]:.3f}, {value[2]:.3f}]"


def section(name: str, entry: Numbers, runs: Numbers, images: Mapping[str, str]) -> Iterator[str]:
    """The part about one set."""
    yield f"### {name}: plain generation\n"
    if entry["card"]:
        yield card(entry["card"])
    yield lines(entry["generation"], runs)
    yield from _image_links(images, f"{name}_generation", f"{name}_generate")
    if entry["samplers"]:
        yield f"### {name}: samplers\n"
        yield lines(entry["samplers"], runs, "sampler")
        yield from _image_links(images, f"{name}_samplers")
    for task, rows in entry["tasks"].items():
        if rows:
            yield f"### {name}: {task}\n"
            yield lines(rows, runs)
            yield from _image_links(images, f"{name}_{task}", f"{name}_{task}_numbers")
    if entry["drift"]:
        yield f"### {name}: drift over the length\n"
        yield _drift(entry["drift"], runs)
        yield from _image_links(images, f"{name}_drift")
    if entry["validation"]:
        yield f"### {name}: what a cleaner neighbour is worth\n"
        yield validation(entry["validation"], runs)
        yield from _image_links(images, f"{name}_validation")


def _drift(found: Numbers, runs: Numbers) -> str:
    """Means over eighths of the video, and how much the paper's arm is ahead in each."""
    body = []
    for measure in (name for name in ("motion", "psnr") if name in found):
        for part in found[measure]["eighths"]:
            first, last = (found["frames"][end] for end in part["part"])
            values = [number(value, measure) for value in (*part["methods"].values(), part.get("gain"))]
            body.append([MEASURES[measure][0], f"{first} to {last}", *values])
    methods = list(found["motion" if "motion" in found else "psnr"]["curves"])
    rows = table(["measure", "frames", *methods, "gain of a timestep per frame"], body)
    return f"{rows}\nMLflow runs: {run_ids(found['jobs'], runs) or '-'}\n"


def held_out(training_runs: Numbers) -> str:
    """The held-out loss of each training run, its compute, and the power law that it follows."""
    body = []
    for name, found in training_runs.items():
        losses = found.get("held_out") or []
        if not losses:
            continue
        step, loss, one, per_frame = losses[-1]
        compute = step * found["flops"] / PFLOP if found.get("flops") else None
        cells = [name, f"{step}", f"{compute:.1f}" if compute else "-", f"{losses[0][1]:.3f}", f"{loss:.3f}"]
        cells += [f"{one:.3f}", f"{per_frame:.3f}" if per_frame is not None else "-"]
        law = fit_power_law(*points(found))
        shown = (
            [f"{law.floor:.3f}", f"{law.exponent:.2f}", f"{law(10 * compute):.3f}"] if law and compute else ["-"] * 3
        )
        body.append(cells + shown)
    head = ["training", "step", "PFLOP", "held-out loss, step 0", "at that step", "frames at one t", "a t per frame"]
    return table([*head, "floor of the fit", "exponent", "after 10 times the compute"], body)


def points(found: Numbers) -> tuple[list[float], list[float]]:
    """Compute in PFLOP, and held-out loss, of a training run, from a tenth of its steps on."""
    losses, per_step = found.get("held_out") or [], found.get("flops")
    if not losses or not per_step:
        return [], []
    used = [(step * per_step / PFLOP, loss) for step, loss, *_ in losses if step >= max(1, losses[-1][0] / 10)]
    return [compute for compute, _ in used], [loss for _, loss in used]


def _image_links(images: Mapping[str, str], *names: str) -> Iterator[str]:
    for name in names:
        if name in images:
            yield f"![{name.replace('_', ', ')}]({images[name]})\n"


def cost(results: Numbers, runs: Numbers) -> str:
    """What the training runs and the measurements took, and how to do each again."""
    body = []
    for name, found in results["training_runs"].items():
        seconds = found.get("seconds")
        run = f"`{runs[name][:8]}`" if runs.get(name) else "-"
        body.append([name, f"{found['steps']}", f"{seconds / 60:.1f}" if seconds else "-", run])
    return table(["training", "steps", "minutes", "MLflow run"], body)


def render(results: Numbers, images: Mapping[str, str]) -> str:
    """All tables, as they stand in docs/evidence_tables.md."""
    runs = results["runs"]
    measured = sum(sum(entry["seconds"].values()) for entry in results["sets"].values()) / 60
    trained = sum(found.get("seconds") or 0 for found in results["training_runs"].values()) / 60
    parts = ["## Claims\n", claims(results)]
    for name, entry in results["sets"].items():
        parts += [f"## {name}\n", *section(name, entry, runs, images)]
    losses = held_out(results["training_runs"])
    if losses:
        parts += ["## Held-out loss\n", HELD_OUT_WORDS, losses, *_image_links(images, "compute")]
    parts += [
        "## Cost, runs and commands\n",
        f"Budget `{results['budget']}` on {results['machine']}; tables of commit `{results['commit'][:12]}`, and each "
        "run names the commit that measured. Training runs took "
        f"{trained:.0f} and measurements {measured:.0f} minutes of one process; {results['workers']} went side by "
        f"side. All runs are below the MLflow run `{results['parent']}`, which also has the figures, the videos, the "
        "differences behind the claims, and the lines over several seeds.\n",
        cost(results, runs),
        f"Each measurement is done again by `{results['command']} --only NAME` after its folder in "
        "`measured/` is removed; the tag `command` of a run has all words, the folders of the clips among them. The "
        "names, by the run:\n",
        table(["MLflow run", "name"], [[f"`{run}`", f"`{name}`"] for name, run in runs.items() if run]),
    ]
    return "\n".join(part for part in parts if part) + "\n"


def summary(results: Numbers) -> str:
    """The claims in short: the deciding measure, its difference with the interval, and the verdict."""
    body = []
    for name, entry in results["sets"].items():
        for row in entry["comparisons"]:
            measure = next(iter(row["measures"]), "")
            found = row["measures"].get(measure, {})
            shown = f"{MEASURES[measure][0]}: {number(found['difference'], measure)}" if measure else "-"
            body.append([row["claim"], name, shown, row["verdict"]])
    return table(["claim", "data", "difference [95 %]; positive is as the paper says", "verdict"], body)


def replace_parts(document: str, parts: Mapping[str, str]) -> str:
    """A document with each part between its two marks, where it has them.

    Args:
        document: the text.
        parts: `TABLES` and `SUMMARY` to their texts.

    Raises:
        ValueError: if it has the marks of neither.
    """
    found = False
    for name, part in parts.items():
        begin, end = f"<!-- {name}: begin -->", f"<!-- {name}: end -->"
        head, first, rest = document.partition(begin)
        _, last, tail = rest.partition(end)
        if first and last:
            document, found = f"{head}{begin}\n{part.strip()}\n{end}{tail}", True
    if not found:
        raise ValueError(f"the document has no place for tables: put <!-- {TABLES}: begin --> and its end into it")
    return document


def publish(out: Path, documents: Sequence[Path]) -> None:
    """Put the tables, and the summary, into documents, and images and numbers into the folder `evidence` beside them.

    Raises:
        ValueError: if one cannot be read, or has no place for tables.
    """
    results = json.loads((out / "results.json").read_text())
    parts = {TABLES: (out / "evidence.md").read_text(), SUMMARY: summary(results)}
    for document in documents:
        try:
            page = replace_parts(document.read_text(), parts)
        except OSError as error:
            raise ValueError(f"--docs {document} cannot be read: {error.strerror}") from None
        folder = document.parent / FOLDER
        folder.mkdir(exist_ok=True)
        images = [path for path in (out / "figures").glob("*.png") if f"({FOLDER}/{path.name})" in page]
        for path in (*images, out / "results.json"):
            shutil.copyfile(path, folder / path.name)
        write_text(document, page)
