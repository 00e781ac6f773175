"""The paper's Table 1: FVD at 256 pixels on four data sets; ours measured, beside what was published of as many frames.

    python benchmarks/table1.py --real ffs=/data/ffs ucf101=/data/ucf101 --runs ffs=runs/ffs_xl ucf101=runs/ucf101_xl

Measures each data set for which both the real videos and a run are named, by the settings behind the table: 2048 clips,
50 steps of DDIM, guidance 7 on UCF101. What is measured is kept in --out and not measured again. Published numbers are
read from a CSV file, benchmarks/published.csv, whose every row names its source and its protocol; a number without a
source is refused, and one of another protocol is marked, for it does not compare.
"""

import csv
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if __package__ in (None, ""):  # run as a file: the folder above holds the packages
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from fvdm import config as settings
from fvdm.evaluation.config import FVDConfig

if TYPE_CHECKING:
    from fvdm.distributed import Ranks

PUBLISHED = Path(__file__).with_name("published.csv")
DATASETS = {"ffs": "FaceForensics", "sky": "SkyTimelapse", "ucf101": "UCF101", "taichi": "Taichi-HD"}
GUIDANCE = {"ucf101": 7.0}  # the others have no classes
OURS = "FVDM, measured here"


@dataclass(frozen=True)
class Published:
    """A number from a paper.

    Attributes:
        method: whose it is.
        dataset: one of `DATASETS`.
        frames: of the clips.
        fvd: the number.
        protocol: one of `PROTOCOLS`, or what the paper says.
        source: where it stands, so that it can be looked up.
    """

    method: str
    dataset: str
    frames: int
    fvd: float
    protocol: str
    source: str


def read_published(path: Path) -> list[Published]:
    """The rows of the file.

    Raises:
        ValueError: if it cannot be read, or a row has no source, no number, or another data set.
    """
    try:
        with path.open(newline="") as file:
            rows = list(csv.DictReader(file))
    except OSError as error:
        raise ValueError(f"cannot read {path}: {error.strerror}") from None
    found = []
    for line, row in enumerate(rows, start=2):
        try:
            values = (int(row["frames"]), float(row["fvd"]), row["protocol"], row["source"] or "")
            entry = Published(row["method"], row["dataset"], *values)
        except (KeyError, TypeError, ValueError):
            raise ValueError(f"{path}, line {line}: a row is method,dataset,frames,fvd,protocol,source") from None
        if entry.dataset not in DATASETS or not entry.source.strip():
            raise ValueError(f"{path}, line {line}: name one of {', '.join(DATASETS)}, and the source of the number")
        found.append(entry)
    return found


def pairs(words: Sequence[str], name: str) -> dict[str, str]:
    """`["ffs=/data"]` as a dictionary.

    Raises:
        ValueError: for another form, or another data set.
    """
    found = dict(word.partition("=")[::2] for word in words)
    if not set(found) <= set(DATASETS) or not all(found.values()):
        raise ValueError(f"--{name} takes words such as ffs=PATH; data sets are {', '.join(DATASETS)}")
    return found


@dataclass(frozen=True)
class Table1Config:
    """The paper's Table 1.

    Attributes:
        real: real videos or shards, as SET=PATH; sets are ffs, sky, ucf101 and taichi.
        runs: run or checkpoint of each set, as SET=PATH.
        published: CSV file of published numbers.
        protocol: FVD protocol.
        steps: steps of DDIM.
        frames: frames of a clip.
        clips: most clips; 0 takes the protocol's.
        out: folder for what is measured, and the table.
    """

    real: tuple[str, ...] = ()
    runs: tuple[str, ...] = ()
    published: str = str(PUBLISHED)
    protocol: str = "styleganv"
    steps: int = 50
    frames: int = 16
    clips: int = 0
    out: str = "table1"


