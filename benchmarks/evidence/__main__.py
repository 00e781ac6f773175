"""The paper's claims, put to the test at a scale that fits: one command, whichever way they fall.

    python benchmarks/evidence.py --budget cpu-2h --videos DIR
    python benchmarks/evidence.py --budget paper --videos ffs=DIR sky=DIR ucf101=DIR taichi=DIR

Prepares the clips, with a held-out split; trains every arm (p = 0 is the scalar baseline of Latte) with the same steps,
data order and initial weights; samples, measures and draws. What is done is skipped: type the same command again to go
on, after whatever stopped it. configs/evidence/BUDGET.yaml says what is done; docs/evidence.md what was found.

In MLflow: one parent run with the tables and figures; each training and each measurement a run below it.
"""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if __package__ in (None, ""):  # run as a file: the folder above holds the packages
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from benchmarks.evidence.plan import EvidenceConfig, read_budget
from fvdm import config as settings

if TYPE_CHECKING:
    from benchmarks.evidence.run import Evidence


def main(argv: Sequence[str] | None = None) -> None:
    """Command line."""
    try:
        options = settings.parse(EvidenceConfig, argv, __doc__, prog="evidence.py")
        from benchmarks.evidence.run import Evidence

        evidence = Evidence(options.budget, read_budget(options.budget), options)
        if "worker" in options.stages:
            evidence.work(options.only)
            return
        run_stages(evidence)
    except ValueError as error:
        settings.fail(error)


def run_stages(evidence: "Evidence") -> None:
    """The stages, in order.

    Raises:
        ValueError: if one cannot be done; says why.
    """
    from benchmarks.evidence.pages import publish
    from benchmarks.evidence.report import report

    options, done = evidence.options, True
    if "data" in options.stages:
        evidence.prepare()
    if "train" in options.stages:
        done = evidence.train(options.only, evidence.at_once, quiet=True)
    if "measure" in options.stages:
        evidence.measure()
    if "report" in options.stages:
        tables = report(evidence)
        print(f"tables: {tables}")
        if options.docs:
            publish(evidence.out, [Path(name) for name in options.docs])
    if not done:
        print("type the same command again when the jobs are over")


if __name__ == "__main__":
    main()