def measure(config: Table1Config, group: "Ranks") -> dict[str, dict[str, Any]]:
    """Results of `fvdm.evaluation.comparison.measure` by data set, on the main rank. Collective.

    Raises:
        ValueError: if a source cannot be used.
    """
    from fvdm.evaluation import comparison
    from fvdm.files import write_text

    real, runs = pairs(config.real, "real"), pairs(config.runs, "runs")
    results = {}
    for dataset in (name for name in DATASETS if name in real and name in runs):
        measured = Path(config.out) / f"{dataset}.json"
        if measured.is_file():
            results[dataset] = json.loads(measured.read_text())
            continue
        fvd = FVDConfig(
            real[dataset],
            runs[dataset],
            config.protocol,
            dataset,
            config.frames,
            config.clips,
            steps=config.steps,
            guidance=GUIDANCE.get(dataset, 1.0),
        )
        results[dataset] = comparison.measure(fvd, group)
        if group.is_main:
            measured.parent.mkdir(parents=True, exist_ok=True)
            write_text(measured, json.dumps(results[dataset], indent=1))
    return results


def table(results: Mapping[str, Mapping[str, Any]], published: Sequence[Published], protocol: str) -> str:
    """The table in Markdown, with its sources below.

    A dash stands for what is neither published nor measured; a star marks another protocol than ours.
    """
    lines = ["| method | " + " | ".join(DATASETS.values()) + " |", "|---" * (len(DATASETS) + 1) + "|"]
    for method in dict.fromkeys(entry.method for entry in published):
        values = {
            entry.dataset: f"{entry.fvd:g}" + ("" if entry.protocol == protocol else "*")
            for entry in published
            if entry.method == method
        }
        lines.append(f"| {method} | " + " | ".join(values.get(name, "-") for name in DATASETS) + " |")
    ours = {name: f"{result['fvd']:.1f}" + ("!" if _departs(result) else "") for name, result in results.items()}
    lines.append(f"| {OURS} | " + " | ".join(ours.get(name, "-") for name in DATASETS) + " |")
    lines += ["", "- not measured, or not published; * by another protocol, which does not compare;"]
    lines += [f"! departs from {protocol}:"]
    lines += [f"  - {DATASETS[name]}: {_departs(result)}" for name, result in results.items() if _departs(result)]
    lines += [f"- {source}" for source in dict.fromkeys(f"{e.method}: {e.source} ({e.protocol})" for e in published)]
    return "\n".join(lines) + "\n"


def _departs(result: Mapping[str, Any]) -> str:
    """Where a measurement departs from its protocol; empty where it does not."""
    found = result["card"]["departs from it"]
    return "" if found.startswith("nowhere") else str(found)


def report(results: Mapping[str, Mapping[str, Any]], text: str, config: Table1Config) -> None:
    """Write table1.md, and report it to MLflow."""
    from benchmarks.reporting import BenchmarkReport, Data, send
    from fvdm.files import write_text

    out = Path(config.out)
    out.mkdir(parents=True, exist_ok=True)
    write_text(out / "table1.md", text)
    values = {f"fvd/{name}": result["fvd"] for name, result in results.items()}
    real = pairs(config.real, "real")
    data = [Data(DATASETS[name], real[name], "real", result["taken"]["real"]) for name, result in results.items()]
    files = [out / "table1.md", *(out / f"{name}.json" for name in results)]
    params = {key: value for key, value in settings.flatten(config).items() if key != "out"}
    tags = {"config": " ".join(config.runs)}
    send(BenchmarkReport("table1", "table 1", [(0, values)], params, tags, files, data=data), out)


def main(argv: Sequence[str] | None = None) -> None:
    """Command line."""
    try:
        config = settings.parse(Table1Config, argv, __doc__)
        published = read_published(Path(config.published))
        from fvdm.evaluation.measure import ranks

        with ranks() as group:
            results = measure(config, group)
            main_rank = group.is_main
    except ValueError as error:
        settings.fail(error)
    if main_rank:
        text = table(results, [entry for entry in published if entry.frames == config.frames], config.protocol)
        print(text)
        report(results, text, config)


if __name__ == "__main__":
    main()
